"""Draw the figures of docs/attention.md with the ops: python -m experiments.attention_pictures.draw [--output=docs]

Offsets and tables are made up. No network is trained.
"""

import argparse
import pathlib

import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dat_jax.ops.attention import deformable as deformable_attention
from dat_jax.ops.attention import grid_sample, neighborhood_tiles, position_bias

_COLORS = ("tab:orange", "tab:blue")


def make_figure(panels: int, *, height: float = 3.2) -> tuple[Figure, list]:
    """A row of square panels without axes."""
    figure = Figure(figsize=(3.2 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.title.set_fontsize(9)
    return figure, axes


def make_offsets(shape: tuple[int, int]) -> np.ndarray:
    """Normalized offsets (2 groups, Hk, Wk, 2), (dy, dx): one group moves to a point, the other rotates about the center."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    to_a_point = 0.5 * np.stack([-0.3 - rows, 0.2 - columns], axis=-1)
    around = 0.25 * np.stack([columns, -rows], axis=-1)
    return np.stack([to_a_point, around]).astype(np.float32)


def draw_offsets() -> Figure:
    """Draw the reference points and the keys of two groups."""
    map_shape = (28, 28)
    key_shape = deformable_attention.key_grid_shape(map_shape, kernel_size=7, stride=4)
    offsets = make_offsets(key_shape)[None]
    reference, keys = (
        np.asarray(
            grid_sample.to_pixels(deformable_attention.key_positions(jnp.asarray(deltas), range_factor=-1), map_shape)
        )[0]
        for deltas in (np.zeros_like(offsets), offsets)
    )
    figure, axes = make_figure(3)
    titles = (f"reference points, {key_shape[0]} x {key_shape[1]}", "keys of group 1", "keys of group 2")
    for index, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        axis.set(xlim=(-1, 28), ylim=(28, -1), aspect="equal", title=title)
        axis.add_patch(Rectangle((0, 0), 27, 27, fill=False, color="0.7"))
        start = reference[0].reshape(-1, 2)
        axis.plot(start[:, 1], start[:, 0], "o", color="0.6", markersize=4)
        if index:
            end, color = keys[index - 1].reshape(-1, 2), _COLORS[index - 1]
            for (y, x), (to_y, to_x) in zip(start, end, strict=True):
                axis.plot([x, to_x], [y, to_y], color=color, linewidth=0.6)
            axis.plot(end[:, 1], end[:, 0], "o", color=color, markersize=4)
    return figure


def draw_hats() -> Figure:
    """Draw the weights of a point between pixels: a hat over rows times a hat over columns."""
    size, (y, x) = 7, (2.3, 4.6)
    rows, columns = (np.asarray(grid_sample.linear_weights(jnp.float32(at), size)) for at in (y, x))
    # Get the op's weights by sampling maps with a single bright pixel.
    bright = jnp.eye(size * size, dtype=jnp.float32).reshape(1, size, size, size * size)
    sampled = grid_sample.grid_sample(bright, jnp.asarray([[[[y, x]]]], jnp.float32), implementation="plain")
    weights = np.asarray(sampled).reshape(size, size)
    if not np.allclose(weights, np.outer(rows, columns), atol=1e-6):
        raise AssertionError("The product of the hats is not what the op samples.")
    figure, axes = make_figure(2)
    line = np.linspace(0, size - 1, 400)
    for at, name, color in ((y, "rows, y = 2.3", _COLORS[0]), (x, "columns, x = 4.6", _COLORS[1])):
        hat = np.maximum(0, 1 - np.abs(line - at))
        axes[0].plot(line, hat, color=color, label=name)
        axes[0].plot(np.arange(size), np.maximum(0, 1 - np.abs(np.arange(size) - at)), "o", color=color)
    axes[0].set(title="hat(i - y) at the pixels", xticks=range(size), ylim=(-0.05, 1.35))
    axes[0].legend(loc="upper center", ncols=2, fontsize=8)
    axes[1].imshow(weights, cmap="Greys", vmin=0, vmax=1)
    axes[1].plot(x, y, "x", color="tab:red")
    for i, j in np.argwhere(weights > 1e-6):
        color = "white" if weights[i, j] > 0.5 else "black"
        axes[1].text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes[1].set_title("their product: the weights of the map")
    return figure


def draw_bias() -> Figure:
    """Draw the bias of one key over all queries: a window of the table, shifted by the position of the key."""
    side, (y, x) = 14, (3.4, 9.7)
    axis = np.arange(2 * side - 1) - (side - 1)
    table = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 30) + 0.25 * np.cos(axis[:, None] / 2) * np.cos(axis / 3)
    points = jnp.asarray([[[[y, x]]]], jnp.float32)
    options = dict(map_shape=(side, side))
    table_array = jnp.asarray(table[None], jnp.float32)
    plain = position_bias.table_position_bias(table_array, points, **options, implementation="gather")
    sliced = position_bias.table_position_bias(table_array, points, **options, implementation="slice")
    if not np.allclose(plain, sliced, atol=1e-5):
        raise AssertionError("The slice is not the lookup.")
    figure, axes = make_figure(2)
    limits = dict(vmin=table.min(), vmax=table.max())
    axes[0].imshow(table, **limits)
    axes[0].add_patch(
        Rectangle((side - 1 - x - 0.5, side - 1 - y - 0.5), side, side, fill=False, color="red", linewidth=2)
    )
    axes[0].set_title("table, 27 x 27, and the window of a key")
    axes[1].imshow(np.asarray(sliced).reshape(side, side), **limits)
    axes[1].plot(x, y, "x", color="red")
    axes[1].set_title("bias of that key for 14 x 14 queries")
    return figure


def draw_tiles() -> Figure:
    """Draw windows, which move inward at the border, and the halo of keys that contains all windows of a tile."""
    size, kernel, tile = 21, 7, 7
    starts = neighborhood_tiles.window_starts(size, kernel)
    first, index = neighborhood_tiles.tile_line(size, tile, kernel)
    figure, axes = make_figure(3)
    for axis in axes[:2]:
        axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
        axis.set_xticks(np.arange(size) - 0.5, labels=[])
        axis.set_yticks(np.arange(size) - 0.5, labels=[])
        axis.grid(color="0.9", linewidth=0.5)
        axis.tick_params(length=0)
    for (i, j), color in (((1, 2), _COLORS[0]), ((12, 14), _COLORS[1])):
        axes[0].add_patch(Rectangle((starts[j] - 0.5, starts[i] - 0.5), kernel, kernel, color=color, alpha=0.35))
        axes[0].plot(j, i, "o", color=color)
    axes[0].set_title("windows of two queries, 7 x 7")
    halo = index.shape[-1]
    axes[1].add_patch(Rectangle((first[1] - 0.5, first[1] - 0.5), halo, halo, color=_COLORS[1], alpha=0.25))
    axes[1].add_patch(Rectangle((tile - 0.5, tile - 0.5), tile, tile, color=_COLORS[1], alpha=0.7))
    axes[1].set_title(f"a tile of 7 x 7 queries, its halo of {halo} x {halo} keys")
    axes[2].imshow(index[1] >= 0, cmap="Greys", aspect="equal")
    axes[2].set(title="one axis: which key is in which window", xlabel=f"{halo} keys", ylabel=f"{tile} queries")
    return figure


FIGURES = {
    "attention_offsets": draw_offsets,
    "attention_hats": draw_hats,
    "attention_bias": draw_bias,
    "attention_tiles": draw_tiles,
}


def main(arguments: list[str] | None = None) -> None:
    """Write a PNG file for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs"), help="folder for the figures")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw().savefig(output / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main()
