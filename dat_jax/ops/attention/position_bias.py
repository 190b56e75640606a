"""Relative position bias between the pixels of a map and keys at real-valued positions.

The published model samples a table bilinearly at every (query, key) pair. Rows and columns separate, and for one key
the fractional part is the same for every query, so the exact bias needs no gather per pair:

* "slice": the bias of a key is one H x W window of the table, blended from four neighbours. Needs a table made for this
  map size.
* "matmul": two products with hat weights. Any map size, no gather or scatter in either direction.
* "gather", "map_coordinates": the pairwise lookup itself, as references.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch, recompute
from dat_jax.ops.attention import grid_sample as gs
from dat_jax.ops.layers import reduction

QUERY_GRIDS = ("corners", "centers")


class Tile(NamedTuple):
    """A part of a map: (row, column) of its first pixel, which may be traced, and (height, width)."""

    first: tuple[int | jax.Array, int | jax.Array]
    shape: tuple[int, int]


def table_position_bias(
    table: jax.Array,
    points: jax.Array,
    *,
    map_shape: tuple[int, int],
    tile: Tile | None = None,
    query_grid: str = "corners",
    implementation: str = "auto",
) -> jax.Array:
    """Bias of every (query, key) pair, from a table over relative displacements.

    In normalized coordinates the table is sampled at 0.5 * (query - key). For the query at row i and the key at row y this
    is the following row of the table, and columns follow the same formula:

    * "corners", the query at 2 i / (H - 1) - 1 and y in pixels of the map: (i - y) * (H0 - 1) / (H - 1) + (H0 - 1).
    * "centers", the query at (i + 0.5) / H * 2 - 1 and y in pixels of the H0 x W0 map that the table was made for:
      (i + 0.5) * (H0 - 1) / H - y + (H0 - 1). Queries are less than a row apart, so the fraction of a key differs from
      query to query and "slice" does not apply. It is replaced by "matmul".

    Args:
      table: (M, 2 * H0 - 1, 2 * W0 - 1), a map of H0 x W0 being the one the table was made for.
      points: (B, G, N, 2), key positions (y, x) in pixels; head h belongs to group h // (M / G).
      map_shape: (H, W), the queries being its pixels.
      tile: the part of the map whose queries are wanted; all of it unless given.
      query_grid: "corners", as published with DAT++, or "centers", as in DAT v1 as it was released.
      implementation: one of those above. See ``dispatch``.

    Returns:
      (B, M, H * W, N), float32 or better; H and W are those of the tile. Zero where a displacement lies outside the
      table.

    Raises:
      ValueError: heads are not a multiple of groups, "slice" is asked for on another map size, or the
        implementation is unknown.

    Source: DAT (CVPR 2022), section 3.2, "Offset generation", deformable relative position bias.
    """
    if points.ndim != 4 or points.shape[3] != 2:
        raise ValueError(f"table_position_bias wants points (B, G, N, 2), got {points.shape}.")
    if table.ndim != 3 or table.shape[0] % points.shape[1] or not all(side % 2 for side in table.shape[1:]):
        raise ValueError(
            f"table_position_bias wants a table (M, 2H - 1, 2W - 1) with M a multiple of {points.shape[1]} groups, "
            f"got {table.shape}."
        )
    if query_grid not in QUERY_GRIDS:
        raise ValueError(f"Unknown query grid {query_grid!r}; choose one of {', '.join(QUERY_GRIDS)}.")
    tile = Tile((0, 0), map_shape) if tile is None else tile
    dtype = jnp.promote_types(points.dtype, jnp.float32)
    points, table = points.astype(dtype), table.astype(dtype)
    fits = table_fits(table, map_shape=map_shape, query_grid=query_grid)
    implementation = dispatch.choose("position_bias", implementation, map_shape=map_shape, table_fits=fits)
    if implementation == "slice" and query_grid == "centers":
        implementation = "matmul"
    if implementation == "slice":
        if not fits:
            raise ValueError(
                f'implementation="slice" wants a table of twice the map size minus one, got a table {table.shape[1:]} '
                f'for the map {map_shape}; "matmul" and "gather" take any size.'
            )
        return _bias_slice(table, points, jnp.asarray(tile.first, jnp.int32), map_shape, tile.shape)
    rows, columns = (_table_coordinates(points, table, map_shape, tile, query_grid, axis) for axis in (0, 1))
    if implementation == "matmul":
        return _bias_matmul(table, rows, columns)
    return _bias_pairwise(table, rows, columns, implementation)


def table_fits(table: jax.Array, *, map_shape: tuple[int, int], query_grid: str) -> bool:
    """Whether one step between queries of the map is one row or column of the table, as "slice" requires."""
    return query_grid == "corners" and table.shape[1:] == tuple(2 * size - 1 for size in map_shape)


def _table_coordinates(points, table, map_shape, tile: Tile, query_grid: str, axis: int) -> jax.Array:
    """Row (axis 0) or column (axis 1) of the table for every line of queries and every key: (B, G, N, size)."""
    size, center = map_shape[axis], (table.shape[1 + axis] - 1) // 2
    queries = tile.first[axis] + jnp.arange(tile.shape[axis], dtype=points.dtype).reshape(1, 1, 1, -1)
    if query_grid == "centers":
        return (queries + 0.5) * (center / size) - points[..., axis, None] + center
    scale = center / (size - 1) if size > 1 else 1.0  # a map of one pixel has one displacement: none
    return (queries - points[..., axis, None]) * scale + center


def _bias_pairwise(table, rows, columns, implementation):
    (batch, groups, keys, height), width, heads = rows.shape, columns.shape[-1], table.shape[0]
    pairs = jnp.stack(
        jnp.broadcast_arrays(rows[..., :, None], columns[..., None, :]), axis=-1
    )  # (B, G, N, H, W, 2): a point of the table for every pair
    pairs = jnp.moveaxis(pairs, 2, 4).reshape(batch, groups, height * width * keys, 2)
    features = jnp.broadcast_to(jnp.moveaxis(table, 0, -1)[None], (batch, *table.shape[1:], heads))
    bias = gs.grid_sample(features, pairs, implementation=implementation)  # (B, H * W * N, M)
    return jnp.moveaxis(bias, -1, 1).reshape(batch, heads, height * width, keys)


def _bias_matmul(table, rows, columns):
    (batch, groups, keys, height), width, heads = rows.shape, columns.shape[-1], table.shape[0]
    rows, columns = gs.linear_weights(rows, table.shape[1]), gs.linear_weights(columns, table.shape[2])
    grouped = table.reshape(groups, heads // groups, *table.shape[1:])
    lines = jnp.einsum("bgnit,gmtu->bgmniu", rows, grouped, precision=lax.Precision.HIGHEST)
    bias = jnp.einsum("bgmniu,bgnju->bgmijn", lines, columns, precision=lax.Precision.HIGHEST)
    return bias.reshape(batch, heads, height * width, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _bias_slice(table, points, first_query, map_shape, tile_shape):
    (batch, _, keys, _), (height, width) = points.shape, tile_shape
    start, fraction = _corners(points, first_query, map_shape)
    windows = _cut_windows(_pad_table(table, points.shape[1], map_shape), start, tile_shape, keys_axis=-1)
    fraction_y, fraction_x = (fraction[..., axis][:, :, None, None, None, :] for axis in (0, 1))
    windows = windows[..., :-1, :, :] * (1 - fraction_y) + windows[..., 1:, :, :] * fraction_y
    windows = windows[..., :-1, :] * (1 - fraction_x) + windows[..., 1:, :] * fraction_x
    return windows.reshape(batch, table.shape[0], height * width, keys)


def _pad_table(table, groups, map_shape):
    """(M, 2H - 1, 2W - 1) -> (G, M / G, ., .), with zeros, so that the window of a key far outside the map is one of zeros."""
    padded = jnp.pad(table, ((0, 0), *((size + 1, size + 1) for size in map_shape)))
    return padded.reshape(groups, -1, *padded.shape[1:])


def _corners(points, first_query, map_shape):
    """Of every key: the first entry of its window of the padded table, int32, and its fraction; each (B, G, N, 2)."""
    shape = jnp.asarray(map_shape, points.dtype).reshape(1, 1, 1, 2)
    first = shape - 1 - points  # table row and column of query (0, 0)
    lower = jnp.floor(first)
    start = (jnp.clip(lower, -shape - 1, 2 * shape - 1) + shape + 1).astype(jnp.int32)
    return start + first_query.reshape(1, 1, 1, 2), first - lower


def _cut_windows(padded, start, tile_shape, *, keys_axis):
    """(G, M / G, ., .), (B, G, N, 2) -> (B, G, M / G, H + 1, W + 1), with the N keys at ``keys_axis`` of the last four."""
    height, width = tile_shape

    def window(group_table, corner):
        size = (group_table.shape[0], height + 1, width + 1)
        return lax.dynamic_slice(group_table, (jnp.zeros_like(corner[0]), corner[0], corner[1]), size)

    over_keys = jax.vmap(window, in_axes=(None, 0), out_axes=keys_axis)
    return jax.vmap(jax.vmap(over_keys), in_axes=(None, 0))(padded, start)


def _add_windows(padded_shape, start, windows):
    """The transpose of ``_cut_windows``: (B, G, N, M / G, H + 1, W + 1) added up, to (G, M / G, ., .).

    One after the other: 1.4 ms for 392 windows of 2 x 57 x 57, where XLA's scatter takes 8.2 (CPU).
    """
    groups = padded_shape[0]
    start, windows = (x.swapaxes(1, 2).reshape(-1, groups, *x.shape[3:]) for x in (start, windows))

    def add(index, total):
        for group in range(groups):
            row, column = start[index, group]
            corner, window = (jnp.full_like(row, group), jnp.zeros_like(row), row, column), windows[index, group][None]
            old = lax.dynamic_slice(total, corner, window.shape)
            total = lax.dynamic_update_slice(total, old + window, corner)
        return total

    return lax.fori_loop(0, len(windows), add, jnp.zeros(padded_shape, windows.dtype))


def _bias_slice_forward(table, points, first_query, map_shape, tile_shape):
    return _bias_slice(table, points, first_query, map_shape, tile_shape), (table, points, first_query)


def _bias_slice_backward(map_shape, tile_shape, residuals, gradient):
    """With the keys first, so that rows of queries are contiguous: only the gradient itself is transposed."""
    table, points, first_query = recompute.barrier(residuals)
    (batch, groups, keys, _), (height, width) = points.shape, tile_shape
    start, fraction = _corners(points, first_query, map_shape)
    gradient = gradient.reshape(batch, groups, -1, height, width, keys)
    gradient = jnp.moveaxis(gradient, -1, 2)  # (B, G, N, M / G, H, W)
    padded = _pad_table(table, groups, map_shape)
    windows = _cut_windows(padded, start, tile_shape, keys_axis=0)

    y, x = (fraction[..., axis][..., None, None, None] for axis in (0, 1))
    (upper_left, upper_right), (lower_left, lower_right) = (
        (windows[..., row : row + height, :-1], windows[..., row : row + height, 1:]) for row in (0, 1)
    )

    def along(change):  # (B, G, N, M / G, H, W) -> (B, G, N)
        summed = reduction.sum_over_rows((gradient * change).reshape(-1, height, width))
        return summed.reshape(*points.shape[:3], -1).sum(axis=-1)

    to_y = along((1 - x) * (lower_left - upper_left) + x * (lower_right - upper_right))
    to_x = along((1 - y) * (upper_right - upper_left) + y * (lower_right - lower_left))

    around = jnp.pad(gradient, ((0, 0),) * 4 + ((1, 1), (1, 1)))
    upper, lower = around[..., 1:, :], around[..., :-1, :]
    rows = (1 - y) * upper + y * lower
    to_windows = (1 - x) * rows[..., 1:] + x * rows[..., :-1]
    if dispatch.batch_split()[0] is None:
        to_table = _add_windows(padded.shape, start, to_windows)
    else:  # the loop would gather every device's windows for every device
        cut = functools.partial(_cut_windows, start=start, tile_shape=tile_shape, keys_axis=0)
        (to_table,) = jax.linear_transpose(cut, padded)(to_windows)
    inside = (slice(None), *(slice(size + 1, 3 * size) for size in map_shape))
    return to_table.reshape(table.shape[0], *to_table.shape[2:])[inside], -jnp.stack([to_y, to_x], axis=-1), None


_bias_slice.defvjp(_bias_slice_forward, _bias_slice_backward)


def table_position_bias_by_key(
    table: jax.Array, points: jax.Array, *, map_shape: tuple[int, int], tile: Tile, query_grid: str = "corners"
) -> jax.Array:
    """``table_position_bias`` with "matmul", laid out for the kernels of TPUs: (B, M, N, H * W), queries last."""
    dtype = jnp.promote_types(points.dtype, jnp.float32)
    points, table = points.astype(dtype), table.astype(dtype)
    (batch, groups, keys, _), (height, width) = points.shape, tile.shape
    rows, columns = (
        gs.linear_weights(_table_coordinates(points, table, map_shape, tile, query_grid, axis), table.shape[1 + axis])
        for axis in (0, 1)
    )
    grouped = table.reshape(groups, -1, *table.shape[1:])
    lines = jnp.einsum("bgnit,gmtu->bgmniu", rows, grouped, precision=lax.Precision.HIGHEST)
    bias = jnp.einsum("bgmniu,bgnju->bgmnij", lines, columns, precision=lax.Precision.HIGHEST)
    return bias.reshape(batch, table.shape[0], keys, height * width)


def log_displacements(points: jax.Array, *, map_shape: tuple[int, int]) -> jax.Array:
    """Log-spaced displacements of every (query, key) pair, the input of the log-CPB network.

    With d = 4 * (query - key) in normalised coordinates: sign(d) * log2(|d| + 1) / log2(8).

    Args:
      points: (B, G, N, 2), key positions in NORMALISED coordinates, (y, x).
      map_shape: (H, W) of the map of queries. A side of one pixel has its query at the centre, 0.

    Returns:
      (B, G, H * W, N, 2), float32 or better.

    Source: Swin Transformer V2, section 3.3, as applied by the published DAT++ code.
    """
    dtype = jnp.promote_types(points.dtype, jnp.float32)
    height, width = map_shape
    lines = [jnp.linspace(-1, 1, size, dtype=dtype) if size > 1 else jnp.zeros(1, dtype) for size in map_shape]
    queries = jnp.stack(jnp.meshgrid(*lines, indexing="ij"), axis=-1).reshape(1, 1, height * width, 1, 2)
    displacement = 4 * (queries - points.astype(dtype)[:, :, None])
    return jnp.sign(displacement) * jnp.log2(jnp.abs(displacement) + 1) / 3
