"""The implementations that are compared for a call of an op, and how much they may differ from the plain one."""

from typing import Any

import jax

from dat_jax.ops import dispatch
from dat_jax.ops.attention import branches, deformable, grid_sample, neighborhood
from dat_jax.ops.attention.position_bias import table_fits
from dat_jax.ops.calls import OpCall
from dat_jax.ops.layers import local_perception, mlp, norm_linear
from dat_jax.ops.triton import call as triton_kernels

KERNELS = ("pallas", "triton")
_MAX_DENSE_SIDE = 32  # pixels; the scores of "dense" attention grow with the fourth power of the side
_MAX_MATMUL_PIXELS = 2**14  # the matrix of "matmul" sampling has a column for each

# Largest difference of a result or gradient from the plain implementation in float32, relative to the largest absolute value of
# that array: two to three times what was measured of the implementations that are there (experiments/tuning). Products of
# float32 are rounded on TPUs and GPUs, by default, so "rounded" also applies to float32 there. In the MLP and the
# local perception unit, the gradients of biases are sums of many rounded numbers, most of which cancel.
TOLERANCES = {
    "grid_sample": {"exact": 1e-4, "rounded": 0.03},
    "neighborhood_attention": {"exact": 1e-4, "rounded": 0.03},
    "deformable_attention": {"exact": 1e-4, "rounded": 0.03},
    "neighborhood_branch": {"exact": 1e-4, "rounded": 0.04},
    "deformable_branch": {"exact": 1e-4, "rounded": 0.04},
    "conv_mlp": {"exact": 1e-4, "rounded": 0.12},
    "local_perception": {"exact": 1e-4, "rounded": 0.12},
    "norm_linear": {"exact": 1e-4, "rounded": 0.03},
    "depthwise_conv": {"exact": 1e-4, "rounded": 0.03},
}


def list_candidates(call: OpCall) -> list[str]:
    """The implementations to compare, the default first.

    Implementations whose memory grows with queries times keys on large maps are left out, and so are kernels where they cannot
    run: "pallas" is for TPUs, where a call fits in VMEM, and "triton" for GPUs.
    """
    shape, _ = call.main_array
    map_shape, shapes = shape[1:3], {name: shape for name, shape, _ in call.arrays}
    names = _ALGORITHMS[call.op](map_shape, shapes, dict(call.options))
    names = [*names, *_list_kernels(call, shapes)]
    default = find_default(call)
    return [default, *(name for name in names if name != default)]


def _fits_kernel(call: OpCall, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the op has a Pallas kernel for the call that fits in VMEM."""
    shape, dtype = call.main_array
    options: dict[str, Any] = dict(call.options)
    if call.op == "neighborhood_attention":
        options = {name: options[name] for name in ("kernel_size", "num_heads")}
        return neighborhood.fits_kernel(shape, dtype, **options)
    if call.op == "deformable_attention":
        options.pop("tile_shape", None)
        arrays = {name: shapes.get(name) for name in ("key", "points", "table", "bias")}
        arrays = {f"{name}_shape": value for name, value in arrays.items()}
        return deformable.fits_kernel(shape, dtype, **arrays, **options)
    if call.op == "grid_sample":
        return grid_sample.fits_kernel(shape, dtype, shapes["points"])
    if call.op == "conv_mlp":
        return mlp.fits_kernel(shape, shapes["kernel1"][1], dtype=dtype)
    if call.op == "norm_linear":
        return norm_linear.fits_kernel(shape, shapes["kernel"][1], dtype=dtype)
    if call.op == "local_perception":
        return local_perception.fits_kernel(shape, dtype=dtype)
    if call.op in ("neighborhood_branch", "deformable_branch"):
        arrays = {name: jax.ShapeDtypeStruct(*array) for name, *array in call.arrays}
        return branches.fits_kernel(call.op, arrays, options)
    return False


def find_default(call: OpCall) -> str:
    """The implementation that "auto" is without a choice."""
    shape, _ = call.main_array
    shapes = {name: shape for name, shape, _ in call.arrays}
    if call.op == "deformable_attention" and "table" in shapes:  # its "auto" is the one of the table lookup
        fits = _has_fitting_table(shape[1:3], shapes, dict(call.options))
        return dispatch.choose("position_bias", "auto", map_shape=shape[1:3], table_fits=fits)
    return dispatch.choose(call.op, "auto", map_shape=shape[1:3])


def get_tolerance(call: OpCall) -> float:
    """Largest relative difference from the plain implementation, see ``TOLERANCES``."""
    exact = call.main_array[1] in ("float32", "float64") and dispatch.target_platform() == "cpu"
    return TOLERANCES[call.op]["exact" if exact else "rounded"]


def _list_kernels(call: OpCall, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The kernels of the target platform, or all of them on CPUs where kernels are interpreted."""
    if {"sizes", "key_mask"} & set(shapes):
        return []
    platform = dispatch.target_platform()
    interpreted = platform == "cpu" and dispatch.interprets_kernels()
    names = []
    if (platform == "tpu" or interpreted) and _fits_kernel(call, shapes):
        names.append("pallas")
    if (
        (platform == "gpu" or interpreted)
        and "triton" in dispatch.IMPLEMENTATIONS[call.op]
        and triton_kernels.is_supported()
    ):
        names.append("triton")
    return names


def _list_neighborhood(map_shape, shapes, options):
    del options
    names = ["tiles"]
    if max(map_shape) <= _MAX_DENSE_SIDE:
        names.append("dense")
    if dispatch.target_platform() == "cpu" and "sizes" not in shapes:
        names.append("rows")
    return names


def _list_deformable(map_shape, shapes, options):
    if "table" not in shapes:
        return ["products"]
    uses_slices = dispatch.target_platform() != "tpu" and _has_fitting_table(map_shape, shapes, options)
    return ["matmul", "slice"] if uses_slices else ["matmul"]


def _has_fitting_table(map_shape, shapes, options) -> bool:
    query_grid = options.get("query_grid", "corners")
    return "sizes" not in shapes and table_fits(shapes["table"], map_shape=map_shape, query_grid=query_grid)


def _list_sampling(map_shape, shapes, options):
    del shapes, options
    return ["gather", "matmul"] if map_shape[0] * map_shape[1] <= _MAX_MATMUL_PIXELS else ["gather"]


_ALGORITHMS = {
    "neighborhood_attention": _list_neighborhood,
    "deformable_attention": _list_deformable,
    "grid_sample": _list_sampling,
    **dict.fromkeys(
        ("neighborhood_branch", "deformable_branch", "conv_mlp", "local_perception", "norm_linear"),
        lambda map_shape, shapes, options: ["products"],
    ),
    "depthwise_conv": lambda map_shape, shapes, options: ["conv", "shifts"],
}
