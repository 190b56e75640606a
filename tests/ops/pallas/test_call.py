"""Common behavior of the kernels: platforms, memory limit, meshes, and compilation for TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dat_jax.ops import dispatch
from dat_jax.ops.attention.deformable import deformable_attention
from dat_jax.ops.attention.grid_sample import grid_sample
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.layers.mlp import conv_mlp
from dat_jax.ops.pallas import attention
from dat_jax.ops.pallas.biases import NoBias
from dat_jax.profiling import hlo, topologies
from dat_jax.profiling.flops import count_product_flops

CHANNELS, HEADS, SIDE, KEYS = 32, 2, 4, 5


def run_all_kernels(x, points, table, neighborhood_table, weights):
    """Runs each kernel once, on a map (B, 4, 4, 32)."""
    options = dict(implementation="pallas")
    sampled = grid_sample(x, points, **options)
    x = deformable_attention(
        x, sampled, sampled, num_heads=HEADS, points=points, table=table, points_inside=True, **options
    )
    x = neighborhood_attention(x, x, x, neighborhood_table, kernel_size=3, num_heads=HEADS, **options)
    return conv_mlp(x, *weights, **options)


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
        return (run_all_kernels(*arguments).astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(*arguments)


def test_kernels_raise_on_another_platform():
    token = dispatch._INTERPRET.set(False)
    try:
        with pytest.raises(ValueError, match='"pallas" is for TPUs, but .* for cpu; choose "auto"'):
            run_all_kernels(*make_arguments(2, jnp.float32))
    finally:
        dispatch._INTERPRET.reset(token)


def test_kernel_that_does_not_fit_in_vmem_raises():
    x = jax.ShapeDtypeStruct((1, 64 * 64, 8192), jnp.float32)
    layout = attention.Layout(2, 8192, (attention.Span(0, 64 * 64, 0, 64),))

    def attend(x):
        return attention.attention(layout, NoBias(), (x, x[:, :64], x[:, :64]), ())

    with pytest.raises(ValueError, match="MiB of VMEM .* limit of 100 MiB"):
        jax.eval_shape(attend, x)


def test_a_mesh_of_devices_gives_the_result_of_one_device():
    """Batched results, and results that are summed over the batch: the gradient of a table."""
    x, _, _, table, _ = make_arguments(4, jnp.float32)

    def loss(x, table):
        options = dict(kernel_size=3, num_heads=HEADS, implementation="pallas")
        return (neighborhood_attention(x, 2 * x, x, table, **options) ** 2).sum()

    expected = jax.jit(lambda *a: jax.value_and_grad(loss, argnums=(0, 1))(*a))(x, table)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with dispatch.split_batch(mesh, ("a", "b")):
        actual = jax.jit(lambda *a: jax.value_and_grad(loss, argnums=(0, 1))(*a))(x, table)
    for actual_array, expected_array in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual_array, expected_array, rtol=1e-4, atol=1e-4)


def test_flops_of_a_kernel_are_counted_for_the_whole_batch():
    arguments = make_arguments(4, jnp.float32)
    with jax.named_scope("count"):
        flops = count_product_flops(
            jax.make_jaxpr(lambda x, *w: conv_mlp(x, *w, implementation="pallas"))(arguments[0], *arguments[4]).jaxpr
        )
    assert flops == 4 * 2 * 2 * SIDE * SIDE * CHANNELS * 4 * CHANNELS


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v5e:2x2"])
def test_kernels_compile_for_a_tpu(topology):
    """Eight kernels, forward and backward. On four chips each chip has its part of the batch, without any gather."""
    _, devices = topologies.find_devices(topology)
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
