"""The attention of a block as a residual branch: x + factors * projection(attention(LayerNorm(x))).

On TPUs a branch can be one kernel, which reads and writes one map in each direction. Elsewhere the models run it op by op.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.attention.deformable import deformable_attention
from dat_jax.ops.attention.neighborhood import make_tiles, neighborhood_attention
from dat_jax.ops.calls import choose_call, tunable
from dat_jax.ops.layers.linear import linear
from dat_jax.ops.layers.mlp import scale_examples
from dat_jax.ops.layers.normalization import layer_norm
from dat_jax.ops.pallas import attention_branch as pallas_branch
from dat_jax.ops.pallas import deformable as pallas_deformable
from dat_jax.ops.pallas import neighborhood as pallas_neighborhood
from dat_jax.ops.pallas.biases import SharedBias
from dat_jax.ops.pallas.branch import Branch
from dat_jax.ops.pallas.call import all_fit, is_unrolled

_NEIGHBORHOOD_BATCHED = ("x", "factors")
_DEFORMABLE_BATCHED = ("x", "key", "value", "points", "factors")


@tunable("neighborhood_branch", batched=_NEIGHBORHOOD_BATCHED)
def neighborhood_branch(
    x: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array,
    kernel_in: jax.Array,
    bias_in: jax.Array,
    table: jax.Array,
    kernel_out: jax.Array,
    bias_out: jax.Array,
    factors: jax.Array,
    *,
    kernel_size: int,
    num_heads: int,
    implementation: str = "auto",
) -> jax.Array:
    """x + factors * (neighborhood_attention(q, k, v) kernel_out + bias_out), with q, k, v = LayerNorm(x) kernel_in + bias_in.

    Args:
      x: (B, H, W, C).
      norm_scale: (C,), float32 or better.
      norm_bias: (C,), float32 or better.
      kernel_in: (C, 3C).
      bias_in: (3C,).
      table: (M, 2K - 1, 2K - 1), see ``neighborhood_attention``.
      kernel_out: (C, C).
      bias_out: (C,).
      factors: (B,), factor of each example's branch. It is constant: its gradient is zero.
      kernel_size: K.
      num_heads: M.
      implementation: "products" runs op by op, each in the dtype of ``x``; "pallas" is a kernel for TPUs. See ``dispatch``.

    Returns:
      (B, H, W, C), of the dtype of ``x``.

    Raises:
      ValueError: see ``neighborhood_attention``.
    """
    arrays = dict(x=x, norm_scale=norm_scale, norm_bias=norm_bias, kernel_in=kernel_in, bias_in=bias_in, table=table)
    arrays |= dict(kernel_out=kernel_out, bias_out=bias_out, factors=factors)
    options: dict[str, Any] = dict(kernel_size=kernel_size, num_heads=num_heads)
    if _choose("neighborhood_branch", implementation, arrays, options) == "pallas":
        return _run_kernel("neighborhood_branch", arrays, options)
    inner = "plain" if implementation == "plain" else "auto"
    with dispatch.gradients_for(implementation):
        packed = linear(layer_norm(x, norm_scale, norm_bias), kernel_in.astype(x.dtype), bias_in.astype(x.dtype))
        query, key, value = jnp.split(packed, 3, axis=-1)
        out = neighborhood_attention(query, key, value, table, **options, implementation=inner)
        return x + scale_examples(linear(out, kernel_out.astype(x.dtype), bias_out.astype(x.dtype)), factors)


@tunable("deformable_branch", batched=_DEFORMABLE_BATCHED)
def deformable_branch(
    x: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array,
    kernel_in: jax.Array,
    bias_in: jax.Array,
    key: jax.Array,
    value: jax.Array,
    points: jax.Array,
    table: jax.Array,
    kernel_out: jax.Array,
    bias_out: jax.Array,
    factors: jax.Array,
    *,
    num_heads: int,
    implementation: str = "auto",
) -> jax.Array:
    """x + factors * (deformable_attention(q, key, value) kernel_out + bias_out), with q = LayerNorm(x) kernel_in + bias_in.

    Args:
      x: (B, H, W, C).
      norm_scale: (C,), float32 or better.
      norm_bias: (C,), float32 or better.
      kernel_in: (C, C).
      bias_in: (C,).
      key: (B, N, C), see ``deformable_attention``.
      value: (B, N, C).
      points: (B, G, N, 2), all inside the map.
      table: (M, 2 * H - 1, 2 * W - 1).
      kernel_out: (C, C).
      bias_out: (C,).
      factors: (B,), factor of each example's branch. It is constant: its gradient is zero.
      num_heads: M.
      implementation: "products" runs op by op, each in the dtype of ``x``; "pallas" is a kernel for TPUs. See ``dispatch``.

    Returns:
      (B, H, W, C), of the dtype of ``x``.

    Raises:
      ValueError: see ``deformable_attention``.
    """
    arrays = dict(x=x, norm_scale=norm_scale, norm_bias=norm_bias, kernel_in=kernel_in, bias_in=bias_in, table=table)
    arrays |= dict(key=key, value=value, points=points, kernel_out=kernel_out, bias_out=bias_out, factors=factors)
    options: dict[str, Any] = dict(num_heads=num_heads)
    if _choose("deformable_branch", implementation, arrays, options) == "pallas":
        return _run_kernel("deformable_branch", arrays, options)
    inner = "plain" if implementation == "plain" else "auto"
    with dispatch.gradients_for(implementation):
        query = linear(layer_norm(x, norm_scale, norm_bias), kernel_in.astype(x.dtype), bias_in.astype(x.dtype))
        options |= dict(points_inside=True, implementation=inner)
        out = deformable_attention(query, key, value, points=points, table=table, **options)
        return x + scale_examples(linear(out, kernel_out.astype(x.dtype), bias_out.astype(x.dtype)), factors)


def _run_kernel(op, arrays, options):
    out = pallas_branch.attention_branch(*_KERNEL_ARGUMENTS[op](**arrays, **options))
    return out.reshape(arrays["x"].shape)


def _neighborhood_arguments(*, x, table, kernel_size, num_heads, **parameters):
    """Arguments of the kernel, from those of ``neighborhood_branch``."""
    tiles = make_tiles(x.shape[1:3], kernel_size)
    layout, bias = pallas_neighborhood.make_layout(table, x.shape[2], *tiles, x.shape[3], num_heads)
    return layout, SharedBias(), *_shared_arguments(x, **parameters), (), (bias,)


def _deformable_arguments(*, x, key, value, points, table, num_heads, **parameters):
    """Arguments of the kernel, from those of ``deformable_branch``."""
    map_shape = (x.shape[1], x.shape[2])
    bias, bias_arrays = pallas_deformable.make_table_bias(points, table, map_shape)
    layout = pallas_deformable.make_layout(map_shape, key.shape[1], x.shape[3], num_heads)
    return layout, bias, *_shared_arguments(x, **parameters), (key, value), bias_arrays


def _shared_arguments(x, *, norm_scale, norm_bias, kernel_in, bias_in, kernel_out, bias_out, factors):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    branch = Branch.make(lax.stop_gradient(factors), norm_scale, norm_bias, dtype=wide)
    projections = pallas_branch.Projections.make(kernel_in, bias_in, kernel_out, bias_out, dtype=wide)
    return x.reshape(x.shape[0], -1, x.shape[3]), branch, projections


_KERNEL_ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "neighborhood_branch": _neighborhood_arguments,
    "deformable_branch": _deformable_arguments,
}


def fits_kernel(op: str, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether a branch has a Pallas kernel that fits in VMEM.

    Args:
      op: "neighborhood_branch" or "deformable_branch".
      arrays: its arrays by name, which may be ShapeDtypeStructs.
      options: its other arguments by name.
    """
    map_shape = arrays["x"].shape[1:3]
    if not is_unrolled(map_shape) or (op == "deformable_branch" and not _is_table_of(arrays["table"].shape, map_shape)):
        return False
    return all_fit(lambda arrays: pallas_branch.list_calls(*_KERNEL_ARGUMENTS[op](**arrays, **options)), dict(arrays))


def neighborhood_uses_pallas(
    shape: tuple[int, ...], *, kernel_size: int, num_heads: int, dtype: Any = jnp.float32, implementation: str = "auto"
) -> bool:
    """Whether ``neighborhood_branch`` of (B, H, W, C) runs as a Pallas kernel. The parameters are float32."""
    side = 2 * kernel_size - 1
    if min(shape[1:3]) < kernel_size or shape[3] > pallas_branch.MAX_CHANNELS:
        return False
    arrays = _shape_parameters(shape, 3 * shape[3]) | {"table": (num_heads, side, side)}
    options = dict(kernel_size=kernel_size, num_heads=num_heads)
    batched = _NEIGHBORHOOD_BATCHED
    return _uses_pallas(
        neighborhood_branch, "neighborhood_branch", shape, dtype, arrays, batched, options, implementation
    )


def deformable_uses_pallas(
    shape: tuple[int, ...],
    *,
    points: tuple[int, ...],
    table: tuple[int, ...],
    num_heads: int,
    dtype: Any = jnp.float32,
    implementation: str = "auto",
) -> bool:
    """Whether ``deformable_branch`` of (B, H, W, C) runs as a Pallas kernel.

    Args:
      shape: (B, H, W, C).
      points: shape of the points.
      table: shape of the table.
      num_heads: M.
      dtype: of ``x``, key and value. The points and parameters are float32.
      implementation: see ``deformable_branch``.
    """
    if not _is_table_of(table, shape[1:3]) or shape[3] > pallas_branch.MAX_CHANNELS:
        return False
    whole = dispatch.choose_query_tile((shape[1], shape[2]), pairs_per_query=num_heads * points[2]) == tuple(shape[1:3])
    if not whole or not pallas_deformable.table_fits(table):
        return False
    pairs = (shape[0], points[2], shape[3])
    arrays = _shape_parameters(shape, shape[3]) | dict(key=pairs, value=pairs, points=points, table=table)
    options, batched = dict(num_heads=num_heads), _DEFORMABLE_BATCHED
    return _uses_pallas(deformable_branch, "deformable_branch", shape, dtype, arrays, batched, options, implementation)


def _is_table_of(table: tuple[int, ...], map_shape: tuple[int, ...]) -> bool:
    """Whether a position bias table was made for maps of this size."""
    return table[1:] == tuple(2 * side - 1 for side in map_shape)


def _shape_parameters(shape, width):
    channels = shape[3]
    parameters = dict(norm_scale=(channels,), norm_bias=(channels,), kernel_in=(channels, width), bias_in=(width,))
    return parameters | dict(kernel_out=(channels, channels), bias_out=(channels,), factors=(shape[0],))


def _uses_pallas(function, op, shape, dtype, arrays, batched, options, implementation):
    dtypes = dict.fromkeys(("key", "value"), dtype)
    structs: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(s, dtypes.get(name, jnp.float32)) for name, s in arrays.items()
    }
    structs = {"x": jax.ShapeDtypeStruct(shape, dtype), **structs}
    if implementation == "auto":
        implementation = choose_call(op, function, frozenset(batched), structs | options)
    return _choose(op, implementation, structs, options) == "pallas"


def _choose(op, implementation, arrays, options):
    map_shape = tuple(arrays["x"].shape[1:3])
    fits = functools.partial(fits_kernel, op, arrays, options)
    return dispatch.choose(op, implementation, map_shape=map_shape, kernel_fits=fits)
