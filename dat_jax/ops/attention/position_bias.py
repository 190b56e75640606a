"""Relative position bias between the pixels of a map and keys at real-valued positions.

The published model samples a table bilinearly at every (query, key) pair. Rows and columns separate, and for one key the
fractional part is the same for every query, so the exact bias needs no gather per pair. Implementations:

* "slice": the bias of a key is one H x W window of the table, blended from four neighbors. Requires a table made for this map
  size (for CPUs).
* "matmul": two products with hat weights. Any map size, no gather or scatter in either direction.
* "gather", "map_coordinates": the lookup per pair, as references.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.attention.grid_sample import grid_sample, linear_weights
from dat_jax.ops.cpu import position_bias as cpu_position_bias

QUERY_GRIDS = ("corners", "centers")


class Tile(NamedTuple):
    """A rectangle of a map.

    Attributes:
      first: (row, column) of its first pixel; may be traced.
      shape: (height, width).
    """

    first: tuple[int | jax.Array, int | jax.Array]
    shape: tuple[int, int]


def table_position_bias(
    table: jax.Array,
    points: jax.Array,
    *,
    map_shape: tuple[int, int],
    tile: Tile | None = None,
    query_grid: str = "corners",
    sizes: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Bias of every (query, key) pair, from a table over relative displacements.

    In normalized coordinates the table is sampled at 0.5 * (query - key). For the query at row i and the key at row y this is the
    following row of the table, and columns follow the same formula:

    * "corners", with the query at 2 i / (H - 1) - 1 and y in pixels of the map: (i - y) * (H0 - 1) / (H - 1) + (H0 - 1).
    * "centers", with the query at (i + 0.5) / H * 2 - 1 and y in pixels of the H0 x W0 map that the table was made for:
      (i + 0.5) * (H0 - 1) / H - y + (H0 - 1). Queries are less than a row apart, so the fraction of a key differs from query to
      query and "slice" does not apply: "matmul" replaces it.

    Args:
      table: (M, 2 * H0 - 1, 2 * W0 - 1), made for a map of H0 x W0.
      points: (B, G, N, 2), key positions (y, x) in pixels; head h belongs to group h // (M / G).
      map_shape: (H, W) of the map, whose pixels are the queries.
      tile: the part of the map to compute; by default all of it.
      query_grid: "corners", as published with DAT++, or "centers", as in the released DAT v1.
      sizes: int (B, 2), the size (H, W) of each example's map, see ``ops.sizes``; None for ``map_shape``. "matmul" replaces
        "slice".
      implementation: see the module's docstring and ``dispatch``.

    Returns:
      (B, M, H * W, N), float32 or better; H and W are those of the tile. Zero where a displacement is outside the
      table.

    Raises:
      ValueError: M is not a multiple of G, "slice" is requested for a table made for another map size, or the query grid or
        the implementation is unknown.

    Source: DAT (CVPR 2022), section 3.2, "Offset generation", deformable relative position bias.
    """
    if points.ndim != 4 or points.shape[3] != 2:
        raise ValueError(f"table_position_bias expected points (B, G, N, 2), got {points.shape}.")
    if table.ndim != 3 or table.shape[0] % points.shape[1] or not all(side % 2 for side in table.shape[1:]):
        raise ValueError(
            f"table_position_bias expected a table (M, 2H - 1, 2W - 1) with M a multiple of {points.shape[1]} groups, "
            f"got {table.shape}."
        )
    if query_grid not in QUERY_GRIDS:
        raise ValueError(f"Unknown query grid {query_grid!r}; choose one of {', '.join(QUERY_GRIDS)}.")
    tile = Tile((0, 0), map_shape) if tile is None else tile
    dtype = jnp.promote_types(points.dtype, jnp.float32)
    points, table = points.astype(dtype), table.astype(dtype)
    fits = sizes is None and table_fits(table.shape, map_shape=map_shape, query_grid=query_grid)
    implementation = dispatch.choose("position_bias", implementation, map_shape=map_shape, table_fits=fits)
    if implementation == "slice" and (query_grid == "centers" or sizes is not None):
        implementation = "matmul"
    if implementation == "slice":
        if not fits:
            raise ValueError(
                f'implementation="slice" expected a table of twice the map size minus one, got a table {table.shape[1:]} '
                f'for the map {map_shape}; "matmul" and "gather" accept any size.'
            )
        return cpu_position_bias.table_position_bias(
            table, points, jnp.asarray(tile.first, jnp.int32), map_shape, tile.shape
        )
    rows, columns = (_table_coordinates(points, table, map_shape, tile, query_grid, axis, sizes) for axis in (0, 1))
    if implementation == "matmul":
        return _bias_matmul(table, rows, columns)
    return _bias_pairwise(table, rows, columns, implementation)


def table_fits(table_shape: tuple[int, ...], *, map_shape: tuple[int, ...], query_grid: str) -> bool:
    """Whether one step between queries of the map is one row or column of the table, as "slice" requires."""
    return query_grid == "corners" and table_shape[1:] == tuple(2 * size - 1 for size in map_shape)


def _table_coordinates(
    points, table, map_shape, tile: Tile, query_grid: str, axis: int, sizes: jax.Array | None = None
) -> jax.Array:
    """Row (axis 0) or column (axis 1) of the table for every key and every line of queries: (B, G, N, size)."""
    size, center = map_shape[axis], (table.shape[1 + axis] - 1) // 2
    queries = tile.first[axis] + jnp.arange(tile.shape[axis], dtype=points.dtype).reshape(1, 1, 1, -1)
    if sizes is not None:
        size = sizes[:, axis].astype(points.dtype).reshape(-1, 1, 1, 1)
    if query_grid == "centers":
        return (queries + 0.5) * (center / size) - points[..., axis, None] + center
    if sizes is not None:
        scale = jnp.where(size > 1, center / jnp.maximum(size - 1, 1), 1.0)
        return (queries - points[..., axis, None]) * scale + center
    scale = center / (size - 1) if size > 1 else 1.0  # on a side of one pixel the only displacement is 0
    return (queries - points[..., axis, None]) * scale + center


def _bias_pairwise(table, rows, columns, implementation):
    (batch, groups, keys, height), width, heads = rows.shape, columns.shape[-1], table.shape[0]
    pairs = jnp.stack(
        jnp.broadcast_arrays(rows[..., :, None], columns[..., None, :]), axis=-1
    )  # (B, G, N, H, W, 2): the point of the table for every pair
    pairs = jnp.moveaxis(pairs, 2, 4).reshape(batch, groups, height * width * keys, 2)
    features = jnp.broadcast_to(jnp.moveaxis(table, 0, -1)[None], (batch, *table.shape[1:], heads))
    bias = grid_sample(features, pairs, implementation=implementation)  # (B, H * W * N, M)
    return jnp.moveaxis(bias, -1, 1).reshape(batch, heads, height * width, keys)


def _bias_matmul(table, rows, columns):
    (batch, groups, keys, height), width, heads = rows.shape, columns.shape[-1], table.shape[0]
    rows, columns = linear_weights(rows, table.shape[1]), linear_weights(columns, table.shape[2])
    grouped = table.reshape(groups, heads // groups, *table.shape[1:])
    lines = jnp.einsum("bgnit,gmtu->bgmniu", rows, grouped, precision=lax.Precision.HIGHEST)
    bias = jnp.einsum("bgmniu,bgnju->bgmijn", lines, columns, precision=lax.Precision.HIGHEST)
    return bias.reshape(batch, heads, height * width, keys)


def log_displacements(points: jax.Array, *, map_shape: tuple[int, int], sizes: jax.Array | None = None) -> jax.Array:
    """Log-spaced displacements of every (query, key) pair, the input of the log-CPB network.

    With d = 4 * (query - key) in normalized coordinates: sign(d) * log2(|d| + 1) / log2(8).

    Args:
      points: (B, G, N, 2), key positions (y, x) in NORMALIZED coordinates.
      map_shape: (H, W) of the map of queries. On a side of one pixel the query is at the center, 0.
      sizes: int (B, 2), the size of each example's map, see ``ops.sizes``; None for ``map_shape``.

    Returns:
      (B, G, H * W, N, 2), float32 or better.

    Source: Swin Transformer V2 (2111.09883), section 3.3, as applied by the published DAT++ code.
    """
    dtype = jnp.promote_types(points.dtype, jnp.float32)
    height, width = map_shape
    if sizes is None:
        lines = [jnp.linspace(-1, 1, size, dtype=dtype) if size > 1 else jnp.zeros(1, dtype) for size in map_shape]
        grid = jnp.stack(jnp.meshgrid(*lines, indexing="ij"), axis=-1)[None]
    else:
        steps = jnp.maximum(sizes - 1, 1).astype(dtype)
        pixels = jnp.stack(jnp.meshgrid(*(jnp.arange(side, dtype=dtype) for side in map_shape), indexing="ij"), axis=-1)
        grid = 2 * pixels[None] / steps[:, None, None] - (sizes > 1).astype(dtype)[:, None, None]
    queries = grid.reshape(-1, 1, height * width, 1, 2)
    displacement = 4 * (queries - points.astype(dtype)[:, :, None])
    return jnp.sign(displacement) * jnp.log2(jnp.abs(displacement) + 1) / 3
