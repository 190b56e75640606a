"""Deformable attention of maps of any size: one row of queries after the other, with all sampled keys in VMEM.

The grid is (batch, blocks of rows), and sequential. The bias of a row of queries is looked up in the table inside the kernel, see
``table_rows``; neither scores nor biases are written to memory. The backward pass adds the gradients of keys, values, points and
the table over the blocks.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dat_jax.ops.pallas.attention import Layout, attend, attend_backward
from dat_jax.ops.pallas.call import KernelCall, Result, Rows, stored_bytes
from dat_jax.ops.pallas.table_rows import Lookup, RowOfQueries, make_lookup, table_offsets

_BLOCK_PIXELS = 2048  # of the queries of a grid step
_MAX_STEP_BYTES = 56 * 2**20  # a v5p has 64 MiB of VMEM


@dataclasses.dataclass(frozen=True)
class Call:
    """The static arguments of a call.

    Attributes:
      layout: heads and channels.
      map_shape: (H, W).
      lookup: lookup of the position bias, or None for no bias.
    """

    layout: Layout
    map_shape: tuple[int, int]
    lookup: Lookup | None

    @property
    def rows(self) -> int:
        """Rows of queries per block."""
        return max(1, min(self.map_shape[0], _BLOCK_PIXELS // self.map_shape[1]))


def deformable_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_heads: int,
    points: jax.Array | None = None,
    table: jax.Array | None = None,
    query_grid: str = "corners",
    points_inside: bool = False,
) -> jax.Array:
    """See ``ops.attention.deformable``.

    Args:
      query: (B, H, W, C).
      key: (B, N, C).
      value: (B, N, C).
      num_heads: M.
      points: (B, G, N, 2), float32 or better; None for no bias.
      table: (M, 2 * H0 - 1, 2 * W0 - 1); None for no bias.
      query_grid: "corners" or "centers".
      points_inside: whether all points are inside the map.

    Returns:
      (B, H, W, C).
    """
    arrays = (query, key, value)
    if table is None or points is None:
        return _attention(_make_call(query.shape, None, num_heads), arrays, ())
    points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    map_shape = (query.shape[1], query.shape[2])
    lookup = make_lookup(
        table.shape, groups=points.shape[1], map_shape=map_shape, query_grid=query_grid, inside=points_inside
    )
    bias_arrays = (table_offsets(points, lookup, query_grid=query_grid), lookup.pad_table(table.astype(points.dtype)))
    return _attention(_make_call(query.shape, lookup, num_heads), arrays, bias_arrays)


def fits(
    shape: tuple[int, ...],
    dtype: Any,
    *,
    keys: int,
    num_heads: int,
    points_shape: tuple[int, ...] | None = None,
    table_shape: tuple[int, ...] | None = None,
    query_grid: str = "corners",
    points_inside: bool = False,
) -> bool:
    """Whether a block of rows fits in VMEM, with all keys.

    Args:
      shape: (B, H, W, C), the shape of the query.
      dtype: of the query.
      keys: N.
      num_heads: see ``deformable_attention``.
      points_shape: (B, G, N, 2), or None.
      table_shape: (M, 2 * H0 - 1, 2 * W0 - 1), or None.
      query_grid: see ``deformable_attention``.
      points_inside: see ``deformable_attention``.
    """
    wide, lookup = jnp.promote_types(dtype, jnp.float32), None
    if table_shape is not None and points_shape is not None:
        map_shape = (shape[1], shape[2])
        lookup = make_lookup(
            table_shape, groups=points_shape[1], map_shape=map_shape, query_grid=query_grid, inside=points_inside
        )
    biases = () if lookup is None else ((1, keys, 2 * lookup.groups), _table_shape(lookup))
    query, key = (jax.ShapeDtypeStruct(s, dtype) for s in ((1, *shape[1:]), (1, keys, shape[3])))
    biases = tuple(jax.ShapeDtypeStruct(s, wide) for s in biases)
    call = _kernel_call(_make_call(shape, lookup, num_heads), (query, key, key), biases, query)
    return call.vmem_bytes <= _MAX_STEP_BYTES


def _table_shape(lookup):
    return lookup.groups, lookup.table_shape[0], lookup.heads_per_group * lookup.lanes


def _make_call(shape, lookup, num_heads):
    return Call(Layout(num_heads, shape[3], ()), (shape[1], shape[2]), lookup)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, arrays, bias_arrays):
    (out,) = _kernel_call(call, arrays, bias_arrays).run()
    return out


def _attention_forward(call, arrays, bias_arrays):
    return _attention(call, arrays, bias_arrays), (arrays, bias_arrays)


def _attention_backward(call, residuals, gradient):
    arrays, bias_arrays = residuals
    gradients = _kernel_call(call, arrays, bias_arrays, gradient).run()
    return tuple(gradients[:3]), tuple(gradients[3:])


_attention.defvjp(_attention_forward, _attention_backward)


def _kernel_call(call: Call, arrays, bias_arrays, gradient=None) -> KernelCall:
    """The forward kernel, or the backward kernel if there is a gradient."""
    (query, key, _), layout, lookup = arrays, call.layout, call.lookup
    wide, keys = jnp.promote_types(query.dtype, jnp.float32), key.shape[1]
    (height, width), rows = call.map_shape, Rows(call.rows)
    operands = [(query, rows), *((x, True) for x in arrays[1:])]
    pairs = height * width * keys * layout.num_heads
    products, name, lookup_flops, work = 2, "forward", 0, 0
    if lookup is not None:
        operands += [(bias_arrays[0], True), (bias_arrays[1], False)]
        operands += [(x, False) for x in lookup.constants(wide)]
        lookup_flops, work = height * lookup.flops(keys), lookup.work_bytes(keys, wide)
    kernel, results, scratch = _forward_kernel, [Result(query.shape, query.dtype, rows)], []
    if gradient is not None:
        operands.append((gradient, rows))
        kernel, products, name = _backward_kernel, 5, "backward"
        results += [Result(x.shape, x.dtype, True) for x in arrays[1:]]
        results += [Result(x.shape, x.dtype, index == 0) for index, x in enumerate(bias_arrays)]
        scratch = [((2, layout.channels, keys), wide)]
        lookup_flops *= 3
    scores, copies = stored_bytes((keys, width), wide), stored_bytes((max(keys, width), layout.channels), wide)
    return KernelCall(
        functools.partial(kernel, call),
        operands,
        results,
        flops=2 * products * layout.width * pairs + lookup_flops,
        exponentials=pairs,
        work_bytes=5 * scores + 8 * copies + work + sum(stored_bytes(*x) for x in scratch),
        name=f"deformable_rows_{name}",
        scratch=[pltpu.VMEM(*x) for x in scratch],
        steps=math.ceil(height / call.rows),
    )


def _for_each_row(call: Call, process):
    """Calls ``process(index in the block, index in the map)`` for each row of queries of this step."""
    first = pl.program_id(1) * call.rows

    def step(index, _):
        process(index, first + index)
        return 0

    lax.fori_loop(0, jnp.minimum(call.rows, call.map_shape[0] - first), step, 0)


def _load_bias(call, bias_refs, row):
    return None if call.lookup is None else RowOfQueries(call.lookup, bias_refs, row)


def _forward_kernel(call, query_ref, key_ref, value_ref, *refs):
    bias_refs, out_ref = refs[:-1], refs[-1]

    def process(index, row):
        bias = _load_bias(call, bias_refs, row)
        load = (lambda head: 0.0) if bias is None else bias.load
        out = attend(call.layout, query_ref[0, index].T, key_ref[0], value_ref[0], load)
        out_ref[0, index] = out.T.astype(out_ref.dtype)

    _for_each_row(call, process)


def _backward_kernel(call, query_ref, key_ref, value_ref, *refs):
    count = 0 if call.lookup is None else 4
    bias_refs, gradient_ref, rest = refs[:count], refs[count], refs[count + 1 :]
    (to_query, to_key, to_value), bias_results, sums = rest[:3], rest[3:-1], rest[-1]
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        for ref in bias_results[:1]:  # of an example
            ref[...] = jnp.zeros_like(ref)

    @pl.when((step == 0) & (pl.program_id(0) == 0))
    def _():
        for ref in bias_results[1:]:  # of the batch
            ref[...] = jnp.zeros_like(ref)

    def process(index, row):
        bias = _load_bias(call, bias_refs, row)
        load = (lambda head: 0.0) if bias is None else bias.load

        def add_gradient(head, to_logits):
            if bias is not None:
                bias.add_gradient(bias_results, head, to_logits)

        gradients = attend_backward(
            call.layout,
            query_ref[0, index].T,
            key_ref[0],
            value_ref[0],
            gradient_ref[0, index].T,
            load,
            add_gradient,
        )
        to_query[0, index] = gradients[0].T.astype(to_query.dtype)
        sums[0] += gradients[1]
        sums[1] += gradients[2]

    _for_each_row(call, process)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        to_key[0] = sums[0].T.astype(to_key.dtype)
        to_value[0] = sums[1].T.astype(to_value.dtype)
