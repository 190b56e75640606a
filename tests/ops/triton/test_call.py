"""Common behavior of the kernels for GPUs: platforms, dtypes, meshes, and compilation for an H100."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dat_jax.ops import dispatch
from dat_jax.ops.attention.deformable import deformable_attention
from dat_jax.ops.attention.grid_sample import grid_sample
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.calls import recorded_calls
from dat_jax.ops.triton import call
from dat_jax.profiling import hlo, topologies
from dat_jax.tuning.compiled import make_compiled_measure

HEADS, KEYS = 2, 5


@pytest.fixture
def compiled_kernels():
    """Kernels are compiled, not interpreted as in the other tests of ops.

    Programs for a GPU that is not attached are not kept: jax cannot read them again.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    token, seconds = dispatch._INTERPRET.set(False), getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, seconds)
    dispatch._INTERPRET.reset(token)


def run_all_kernels(x, sampled, points, table, neighborhood_table):
    """Runs each kernel once, on a map (B, H, W, C)."""
    options = dict(num_heads=HEADS, implementation="triton")
    x = deformable_attention(x, sampled, sampled, points=points, table=table, **options)
    return neighborhood_attention(x, 2 * x, x, neighborhood_table, kernel_size=3, **options)


def value_and_gradients(*arguments):
    def loss(*arguments):
        return (run_all_kernels(*arguments).astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))(*arguments)


def make_arguments(batch, dtype, *, side=4, channels=8):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(batch, side, side, channels)), dtype),
        jnp.asarray(rng.normal(size=(batch, KEYS, channels)), dtype),
        jnp.asarray(rng.uniform(0, side - 1, (batch, 1, KEYS, 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(HEADS, 2 * side - 1, 2 * side - 1)), jnp.float32),
        jnp.asarray(rng.normal(size=(HEADS, 5, 5)), jnp.float32),
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_kernels_raise_on_another_platform(compiled_kernels, platform):
    arguments = make_arguments(2, jnp.float32)
    with (
        dispatch.compiling_for(platform),
        pytest.raises(ValueError, match=f'"triton" is for GPUs, but .* for {platform}; choose "auto"'),
    ):
        jax.eval_shape(run_all_kernels, *arguments)


def test_the_kernels_for_tpus_raise_on_a_gpu(compiled_kernels):
    x, *_, table = make_arguments(2, jnp.float32)
    with dispatch.compiling_for("gpu"), pytest.raises(ValueError, match='"pallas" is for TPUs, but .* for gpu'):
        neighborhood_attention(x, x, x, table, kernel_size=3, num_heads=HEADS, implementation="pallas")


def test_kernels_raise_without_the_triton_backend(monkeypatch):
    monkeypatch.setattr(call, "plgpu", None)
    with pytest.raises(ValueError, match="needs the Triton backend of Pallas, which jax .* does not have"):
        jax.eval_shape(run_all_kernels, *make_arguments(2, jnp.float32))


def test_other_dtypes_are_refused(x64, compiled_kernels):
    x, *_, table = make_arguments(2, jnp.float64)
    with (
        dispatch.compiling_for("gpu"),
        pytest.raises(ValueError, match='supports bfloat16, float16, float32, got float64; choose "auto"'),
    ):
        neighborhood_attention(x, x, x, table, kernel_size=3, num_heads=HEADS, implementation="triton")


@pytest.mark.parametrize("op", ["grid_sample", "conv_mlp", "depthwise_conv", "position_bias"])
def test_ops_without_a_kernel_use_the_default(op):
    with dispatch.compiling_for("gpu"):
        names = [dispatch.choose(op, name, map_shape=(14, 14)) for name in ("triton", "auto")]
    assert names[0] == names[1]


def test_auto_does_not_choose_a_kernel():
    with dispatch.compiling_for("gpu"):
        for op in dispatch.IMPLEMENTATIONS:
            for map_shape in ((7, 7), (56, 56), (200, 336)):
                assert dispatch.choose(op, "auto", map_shape=map_shape) not in ("triton", "pallas")


@pytest.mark.slow
def test_a_mesh_of_devices_gives_the_result_of_one_device():
    """Batched results, and results that are summed over the batch: the gradients of the tables."""
    arguments = make_arguments(4, jnp.float32)
    expected = jax.jit(lambda *a: value_and_gradients(*a))(*arguments)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with dispatch.split_batch(mesh, ("a", "b")):
        actual = jax.jit(lambda *a: value_and_gradients(*a))(*arguments)
    for actual_array, expected_array in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual_array, expected_array, rtol=1e-4, atol=1e-4)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the compiler for GPUs is not installed"
)
ignores_deprecation = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@needs_compiler
@ignores_deprecation
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_an_h100_without_spilling_registers(compiled_kernels, dtype):
    """Seven kernels, forward and backward, with the head width of the models. The rest has no gather and no scatter."""
    _, devices = topologies.find_devices("h100")
    where = NamedSharding(Mesh(np.array(devices[:1]), ("a",)), PartitionSpec())
    arguments = jax.eval_shape(lambda: make_arguments(4, dtype, side=14, channels=64))
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in arguments]
    with dispatch.compiling_for("gpu"):
        lowered = jax.jit(lambda *a: value_and_gradients(*a)).lower(*arguments)
    compiled = lowered.compile({"xla_gpu_fail_ptx_compilation_on_register_spilling": True})
    module = hlo.parse(compiled.as_text())
    assert sum("triton" in (i.target or "") for _, i in module) == 7
    assert hlo.count_indexed(module, "gather")["count"] == hlo.count_indexed(module, "scatter")["count"] == 0


@needs_compiler
@ignores_deprecation
@pytest.mark.slow
def test_the_tuner_counts_the_bytes_of_a_kernel_on_an_h100(compiled_kernels):
    x, table = jnp.ones((2, 14, 14, 64), jnp.bfloat16), jnp.ones((2, 13, 13))
    with recorded_calls(differentiated=True) as calls:
        jax.eval_shape(lambda x, t: neighborhood_attention(x, x, x, t, kernel_size=7, num_heads=2), x, table)
    (neighborhood,) = calls.values()
    _, devices = topologies.find_devices("h100")
    with dispatch.compiling_for("gpu"):
        measured = make_compiled_measure(devices)(neighborhood, ["tiles", "triton"])
    assert [value.problem for value in measured.values()] == ["", ""]
    assert 0 < measured["triton"].bytes < measured["tiles"].bytes


def test_grid_sample_ignores_the_name():
    x, _, points, *_ = make_arguments(2, jnp.float32)
    results = [grid_sample(x, points, implementation=name) for name in ("triton", "auto")]
    np.testing.assert_array_equal(*results)
