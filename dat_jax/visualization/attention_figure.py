"""Figure of the sampled points and the most important keys of a classifier for one image."""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dat_jax.inference.attention import BlockAttention, ImageAttention
from dat_jax.visualization.charts import make_group_colors, save_figure

_COLUMNS = 5
_DPI = 110
_PANEL_WIDTH = 2.6  # inches
_HEADING_HEIGHT = 0.45  # inches
_MAX_POINT_SIZE = 90.0  # square points, the unit of matplotlib's scatter
_OUTLINE = "#202020"


def save_attention(
    path: pathlib.Path,
    attention: ImageAttention,
    *,
    query: tuple[float, float],
    blocks: Sequence[str],
    max_keys: int = 16,
) -> None:
    """Save a figure of the sampled points of all D blocks, and of the most important keys and the offsets of some blocks.

    Args:
      path: PNG file to write.
      attention: attention of a classifier to an image.
      query: (y, x) in pixels of ``attention.image``.
      blocks: names of the blocks whose most important keys for the query are drawn, for D blocks also their offsets. Panels
        of a D block also show the window of the N blocks of the same stage.
      max_keys: maximum number of keys per block, over all groups.
    """
    image, blocks_by_name = attention.image, attention.blocks
    deformable = [block for block in blocks_by_name.values() if block.kind == "D"]
    with_keys = [blocks_by_name[name] for name in blocks]
    with_offsets = [block for block in with_keys if block.kind == "D"]
    name, probability = next(iter(attention.ranking.items()))
    sections = {
        "Sampled points, one color per group of heads, sized by the attention that they receive from all queries": [
            (f"{name}: {probability:.1%}", lambda axes: _draw_query(axes, image, query)),
            *((block.name, lambda axes, b=block: _draw_received(axes, image, b)) for block in deformable),
        ],
        f"Most important keys of the query (star), at most {max_keys} per block; dashed: window of the stage's N blocks": [
            (
                _describe(block, query, max_keys),
                lambda axes, b=block: _draw_keys(axes, image, b, blocks_by_name, query, max_keys),
            )
            for block in with_keys
        ],
        "Offsets, from reference point to sampled position": [
            (block.name, lambda axes, b=block: _draw_offsets(axes, image, b)) for block in with_offsets
        ],
    }
    _save(path, {title: panels for title, panels in sections.items() if panels}, shape=image.shape)


def _save(path, sections, *, shape):
    lines = {title: -(-len(panels) // _COLUMNS) for title, panels in sections.items()}
    panel_height = _PANEL_WIDTH * shape[0] / shape[1] + 0.2
    heights = [count * panel_height + _HEADING_HEIGHT for count in lines.values()]
    figure = Figure(figsize=(_PANEL_WIDTH * _COLUMNS, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False).ravel()
    for part, (title, panels) in zip(parts, sections.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=11)
        grid = part.subplots(lines[title], _COLUMNS, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, (heading, draw) in zip(grid, panels, strict=False):
            draw(axes)
            axes.set_title(heading, fontsize=9, parse_math=False)
            # Points outside the image are clipped.
            axes.set(xlim=(0, shape[1]), ylim=(shape[0], 0))
    save_figure(figure, path, dpi=_DPI)


def _draw_image(axes, image, *, opacity=1.0):
    extent = (0, image.shape[1], image.shape[0], 0)  # pixel i covers [i, i + 1)
    axes.imshow(image, alpha=opacity, extent=extent)


def _draw_star(axes, y, x):
    axes.scatter(x, y, marker="*", s=150, color="#ffd500", edgecolors="black", linewidths=0.8, zorder=5)


def _draw_query(axes, image, query):
    _draw_image(axes, image)
    _draw_star(axes, *query)


def _draw_received(axes, image, block):
    _draw_image(axes, image, opacity=0.6)
    received = block.received
    max_size = _MAX_POINT_SIZE * min(1.0, 400 / received.size)
    sizes = np.maximum(max_size * received / received.max(), 1.0)
    for points, size, color in zip(block.positions, sizes, make_group_colors(block.groups), strict=True):
        axes.scatter(points[:, 1], points[:, 0], s=size, color=color, alpha=0.8, linewidths=0)


def _describe(block: BlockAttention, query, max_keys):
    group, _, weights = block.rank_keys(block.find_query(query), max_keys)
    share = weights.sum() / block.groups
    return f"{block.name}: {len(group)} keys hold {share:.0%}"


def _draw_keys(axes, image, block, blocks_by_name, query, max_keys):
    _draw_image(axes, image, opacity=0.6)
    cell = block.find_query(query)
    keys, colors = block.find_keys(cell), make_group_colors(block.groups)
    for points in keys:
        axes.scatter(points[:, 1], points[:, 0], s=2, color=_OUTLINE, linewidths=0, alpha=0.6)
    group, key, weights = block.rank_keys(cell, max_keys)
    points = keys[group, key]
    sizes = 1.3 * _MAX_POINT_SIZE * weights / weights.max()
    axes.scatter(
        points[:, 1],
        points[:, 0],
        s=np.maximum(sizes, 6),
        c=[colors[index] for index in group],
        alpha=0.85,
        edgecolors="white",
        linewidths=0.7,
        zorder=4,
    )
    stage = block.name.split("/")[0] + "/"
    neighborhood = [b for b in blocks_by_name.values() if b.kind == "N" and b.name.startswith(stage)]
    if neighborhood:
        top, left, bottom, right = neighborhood[0].find_window(cell)
        for style, color in (("-", _OUTLINE), ("--", "white")):
            box = functools.partial(Rectangle, fill=False, edgecolor=color, linewidth=1.6, linestyle=style, zorder=3)
            axes.add_patch(box((left, top), right - left, bottom - top))
    center = (np.array(cell) + 0.5) * block.cell
    _draw_star(axes, *center)


def _draw_offsets(axes, image, block):
    _draw_image(axes, image, opacity=0.6)
    references = block.references
    axes.scatter(references[:, 1], references[:, 0], s=4, color=_OUTLINE, linewidths=0, zorder=3)
    for points, color in zip(block.positions, make_group_colors(block.groups), strict=True):
        y, x = (points - references).T
        axes.quiver(
            *references[:, ::-1].T,
            *(x, y),
            color=color,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.006,
            headwidth=4,
            headlength=4,
            alpha=0.8,
        )
