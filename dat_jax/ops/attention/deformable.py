"""Deformable attention: every query attends to N keys at positions that the network predicts from the image."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.attention import position_bias
from dat_jax.ops.attention.multi_head import attention_weights, multi_head_attention
from dat_jax.ops.calls import tunable
from dat_jax.ops.pallas import deformable as pallas_deformable
from dat_jax.ops.pallas import deformable_rows
from dat_jax.ops.triton import deformable as triton_deformable

FORMS = ("dat_pp", "cvpr2022")  # of deformable attention, see ``reference_points`` and ``key_positions``


def key_grid_shape(map_shape: tuple[int, int], *, kernel_size: int, stride: int) -> tuple[int, int]:
    """(Hk, Wk): shape of the key grid, the output of a convolution with padding kernel // 2 (0 if kernel == stride)."""
    padding = 0 if kernel_size == stride else kernel_size // 2
    height, width = ((size + 2 * padding - kernel_size) // stride + 1 for size in map_shape)
    return height, width


def reference_points(
    key_shape: tuple[int, ...], dtype=jnp.float32, *, form: str = "dat_pp", key_sizes: jax.Array | None = None
) -> jax.Array:
    """Positions of the keys before any offset: (Hk, Wk, 2), (y, x) in normalized coordinates.

    With ``key_sizes``, int (B, 2), the size of each example's key grid (see ``ops.sizes``), (B, Hk, Wk, 2).

    Key i of n is at

    * "dat_pp": (i + 0.5) / (n - 1) * 2 - 1. The grid is not symmetric, and its last key lies beyond 1. If there is only
      one key, where the published formula divides by zero, the key is at the center, 0.
    * "cvpr2022": (i + 0.5) / n * 2 - 1. The grid is symmetric and inside the map.
    """

    if key_sizes is not None:
        steps = jnp.maximum(_key_steps(key_sizes, form), 1).astype(dtype)[:, None, None]
        keys = jnp.stack(jnp.meshgrid(*(jnp.arange(count, dtype=dtype) for count in key_shape), indexing="ij"), axis=-1)
        points = (keys[None] + 0.5) / steps * 2 - 1
        return jnp.where((key_sizes == 1)[:, None, None], 0.0, points) if form == "dat_pp" else points

    def line(count):
        if form == "dat_pp" and count == 1:
            return jnp.zeros(1, dtype)
        return (jnp.arange(count, dtype=dtype) + 0.5) / max(_key_steps(count, form), 1) * 2 - 1

    return jnp.stack(jnp.meshgrid(*map(line, key_shape), indexing="ij"), axis=-1)


def _key_steps(count, form: str):
    """Divisor of a side of ``count`` keys: the number of steps between keys ("dat_pp") or of keys ("cvpr2022")."""
    if form not in FORMS:
        raise ValueError(f"Unknown form of deformable attention {form!r}; choose one of {', '.join(FORMS)}.")
    return count - 1 if form == "dat_pp" else count


def key_positions(
    offsets: jax.Array, *, range_factor: float, form: str = "dat_pp", key_sizes: jax.Array | None = None
) -> jax.Array:
    """Positions of the keys from the raw output of the offset network.

    With the offset range factor f, the number of keys n on a side (Hk for y, Wk for x) and the reference point r of
    ``reference_points``, a position is

    | form | f < 0 | f = 0 | f > 0 |
    |---|---|---|---|
    | "dat_pp" | clip(r + offset, -1, 1) | r | r + tanh(offset) * f / (n - 1) |
    | "cvpr2022" | tanh(r + offset) | r + offset | r + tanh(offset) * f / n |

    Args:
      offsets: (B, G, Hk, Wk, 2), (dy, dx). float32 or better.
      range_factor: f.
      form: "dat_pp", the form published with DAT++, or "cvpr2022", the form of DAT v1 as it was released.
      key_sizes: int (B, 2), the size of each example's key grid, see ``ops.sizes``; None for (Hk, Wk).

    Returns:
      (B, G, Hk, Wk, 2), (y, x) in normalized coordinates. Positions lie beyond [-1, 1] where they are not limited to it.

    Raises:
      ValueError: unknown form.

    Source: DAT (CVPR 2022), equation 6; DAT++ (2309.01430), section 3.2; the published code of each.
    """
    key_shape = offsets.shape[2:4]
    reference = reference_points(key_shape, offsets.dtype, form=form, key_sizes=key_sizes)
    reference = reference[None, None] if key_sizes is None else reference[:, None]
    if range_factor < 0:
        return jnp.clip(reference + offsets, -1.0, 1.0) if form == "dat_pp" else jnp.tanh(reference + offsets)
    if range_factor == 0 and form == "cvpr2022":
        return reference + offsets

    # The published code rounds 1 / (n - 1) to float32; doing the same keeps float64 comparisons exact.
    def round_step(count):
        return 1 / max(_key_steps(count, form), 1)

    if key_sizes is None:
        step = jnp.asarray([[round_step(n) for n in key_shape]], jnp.float32)
    else:
        step = jnp.asarray([round_step(n) for n in range(max(key_shape) + 1)], jnp.float32)[key_sizes]
    step = step.astype(offsets.dtype)
    return reference + jnp.tanh(offsets) * (step * range_factor).reshape(-1, 1, 1, 1, 2)


@tunable("deformable_attention", batched=("query", "key", "value", "points", "bias", "sizes", "key_mask"))
def deformable_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_heads: int,
    points: jax.Array | None = None,
    table: jax.Array | None = None,
    bias: jax.Array | None = None,
    points_inside: bool = False,
    query_grid: str = "corners",
    sizes: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    implementation: str = "auto",
    tile_shape: tuple[int, int] | None = None,
) -> jax.Array:
    """Attention of every pixel to the N sampled keys, with a position bias from a table or as an array.

    A large map is computed in tiles of queries, one after the other, and recomputed in the backward pass: only the logits and
    biases of one tile are in memory at a time. With ``bias`` the whole map is computed at once.

    Args:
      query: (B, H, W, C).
      key: (B, N, C), a projection of the features sampled at ``points``.
      value: (B, N, C), another projection of these features.
      num_heads: M; heads of a group are consecutive.
      points: (B, G, N, 2), key positions (y, x), needed with ``table``; in pixels of the map, or with ``query_grid`` "centers"
        in pixels of the map that the table was made for.
      table: (M, 2 * H0 - 1, 2 * W0 - 1) position bias table, see ``position_bias.table_position_bias``.
      bias: (B | 1, M, H * W, N), a bias of another kind.
      points_inside: whether all points are inside the map, which allows a faster Pallas kernel.
      query_grid: "corners" or "centers", see ``position_bias.table_position_bias``.
      sizes: int (B, 2), the size of each example's map, see ``ops.sizes``; None for (H, W).
      key_mask: bool (B, N), False for keys that no query attends to; None for all keys. There is no kernel with it.
      implementation: algorithm of the table lookup, or "pallas" or "triton", a kernel for TPUs or GPUs for the whole op. See
        ``dispatch``. With ``sizes`` or ``key_mask`` "auto" replaces the kernels.
      tile_shape: (height, width) of the tiles of queries; the map's shape for one tile. By default ``dispatch`` chooses. Kernels
        for TPUs have tiles of their own.

    Returns:
      (B, H, W, C), of the dtype of ``value``.

    Raises:
      ValueError: both a table and a bias are given, or a table without points.

    Source: DAT (CVPR 2022), equations 8 and 9.
    """
    _check_bias(points, table, bias)
    height, width = query.shape[1:3]
    map_shape = (height, width)
    kernel = functools.partial(
        choose_kernel,
        query.shape,
        query.dtype,
        key_shape=key.shape,
        points_shape=None if points is None else points.shape,
        table_shape=None if table is None else table.shape,
        bias_shape=None if bias is None else bias.shape,
        num_heads=num_heads,
        points_inside=points_inside,
        query_grid=query_grid,
    )
    chosen = _attention_implementation(implementation)
    if sizes is not None or key_mask is not None:
        chosen = {"pallas": "auto", "triton": "auto"}.get(chosen, chosen)
    chosen = dispatch.choose(
        "deformable_attention", chosen, map_shape=map_shape, kernel_fits=lambda: kernel() is not None
    )
    if chosen == "pallas":
        return _attend_with_pallas(
            query, key, value, points, table, bias, kernel(), num_heads, points_inside, query_grid
        )

    def attend(queries, tile):  # (B, tile height, tile width, C)
        if chosen == "triton":
            return triton_deformable.deformable_attention(
                *(queries, key, value),
                num_heads=num_heads,
                bias=bias,
                points=points,
                table=table,
                map_shape=map_shape,
                tile=tile,
                query_grid=query_grid,
            )
        tile_bias = bias
        if table is not None and points is not None:
            tile_bias = position_bias.table_position_bias(
                table,
                points,
                map_shape=map_shape,
                query_grid=query_grid,
                tile=tile,
                sizes=sizes,
                implementation=implementation,
            )
        if key_mask is not None:
            dtype = jnp.promote_types(query.dtype, jnp.float32)
            tile_bias = jnp.zeros((1, 1, 1, 1), dtype) if tile_bias is None else tile_bias
            tile_bias = jnp.where(key_mask[:, None, None], tile_bias, -jnp.inf)
        flat = queries.reshape(queries.shape[0], -1, queries.shape[-1])
        with dispatch.gradients_for(implementation):
            out = multi_head_attention(flat, key, value, num_heads=num_heads, bias=tile_bias)
        return out.reshape(queries.shape)

    if tile_shape is None:
        tile_shape = dispatch.choose_query_tile(map_shape, pairs_per_query=num_heads * key.shape[1])
    if bias is not None or tile_shape == map_shape:
        return attend(query, position_bias.Tile((0, 0), map_shape))
    return _map_tiles(attend, query, tile_shape)


def deformable_attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    num_heads: int,
    points: jax.Array | None = None,
    table: jax.Array | None = None,
    bias: jax.Array | None = None,
    query_grid: str = "corners",
) -> jax.Array:
    """Attention weights, for visualization. The whole map is computed at once.

    Args:
      query: (B, H, W, C).
      key: (B, N, C).
      num_heads: M.
      points: see ``deformable_attention``.
      table: see ``deformable_attention``.
      bias: see ``deformable_attention``.
      query_grid: see ``deformable_attention``.

    Returns:
      (B, M, H * W, N), float32 or better; the weights of a query sum to 1.

    Raises:
      ValueError: both a table and a bias are given, or a table without points.
    """
    _check_bias(points, table, bias)
    height, width = query.shape[1:3]
    if table is not None and points is not None:
        bias = position_bias.table_position_bias(table, points, map_shape=(height, width), query_grid=query_grid)
    flat = query.reshape(query.shape[0], -1, query.shape[-1])
    return attention_weights(flat, key, num_heads=num_heads, bias=bias)


def choose_kernel(
    shape: tuple[int, ...],
    dtype: Any,
    *,
    key_shape: tuple[int, ...],
    points_shape: tuple[int, ...] | None = None,
    table_shape: tuple[int, ...] | None = None,
    bias_shape: tuple[int, ...] | None = None,
    num_heads: int,
    points_inside: bool = False,
    query_grid: str = "corners",
) -> str | None:
    """The Pallas kernel for a call of ``deformable_attention``, with the shapes of its arrays.

    Args:
      shape: (B, H, W, C), the shape of the query.
      dtype: of the query.
      key_shape: (B, N, C).
      points_shape: (B, G, N, 2), or None.
      table_shape: (M, 2 * H0 - 1, 2 * W0 - 1), or None.
      bias_shape: (B | 1, M, H * W, N), or None.
      num_heads: M.
      points_inside: see ``deformable_attention``.
      query_grid: see ``deformable_attention``.

    Returns:
      "map", a whole map per grid step, or "rows", blocks of rows; None if neither fits in VMEM. Both look the bias up in the
      table, "map" only if the map has the size that the table was made for. Only "map" takes a bias as an array.
    """
    map_shape, keys = (shape[1], shape[2]), key_shape[1]
    options: dict[str, Any] = dict(keys=keys, num_heads=num_heads)
    lookup: dict[str, Any] = dict(points_shape=points_shape, table_shape=table_shape)
    grid: dict[str, Any] = dict(query_grid=query_grid, points_inside=points_inside)
    tile_shape = dispatch.choose_query_tile(map_shape, pairs_per_query=num_heads * keys)
    fits_map = bias_shape is not None or tile_shape == map_shape
    if table_shape is not None:
        fits_map &= points_inside and position_bias.table_fits(table_shape, map_shape=map_shape, query_grid=query_grid)
    if fits_map and pallas_deformable.fits(shape, dtype, **options, **lookup, with_bias=bias_shape is not None):
        return "map"
    if bias_shape is None and deformable_rows.fits(shape, dtype, **options, **lookup, **grid):
        return "rows"
    return None


def fits_kernel(shape: tuple[int, ...], dtype: Any, **options) -> bool:
    """Whether there is a Pallas kernel for a call; see ``choose_kernel``."""
    return choose_kernel(shape, dtype, **options) is not None


def _attend_with_pallas(query, key, value, points, table, bias, kernel, num_heads, points_inside, query_grid):
    arrays, lookup = (query, key, value), {} if table is None else dict(points=points, table=table)
    if kernel == "rows":
        grid = dict(query_grid=query_grid, points_inside=points_inside)
        return deformable_rows.deformable_attention(*arrays, num_heads=num_heads, **lookup, **grid)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (query.shape[0], *bias.shape[1:])).swapaxes(2, 3)
    return pallas_deformable.deformable_attention(*arrays, num_heads=num_heads, bias=bias, **lookup)


def _check_bias(points, table, bias):
    if table is not None and (bias is not None or points is None):
        raise ValueError("deformable_attention expected either a table with points, or a bias.")


def _attention_implementation(implementation):
    """Implementation of the attention: "auto" if the name is an algorithm of the table lookup."""
    return implementation if implementation in dispatch.IMPLEMENTATIONS["deformable_attention"] else "auto"


def _map_tiles(function, x, tile_shape):
    """Applies ``function(tile, Tile)`` to all tiles (B, h, w, C) of x (B, H, W, C), in turn; the backward pass recomputes."""
    batch, height, width, channels = x.shape
    counts = tuple(-(-size // side) for size, side in zip((height, width), tile_shape, strict=True))
    padding = tuple(count * side - size for count, side, size in zip(counts, tile_shape, (height, width), strict=True))
    tiles = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)))
    tiles = tiles.reshape(batch, counts[0], tile_shape[0], counts[1], tile_shape[1], channels)
    tiles = tiles.transpose(1, 3, 0, 2, 4, 5).reshape(math.prod(counts), batch, *tile_shape, channels)
    rows, columns = jnp.meshgrid(
        *(jnp.arange(n) * side for n, side in zip(counts, tile_shape, strict=True)), indexing="ij"
    )

    @jax.checkpoint
    def apply_to_tile(first, tile):
        return function(tile, position_bias.Tile(first, tile_shape))

    def step(_, item):
        return None, apply_to_tile(*item)

    _, out = lax.scan(step, None, ((rows.reshape(-1), columns.reshape(-1)), tiles))
    out = out.reshape(*counts, batch, *tile_shape, channels).transpose(2, 0, 3, 1, 4, 5)
    out = out.reshape(batch, counts[0] * tile_shape[0], counts[1] * tile_shape[1], channels)
    return out[:, :height, :width]
