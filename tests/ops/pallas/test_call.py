"""What the kernels have in common: where they run, what they refuse, how a mesh splits them; compiled for TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dat_jax.ops import dispatch
from dat_jax.ops.attention import deformable as da
from dat_jax.ops.attention import grid_sample
from dat_jax.ops.attention import neighborhood as na
from dat_jax.ops.layers import mlp
from dat_jax.profiling import hlo
from dat_jax.profiling import topologies as targets
from dat_jax.profiling.flops import count_product_flops

CHANNELS, HEADS, SIDE, KEYS = 32, 2, 4, 5


def everything(x, points, table, neighborhood_table, weights):
    """Each kernel once, on a map (B, 4, 4, 32)."""
    options = dict(implementation="pallas")
    sampled = grid_sample.grid_sample(x, points, **options)
    x = da.deformable_attention(
        x, sampled, sampled, num_heads=HEADS, points=points, table=table, points_inside=True, **options
    )
    x = na.neighborhood_attention(x, x, x, neighborhood_table, kernel_size=3, num_heads=HEADS, **options)
    return mlp.conv_mlp(x, *weights, **options)


def make_arguments(batch, dtype):
    rng = np.random.default_rng(0)
    hidden = 4 * CHANNELS
    shapes = (CHANNELS, hidden), (hidden,), (3, 3, 1, hidden), (hidden,), (hidden, CHANNELS), (CHANNELS,)
    side = 2 * SIDE - 1
    return (
        jnp.asarray(rng.normal(size=(batch, SIDE, SIDE, CHANNELS)), dtype),
        jnp.asarray(rng.uniform(0, SIDE - 1, (batch, 1, KEYS, 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(HEADS, side, side)), jnp.float32),
        jnp.asarray(rng.normal(size=(HEADS, 5, 5)), jnp.float32),
        tuple(jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for shape in shapes),
    )


def value_and_gradients(*arguments):
    def loss(*arguments):
        return (everything(*arguments).astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(*arguments)


def test_on_another_platform_they_are_refused():
    token = dispatch._INTERPRET.set(False)
    try:
        with pytest.raises(ValueError, match='"pallas" is for TPUs, but .* for cpu; choose "auto"'):
            everything(*make_arguments(2, jnp.float32))
    finally:
        dispatch._INTERPRET.reset(token)


def test_what_does_not_fit_is_refused():
    x = jax.ShapeDtypeStruct((1, 64, 64, 2048), jnp.float32)
    table = jax.ShapeDtypeStruct((2, 13, 13), jnp.float32)

    def attend(x, table):
        return na.neighborhood_attention(x, x, x, table, kernel_size=7, num_heads=2, implementation="pallas")

    with pytest.raises(ValueError, match="MiB of VMEM .* limit of 100 MiB"):
        jax.eval_shape(attend, x, table)


def test_devices_of_a_mesh_give_what_one_does():
    """What is of an example, and what is summed over the batch: the gradient of a table."""
    x, _, _, table, _ = make_arguments(4, jnp.float32)

    def loss(x, table):
        options = dict(kernel_size=3, num_heads=HEADS, implementation="pallas")
        return (na.neighborhood_attention(x, 2 * x, x, table, **options) ** 2).sum()

    wanted = jax.jit(lambda *a: jax.value_and_grad(loss, argnums=(0, 1))(*a))(x, table)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with dispatch.split_batch(mesh, ("a", "b")):
        got = jax.jit(lambda *a: jax.value_and_grad(loss, argnums=(0, 1))(*a))(x, table)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_products_of_a_kernel_are_counted_for_the_batch():
    arguments = make_arguments(4, jnp.float32)
    with jax.named_scope("count"):
        flops = count_product_flops(
            jax.make_jaxpr(lambda x, *w: mlp.conv_mlp(x, *w, implementation="pallas"))(
                arguments[0], *arguments[4]
            ).jaxpr
        )
    assert flops == 4 * 2 * 2 * SIDE * SIDE * CHANNELS * 4 * CHANNELS


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v5e:2x2"])
def test_they_compile_for_a_tpu(topology):
    """Eight kernels, forward and backward; on four chips each has its part of the batch and nothing is gathered."""
    _, devices = targets.find_devices(topology)
    mesh = jax.make_mesh((len(devices),), ("a",), axis_types=(AxisType.Auto,), devices=devices)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("a",), ()))
    arguments = jax.eval_shape(lambda: make_arguments(4, jnp.bfloat16))
    arguments = [
        jax.tree.map(
            lambda leaf, w=split if i < 2 else whole: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=w), a
        )
        for i, a in enumerate(arguments)
    ]
    token = dispatch._INTERPRET.set(False)
    try:
        with dispatch.compiling_for("tpu"), dispatch.split_batch(mesh, ("a",)):
            compiled = jax.jit(lambda *a: value_and_gradients(*a)).lower(*arguments).compile()
    finally:
        dispatch._INTERPRET.reset(token)
    module = hlo.parse(compiled.as_text())
    assert sum(i.target == "tpu_custom_call" for _, i in module) == 8
    assert hlo.count_indexed(module, "gather")["count"] == hlo.count_indexed(module, "scatter")["count"] == 0
    assert set(hlo.collectives(module)) == ({"all-reduce"} if len(devices) > 1 else set())
