"""Pictures from arrays: learning curves, predictions, sampled points. Needs numpy and matplotlib only."""

import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

_ACCURACIES = {
    "top-1 accuracy, %": ("train/top1", "eval/top1"),
    "accuracy of pixels and mIoU, %": ("train/accuracy", "eval/aAcc", "eval/mIoU"),
}
_INCHES = 6.4  # of the longer side of a drawn image


def save_curves(path: pathlib.Path, series: Mapping[str, Mapping[int, float]]) -> None:
    """Loss, accuracy and learning rate against the step.

    Args:
      path: of the PNG file.
      series: metric name ("train/loss", "eval/top1", ...) -> {step: value}.
    """
    accuracy = next(
        (title for title, names in _ACCURACIES.items() if set(names) & set(series)), next(iter(_ACCURACIES))
    )
    panels = {
        "loss": ("train/loss", "eval/loss"),
        accuracy: _ACCURACIES[accuracy],
        "learning rate": ("train/learning_rate",),
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = sorted(series.get(name, {}).items())
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if name.startswith("eval") else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def save_predictions(
    path: pathlib.Path,
    images: np.ndarray,
    *,
    labels: Sequence[int],
    predictions: Sequence[int],
    class_names: Sequence[str],
) -> None:
    """A grid of images with what was predicted; mistakes in red, with the label.

    Args:
      path: of the PNG file.
      images: uint8 (N, H, W, 3).
      labels, predictions: class indices, (N,).
    """
    columns = 8
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * 1.2, rows * 1.45), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, label, prediction in zip(grid, images, labels, predictions, strict=False):
        right = label == prediction
        title = class_names[prediction] if right else f"{class_names[prediction]}, is {class_names[label]}"
        axes.imshow(image)
        axes.set_title(title, color="black" if right else "red", fontsize=9)
    figure.savefig(path, dpi=110)


def save_sampled_points(
    path: pathlib.Path, images: np.ndarray, positions: Mapping[str, np.ndarray], *, map_shapes: Mapping[str, tuple]
) -> None:
    """Where deformable attention looks: a row an image, a column a D block, one colour a group of heads.

    Args:
      path: of the PNG file.
      images: uint8 (N, H, W, 3).
      positions: block name -> (N, G, Hk, Wk, 2), (y, x), -1 and 1 the centres of the first and last pixel of the block's
        map.
      map_shapes: block name -> (height, width) of that map. Its pixels are drawn as cells that tile the image.
    """
    blocks = _sort_blocks(positions)
    figure = Figure(figsize=(1.9 * (len(blocks) + 1), 2.0 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), len(blocks) + 1, squeeze=False)
    for row, image in zip(grid, images, strict=True):
        row[0].imshow(image)
    for column, name in enumerate(blocks, start=1):
        grid[0][column].set_title(name, fontsize=8)
        for index, image in enumerate(images):
            _draw_points(grid[index][column], image, positions[name][index], map_shapes[name])
    for axes in grid.ravel():
        axes.axis("off")
    figure.savefig(path, dpi=110)


def _sort_blocks(names):
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _draw_points(axes, image, points, map_shape):
    axes.imshow(image, alpha=0.6)
    size = np.clip(4000 / points[..., 0].size, 1, 9)
    for group, group_points in enumerate(points):
        pixels = (group_points.reshape(-1, 2) + 1) / 2 * (np.array(map_shape) - 1)
        y, x = ((pixels + 0.5) / np.array(map_shape) * np.array(image.shape[:2]) - 0.5).T
        axes.scatter(x, y, s=size, color=f"C{group}", alpha=0.9)
    axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))


def make_group_colours(count: int) -> list[str]:
    """ "#rrggbb" of groups of heads: matplotlib's ten, and more where these do not do."""
    colours = colormaps["tab10" if count <= 10 else "tab20"].colors
    if count > len(colours):
        colours = colormaps["hsv"](np.arange(count) / count)
    return [to_hex(colour) for colour in colours[:count]]


def blend(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, *, opacity: float = 0.6) -> np.ndarray:
    """An image with the colours of its classes over it, both uint8 (H, W, 3); where the label is 255 the image alone.

    Args:
      image: uint8 (H, W, 3).
      labels: integers (H, W).
      palette: uint8 (K, 3).
      opacity: of the colours.
    """
    known = (labels != 255)[..., None]
    colours = palette[np.where(labels == 255, 0, labels)]
    return np.where(known, np.round((1 - opacity) * image + opacity * colours), image).astype(np.uint8)


def shade(values: np.ndarray) -> np.ndarray:
    """Numbers from 0, dark blue, to 1, yellow, as colours (viridis): float (H, W) -> uint8 (H, W, 3)."""
    return colormaps["viridis"](values, bytes=True)[..., :3]


def save_segmentations(
    path: pathlib.Path,
    rows: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray | None]]],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    max_classes: int = 24,
    panel_width: float = 2.7,
) -> None:
    """Images with label maps over them, a row an image, and a legend of the classes that are in them.

    Args:
      path: of the PNG file.
      rows: for each, panel title -> (image uint8 (H, W, 3), labels integers (H, W) or None for the image alone).
      class_names: of the K classes.
      palette: uint8 (K, 3).
      max_classes: in the legend, those with the most pixels.
      panel_width: of a panel, inches of 130 pixels.
    """
    counts = np.zeros(len(class_names), int)
    for row in rows:
        for _, labels in row.values():
            if labels is not None:
                counts += np.bincount(labels[labels != 255].ravel(), minlength=len(counts))
    shown = [index for index in np.argsort(-counts, kind="stable")[:max_classes] if counts[index]]
    columns = max(map(len, rows))
    height = sum(
        (panel_width - 0.1) * max(image.shape[0] / image.shape[1] for image, _ in row.values()) for row in rows
    )
    figure = Figure(
        figsize=(panel_width * columns + 1.8, max(height + 0.4, 0.19 * len(shown) + 0.6)), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for row, line in zip(rows, grid, strict=True):
        for (title, (image, labels)), axes in zip(row.items(), line, strict=False):
            axes.imshow(image if labels is None else blend(image, labels, palette))
            axes.set_title(title, fontsize=8)
    handles = [Patch(color=palette[index] / 255, label=class_names[index]) for index in shown]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def draw_detections(
    axes,
    image: np.ndarray,
    found: Mapping[str, np.ndarray],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    opacity: float = 0.5,
) -> None:
    """An image with boxes, masks, and names with scores over it.

    Args:
      axes: of matplotlib.
      image: uint8 (H, W, 3).
      found: "boxes", (n, 4), x1, y1, x2, y2 in pixels, pixel i covering [i, i + 1); "labels", integers (n,); where there are
        any, "scores", (n,), and "masks", bool (n, H, W).
      class_names, palette: of the K classes, uint8 (K, 3).
      opacity: of the masks.
    """
    masks, scores = found.get("masks"), found.get("scores")
    for index in range(len(found["boxes"]) if masks is not None else 0):
        coloured = (1 - opacity) * image + opacity * palette[found["labels"][index]]
        image = np.where(masks[index][..., None], np.round(coloured), image).astype(np.uint8)
    axes.imshow(image)
    for index, (x1, y1, x2, y2) in enumerate(np.asarray(found["boxes"], float) - 0.5):
        label = int(found["labels"][index])
        colour = palette[label] / 255
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.2))
        name = class_names[label] if scores is None else f"{class_names[label]} {scores[index]:.2f}"
        ink = "black" if colour.mean() > 0.5 else "white"
        box = dict(facecolor=colour, edgecolor="none", pad=1, alpha=0.8)
        place = "top" if y1 < 0.03 * image.shape[0] else "bottom"  # within the box where there is no room above it
        axes.text(
            x1, y1, name, fontsize=6, color=ink, verticalalignment=place, bbox=box, clip_on=True, parse_math=False
        )


def save_detections(
    path: pathlib.Path,
    examples: Sequence[Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]]],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    examples_per_row: int = 2,
    panel_width: float = 2.4,
) -> None:
    """Images with what is found in them.

    Args:
      path: of the PNG file.
      examples: of each, panel title -> (image, what is found), see ``draw_detections``.
      class_names, palette: of the K classes, uint8 (K, 3).
      examples_per_row: whose panels stand side by side.
      panel_width: of a panel, inches of 130 pixels.
    """
    rows = [
        [panel for example in examples[start : start + examples_per_row] for panel in example.items()]
        for start in range(0, len(examples), examples_per_row)
    ]
    columns = max(map(len, rows))
    height = sum(panel_width * max(image.shape[0] / image.shape[1] for _, (image, _) in row) + 0.2 for row in rows)
    figure = Figure(figsize=(panel_width * columns, height), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for row, line in zip(rows, grid, strict=True):
        for (title, (image, found)), axes in zip(row, line, strict=False):
            draw_detections(axes, image, found, class_names=class_names, palette=palette)
            axes.set_title(title, fontsize=8)
    figure.savefig(path, dpi=130)


def save_drawn_image(
    path: pathlib.Path,
    image: np.ndarray,
    found: Mapping[str, np.ndarray],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    min_side: int = 640,
) -> None:
    """An image with what is found in it, and nothing around it.

    Args:
      path: of the PNG file.
      image: uint8 (H, W, 3).
      found, class_names, palette: see ``draw_detections``.
      min_side: pixels that the longer side of the picture has at least: a smaller image is enlarged a whole number of times.
    """
    longest = max(image.shape[:2])
    factor = -(-min_side // longest)
    height, width = (factor * side for side in image.shape[:2])
    dpi = factor * longest / _INCHES  # letters and lines of one size in every picture
    # Pixels are cut to whole ones.
    figure = Figure(figsize=((width + 0.5) / dpi, (height + 0.5) / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_detections(axes, image, found, class_names=class_names, palette=palette)
    axes.set_aspect("auto")
    figure.savefig(path, dpi=dpi)


def save_detections_and_points(
    path: pathlib.Path,
    image: np.ndarray,
    found: Mapping[str, np.ndarray],
    *,
    seen: np.ndarray,
    positions: Mapping[str, np.ndarray],
    map_shapes: Mapping[str, tuple[int, int]],
    class_names: Sequence[str],
    palette: np.ndarray,
    columns: int = 4,
    panel_width: float = 4.0,
) -> None:
    """An image, what is found in it, and where every deformable block looks, in lines of panels.

    Args:
      path: of the PNG file.
      image: uint8 (H, W, 3).
      found, class_names, palette: see ``draw_detections``.
      seen: uint8 (Hp, Wp, 3), the image that the network sees.
      positions, map_shapes: see ``save_sampled_points``, without the first axis.
      columns: panels in a line.
      panel_width: of a panel, inches of 130 pixels.
    """
    blocks = _sort_blocks(positions)
    lines = -(-(2 + len(blocks)) // columns)
    height = panel_width * max(x.shape[0] / x.shape[1] for x in (image, seen)) + 0.3
    figure = Figure(figsize=(panel_width * columns, height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    grid[0].imshow(image)
    draw_detections(grid[1], image, found, class_names=class_names, palette=palette)
    for axes, name in zip(grid[2:], blocks, strict=False):
        _draw_points(axes, seen, positions[name], map_shapes[name])
    for axes, title in itertools.zip_longest(grid, ["image", "detections", *blocks]):
        axes.set_title(title or "", fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=130)
