"""Plots of learning curves, predictions and sampled points from arrays, by matplotlib.

All figures are written as PNG files.
"""

import itertools
import pathlib
import re
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

_ACCURACIES = {
    "top-1 accuracy, %": ("train/top1", "eval/top1"),
    "pixel accuracy and mIoU, %": ("train/accuracy", "eval/aAcc", "eval/mIoU"),
}
_TITLE_LENGTH = 15  # characters above an image of ``save_predictions``
_LEGEND_LENGTH = 24  # characters of a class in a legend, which otherwise takes the space of the images
_DRAWN_INCHES = 6.4  # longer side of an image with detections, which fixes the sizes of text and lines


def save_figure(figure: Figure, path: pathlib.Path, *, dpi: int) -> None:
    """Save a figure as PNG. Characters that matplotlib's font lacks are drawn as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(path, dpi=dpi)


def save_curves(path: pathlib.Path, series: Mapping[str, Mapping[int, float]]) -> None:
    """Save curves of loss, accuracy and learning rate over the training steps.

    Args:
      path: PNG file to write.
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
    save_figure(figure, path, dpi=120)


def save_predictions(
    path: pathlib.Path,
    images: np.ndarray,
    *,
    labels: Sequence[int],
    predictions: Sequence[int],
    class_names: Sequence[str],
) -> None:
    """Save a grid of images with their predicted classes. Wrong predictions are red and followed by the label.

    Names that are wider than an image are shortened.

    Args:
      path: PNG file to write.
      images: uint8 (N, H, W, 3).
      labels: class indices, (N,).
      predictions: predicted class indices, (N,).
      class_names: names of the classes.
    """
    columns = 8
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * 1.2, rows * 1.45), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, label, prediction in zip(grid, images, labels, predictions, strict=False):
        correct = label == prediction
        title = class_names[prediction] if correct else f"{class_names[prediction]}, is {class_names[label]}"
        if len(title) > _TITLE_LENGTH:
            title = shorten(class_names[prediction], _TITLE_LENGTH)
            title += "" if correct else f"\nis {shorten(class_names[label], _TITLE_LENGTH - 3)}"
        axes.imshow(image)
        axes.set_title(title, color="black" if correct else "red", fontsize=9, parse_math=False)
    save_figure(figure, path, dpi=110)


def save_confusion(path: pathlib.Path, confusion: np.ndarray, *, class_names: Sequence[str]) -> None:
    """Save a confusion matrix whose colors are the fraction of the examples of each class.

    Names are drawn for at most 40 classes, numbers of examples for at most 15.

    Args:
      path: PNG file to write.
      confusion: number of examples of each class (rows) that were predicted as each class (columns), int (K, K).
      class_names: names of the K classes.
    """
    count = len(confusion)
    with_names, with_numbers = count <= 40, count <= 15
    side = 3.5 + 0.28 * count if with_names else 9
    fractions = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the examples of the class")
    axes.set(xlabel="prediction", ylabel="label")
    if with_names:
        names = [shorten(name, _LEGEND_LENGTH) for name in class_names]
        axes.set_xticks(range(count), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), names, fontsize=8, parse_math=False)
    if with_numbers:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                color = "white" if fractions[row, column] > 0.5 else "black"
                axes.text(column, row, f"{number}", ha="center", va="center", fontsize=8, color=color)
    save_figure(figure, path, dpi=110)


def shorten(name: str, length: int) -> str:
    """The name with an ellipsis in its middle if it has more than ``length`` characters."""
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


def save_sampled_points(
    path: pathlib.Path, images: np.ndarray, positions: Mapping[str, np.ndarray], *, map_shapes: Mapping[str, tuple]
) -> None:
    """Save the points that deformable attention samples: one row per image, one column per D block, one color per group.

    Args:
      path: PNG file to write.
      images: uint8 (N, H, W, 3).
      positions: block name -> key positions, (N, G, Hk, Wk, 2), as (y, x), where -1 and 1 are the centers of the first and
        last pixel of the block's feature map.
      map_shapes: block name -> (height, width) of its feature map, whose pixels tile the image.
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
    save_figure(figure, path, dpi=110)


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


def make_group_colors(count: int) -> list[str]:
    """Colors of ``count`` groups of heads as "#rrggbb": those of tab10 or tab20, and evenly spaced hues for more groups."""
    if count > 20:
        return [to_hex(color) for color in colormaps["hsv"](np.arange(count) / count)]
    colormap = colormaps["tab10" if count <= 10 else "tab20"]
    return [to_hex(colormap(index)) for index in range(count)]


def blend(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, *, opacity: float = 0.6) -> np.ndarray:
    """Blend an image with the colors of its classes. Pixels with the label 255 remain unchanged.

    Args:
      image: uint8 (H, W, 3).
      labels: class indices, integers (H, W).
      palette: colors of the K classes, uint8 (K, 3).
      opacity: opacity of the colors.

    Returns:
      uint8 (H, W, 3).
    """
    known = (labels != 255)[..., None]
    colors = palette[np.where(labels == 255, 0, labels)]
    return np.where(known, np.round((1 - opacity) * image + opacity * colors), image).astype(np.uint8)


def apply_colormap(values: np.ndarray) -> np.ndarray:
    """Colors of values from 0 (dark blue) to 1 (yellow) by viridis, uint8 (H, W, 3); values are float (H, W)."""
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
    """Save images blended with label maps, in rows of panels, and a legend of the classes that occur.

    Args:
      path: PNG file to write.
      rows: for each row, panel title -> (image, labels): uint8 (H, W, 3), and class indices, integers (H, W), or None to
        draw only the image.
      class_names: names of the K classes.
      palette: colors of the classes, uint8 (K, 3).
      max_classes: maximum number of classes in the legend, those with the most pixels.
      panel_width: width of a panel in inches of 130 pixels.
    """
    counts = np.zeros(len(class_names), int)
    for row in rows:
        for _, labels in row.values():
            if labels is not None:
                counts += np.bincount(labels[labels != 255].ravel(), minlength=len(counts))
    in_legend = [int(index) for index in np.argsort(-counts, kind="stable")[:max_classes] if counts[index]]
    columns = max(map(len, rows))
    height = sum(
        (panel_width - 0.1) * max(image.shape[0] / image.shape[1] for image, _ in row.values())
        + 0.13 * max(title.count("\n") for title in row)
        for row in rows
    )
    figure = Figure(
        figsize=(panel_width * columns + 1.8, max(height + 0.4, 0.19 * len(in_legend) + 0.6)), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for row, line in zip(rows, grid, strict=True):
        for (title, (image, labels)), axes in zip(row.items(), line, strict=False):
            axes.imshow(image if labels is None else blend(image, labels, palette))
            axes.set_title(title, fontsize=8)
    handles = [
        Patch(color=tuple((palette[index] / 255).tolist()), label=shorten(class_names[index], _LEGEND_LENGTH))
        for index in in_legend
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    save_figure(figure, path, dpi=130)


def draw_detections(
    axes: Axes,
    image: np.ndarray,
    detections: Mapping[str, np.ndarray],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    opacity: float = 0.5,
) -> None:
    """Draw an image with boxes, masks, class names and scores.

    Args:
      axes: axes to draw on.
      image: uint8 (H, W, 3).
      detections: "boxes", (n, 4), as x1, y1, x2, y2 in pixels, where pixel i covers [i, i + 1); "labels", integers (n,);
        optionally "scores", (n,), and "masks", bool (n, H, W).
      class_names: names of the K classes.
      palette: colors of the classes, uint8 (K, 3).
      opacity: opacity of the masks.
    """
    masks, scores = detections.get("masks"), detections.get("scores")
    pairs = [] if masks is None else zip(detections["labels"], masks, strict=True)
    for label, mask in pairs:
        blended = (1 - opacity) * image + opacity * palette[label]
        image = np.where(mask[..., None], np.round(blended), image).astype(np.uint8)
    axes.imshow(image)
    for index, (x1, y1, x2, y2) in enumerate(np.asarray(detections["boxes"], float) - 0.5):
        label = int(detections["labels"][index])
        color = palette[label] / 255
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.2))
        axes.text(
            x1,
            y1,
            class_names[label] if scores is None else f"{class_names[label]} {scores[index]:.2f}",
            fontsize=6,
            color="black" if color.mean() > 0.5 else "white",
            verticalalignment="top" if y1 < 0.03 * image.shape[0] else "bottom",  # inside the box at the upper border
            bbox=dict(facecolor=color, edgecolor="none", pad=1, alpha=0.8),
            clip_on=True,
            parse_math=False,
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
    """Save images with their detections or annotations, in rows of panels.

    Args:
      path: PNG file to write.
      examples: for each example, panel title -> (image, detections), see ``draw_detections``.
      class_names: names of the K classes.
      palette: colors of the classes, uint8 (K, 3).
      examples_per_row: number of examples per row of panels.
      panel_width: width of a panel in inches of 130 pixels.
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
        for (title, (image, detections)), axes in zip(row, line, strict=False):
            draw_detections(axes, image, detections, class_names=class_names, palette=palette)
            axes.set_title(title, fontsize=8)
    save_figure(figure, path, dpi=130)


def save_drawn_image(
    path: pathlib.Path,
    image: np.ndarray,
    detections: Mapping[str, np.ndarray],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    min_side: int = 640,
) -> None:
    """Save an image with its detections, without a margin.

    Args:
      path: PNG file to write.
      image: uint8 (H, W, 3).
      detections: see ``draw_detections``.
      class_names: names of the K classes.
      palette: colors of the classes, uint8 (K, 3).
      min_side: minimum length of the longer side in pixels. A smaller image is enlarged by an integer factor.
    """
    longer_side = max(image.shape[:2])
    factor = -(-min_side // longer_side)
    height, width = (factor * side for side in image.shape[:2])
    dpi = factor * longer_side / _DRAWN_INCHES
    # matplotlib rounds the numbers of pixels down, hence the 0.5.
    figure = Figure(figsize=((width + 0.5) / dpi, (height + 0.5) / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_detections(axes, image, detections, class_names=class_names, palette=palette)
    axes.set_aspect("auto")
    save_figure(figure, path, dpi=dpi)


def save_detections_and_points(
    path: pathlib.Path,
    image: np.ndarray,
    detections: Mapping[str, np.ndarray],
    *,
    network_input: np.ndarray,
    positions: Mapping[str, np.ndarray],
    map_shapes: Mapping[str, tuple[int, int]],
    class_names: Sequence[str],
    palette: np.ndarray,
    columns: int = 4,
    panel_width: float = 4.0,
) -> None:
    """Save an image, its detections, and the points that every deformable block samples, in rows of panels.

    Args:
      path: PNG file to write.
      image: uint8 (H, W, 3).
      detections: see ``draw_detections``.
      network_input: resized and padded image, uint8 (Hp, Wp, 3).
      positions: see ``save_sampled_points``, without the first axis.
      map_shapes: see ``save_sampled_points``.
      class_names: names of the K classes.
      palette: colors of the classes, uint8 (K, 3).
      columns: number of panels per row.
      panel_width: width of a panel in inches of 130 pixels.
    """
    blocks = _sort_blocks(positions)
    rows = -(-(2 + len(blocks)) // columns)
    height = panel_width * max(x.shape[0] / x.shape[1] for x in (image, network_input)) + 0.3
    figure = Figure(figsize=(panel_width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    grid[0].imshow(image)
    draw_detections(grid[1], image, detections, class_names=class_names, palette=palette)
    for axes, name in zip(grid[2:], blocks, strict=False):
        _draw_points(axes, network_input, positions[name], map_shapes[name])
    for axes, title in itertools.zip_longest(grid, ["image", "detections", *blocks]):
        axes.set_title(title or "", fontsize=8)
        axes.axis("off")
    save_figure(figure, path, dpi=130)
