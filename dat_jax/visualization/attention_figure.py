"""The figure of sampled points and important keys, for one image. Needs numpy and matplotlib only."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dat_jax.inference.attention import BlockAttention, ImageAttention
from dat_jax.visualization.charts import make_group_colours

_COLUMNS = 5
_PANEL = 2.6  # inches of 110 pixels
_HEADING = 0.45  # inches
_LARGEST = 90.0  # of a point, in square points, as matplotlib has it
_OUTLINE = "#202020"


def save_attention(
    path: pathlib.Path,
    attention: ImageAttention,
    *,
    query: tuple[float, float],
    blocks: Sequence[str],
    max_keys: int = 16,
) -> None:
    """Sampled points of every D block, then of some blocks the keys that one query attends to most, and the offsets.

    Args:
      path: of the PNG file.
      attention: of the image.
      query: (y, x) in pixels of ``attention.image``.
      blocks: names of those that are shown with the query's keys and, D blocks, with their offsets. A D block has the window
        of its stage's N blocks beside.
      max_keys: the most important ones over all groups.
    """
    image, found = attention.image, attention.blocks
    deformable = [block for block in found.values() if block.kind == "D"]
    chosen = [found[name] for name in blocks]
    moved = [block for block in chosen if block.kind == "D"]
    name, probability = next(iter(attention.ranking.items()))
    sections = {
        "Sampled points, a colour a group of heads, sized by the attention that they get from all queries": [
            (f"{name}: {probability:.1%}", lambda axes: _draw_query(axes, image, query)),
            *((block.name, lambda axes, b=block: _draw_received(axes, image, b)) for block in deformable),
        ],
        f"Most important keys of the query (star), at most {max_keys} of a block; dashed: the window of the stage's N blocks": [
            (
                _describe(block, query, max_keys),
                lambda axes, b=block: _draw_keys(axes, image, b, found, query, max_keys),
            )
            for block in chosen
        ],
        "Offsets, from reference point to sampled position": [
            (block.name, lambda axes, b=block: _draw_offsets(axes, image, b)) for block in moved
        ],
    }
    _save(path, {title: panels for title, panels in sections.items() if panels}, shape=image.shape)


def _save(path, sections, *, shape):
    lines = {title: -(-len(panels) // _COLUMNS) for title, panels in sections.items()}
    panel_height = _PANEL * shape[0] / shape[1] + 0.2
    heights = [count * panel_height + _HEADING for count in lines.values()]
    figure = Figure(figsize=(_PANEL * _COLUMNS, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False).ravel()
    for part, (title, panels) in zip(parts, sections.items(), strict=True):
        part.suptitle(title, x=0.01, ha="left", fontsize=11)
        grid = part.subplots(lines[title], _COLUMNS, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, (heading, draw) in zip(grid, panels, strict=False):
            draw(axes)
            axes.set_title(heading, fontsize=9, parse_math=False)
            # A line around it and no ticks; points beyond the image are cut off.
            axes.set(xlim=(0, shape[1]), ylim=(shape[0], 0))
    figure.savefig(path, dpi=110)


def _show(axes, image, *, opacity=1.0):
    extent = (0, image.shape[1], image.shape[0], 0)  # pixel i covers [i, i + 1)
    axes.imshow(image, alpha=opacity, extent=extent)


def _draw_star(axes, y, x):
    axes.scatter(x, y, marker="*", s=150, color="#ffd500", edgecolors="black", linewidths=0.8, zorder=5)


def _draw_query(axes, image, query):
    _show(axes, image)
    _draw_star(axes, *query)


def _draw_received(axes, image, block):
    _show(axes, image, opacity=0.6)
    received = block.received
    largest = _LARGEST * min(1.0, 400 / received.size)
    sizes = np.maximum(largest * received / received.max(), 1.0)
    for points, size, colour in zip(block.positions, sizes, make_group_colours(block.groups), strict=True):
        axes.scatter(points[:, 1], points[:, 0], s=size, color=colour, alpha=0.8, linewidths=0)


def _describe(block: BlockAttention, query, max_keys):
    group, _, weights = block.rank_keys(block.find_query(query), max_keys)
    held = weights.sum() / block.groups
    return f"{block.name}: {len(group)} keys hold {held:.0%}"


def _draw_keys(axes, image, block, found, query, max_keys):
    _show(axes, image, opacity=0.6)
    cell = block.find_query(query)
    keys, colours = block.find_keys(cell), make_group_colours(block.groups)
    for points in keys:
        axes.scatter(points[:, 1], points[:, 0], s=2, color=_OUTLINE, linewidths=0, alpha=0.6)
    group, key, weights = block.rank_keys(cell, max_keys)
    points = keys[group, key]
    sizes = 1.3 * _LARGEST * weights / weights.max()
    axes.scatter(
        points[:, 1],
        points[:, 0],
        s=np.maximum(sizes, 6),
        c=[colours[index] for index in group],
        alpha=0.85,
        edgecolors="white",
        linewidths=0.7,
        zorder=4,
    )
    stage = block.name.split("/")[0] + "/"
    window = next((b.find_window(cell) for b in found.values() if b.kind == "N" and b.name.startswith(stage)), None)
    if window is not None:
        top, left, bottom, right = window
        for style, colour in (("-", _OUTLINE), ("--", "white")):
            box = dict(fill=False, edgecolor=colour, linewidth=1.6, linestyle=style, zorder=3)
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, **box))
    centre = (np.array(cell) + 0.5) * block.cell
    _draw_star(axes, *centre)


def _draw_offsets(axes, image, block):
    _show(axes, image, opacity=0.6)
    references = block.references
    axes.scatter(references[:, 1], references[:, 0], s=4, color=_OUTLINE, linewidths=0, zorder=3)
    for points, colour in zip(block.positions, make_group_colours(block.groups), strict=True):
        y, x = (points - references).T
        axes.quiver(
            *references[:, ::-1].T,
            *(x, y),
            color=colour,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.006,
            headwidth=4,
            headlength=4,
            alpha=0.8,
        )
