"""Pictures of what a model sees: python -m dat_jax.visualize TRAINED IMAGE... --output=DIR [--labels=FILE_OR_DIR]

A photograph; every image of a folder; a validation set beside its annotated classes:

  python -m dat_jax.visualize runs/quickstart_detection photo.jpg --output=seen
  python -m dat_jax.visualize runs/quickstart_segmentation photos/ --output=seen --overwrite
  python -m dat_jax.visualize runs/upernet images/validation --output=seen --labels=annotations/validation --zero_is_ignored

TRAINED and IMAGE are as of dat_jax.predict. Of a segmentor, DIR/<stem>.png shows the image, the classes over it, and the
probability of the likeliest class; with --labels also the annotated classes. Of a detector it shows the image, what is found
in it, and where every deformable block of the backbone samples it.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from dat_jax.command_line import check_outputs, fail, name_outputs, process, replacing, run_tool
from dat_jax.errors import UserError
from dat_jax.predict import IMAGE_FLAGS, define_flags, find_images, load_from_flags, read_image

if TYPE_CHECKING:  # they take long to import, so that is done where they are called
    from dat_jax.inference import ObjectDetector, Segmenter

_PANEL_WIDTH = 4.0  # inches


def find_labels(images: Sequence[pathlib.Path], place: pathlib.Path) -> list[pathlib.Path]:
    """The label file of every image: the file itself of a single one, else <stem>.png in a folder.

    Raises:
      UserError: one that is not there, or one file for several images.
    """
    if place.is_file() and len(images) > 1:
        raise UserError(f"--labels wants a folder where there are several images, got the file {place}.")
    files = [place / f"{image.stem}.png" for image in images] if place.is_dir() else [place]
    for file in files:
        if not file.is_file():
            raise UserError(f"There is no label file {file}.")
    return files


def read_labels(
    path: pathlib.Path, *, shape: tuple[int, int], classes: int, zero_is_ignored: bool = False
) -> np.ndarray:
    """A PNG of class indices -> uint8 (H, W), 255 for no class.

    Args:
      path: of the file.
      shape: (H, W) of the image, which it must have.
      classes: how many there are.
      zero_is_ignored: 0 in the file is no class and k + 1 is class k.

    Raises:
      UserError: a file that cannot be read, is of another kind or size, or holds a value that is no class.
    """
    from dat_jax.data.segmentation_sources import decode_label
    from dat_jax.evaluation.segmentation import IGNORED

    try:
        values = decode_label(path.read_bytes(), path=str(path))
    except OSError as error:
        raise UserError(f"The label file {path} cannot be read: {error.strerror}.") from error
    if values.shape != shape:
        sizes = "{} x {} pixels: wanted {} x {}".format(*values.shape, *shape)
        raise UserError(f"The label file {path} has {sizes}.")
    labels = np.where(values == IGNORED, values, values - np.uint8(1)) if zero_is_ignored else values
    wrong = values[(labels >= classes) & (labels != IGNORED)]
    if wrong.size:
        raise UserError(f"The label file {path} has the value {wrong.min()}, which is none of {classes} classes.")
    return labels


def save_segmentation(
    path: pathlib.Path, image: np.ndarray, *, segmenter: Segmenter, annotated: np.ndarray | None = None
) -> None:
    """Image, annotated classes where they are given, likeliest classes and their probabilities, side by side.

    Args:
      path: of the PNG file.
      image: uint8 (H, W, 3).
      segmenter: of ``inference.load``.
      annotated: uint8 (H, W), 255 for no class.

    Raises:
      UserError: the image is too small, or the file cannot be written.
    """
    from dat_jax import plots

    labels, probabilities = segmenter(image)
    title = f"probability, blue 0 to yellow 1, mean {probabilities.mean():.2f}"
    row = {
        "image": (image, None),
        **({} if annotated is None else {"labels": (image, annotated)}),
        "prediction": (image, labels),
        title: (plots.shade(probabilities), None),
    }
    with replacing(path) as unfinished:
        plots.save_segmentations(
            unfinished,
            [row],
            class_names=segmenter.class_names,
            palette=segmenter.palette,
            panel_width=_PANEL_WIDTH,
        )


def save_detection(path: pathlib.Path, image: np.ndarray, *, detector: ObjectDetector) -> None:
    """Image, detections, and the points that each deformable block samples, over the image as the network sees it.

    Args:
      path: of the PNG file.
      image: uint8 (H, W, 3).
      detector: of ``inference.load``.

    Raises:
      UserError: the file cannot be written.
    """
    from dat_jax import plots

    found, sampled = detector.choose_shown(detector(image)), detector.sample(image)
    with replacing(path) as unfinished:
        plots.save_detections_and_points(
            unfinished,
            image,
            found,
            seen=sampled["image"],
            positions=sampled["positions"],
            map_shapes=sampled["map_shapes"],
            class_names=detector.class_names,
            palette=detector.palette,
            panel_width=_PANEL_WIDTH,
        )


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """One call, and its mistakes as one sentence."""
    if len(argv) < 3 or not values.output:
        fail(f"Wanted: TRAINED IMAGE... --output=DIR [--labels=FILE_OR_DIR], got {' '.join(argv[1:]) or 'nothing'}.")
    from dat_jax.inference import ObjectDetector, Segmenter

    try:
        images = find_images(argv[2:])
        outputs = name_outputs(images, values.output)
        label_files = find_labels(images, pathlib.Path(values.labels)) if values.labels else []
        check_outputs(outputs, inputs=[*images, *label_files], overwrite=values.overwrite)
        looker = load_from_flags(argv[1], values)
        if label_files and not isinstance(looker, Segmenter):
            raise UserError(f"--labels wants a segmentor, and {argv[1]} is a detector.")
    except UserError as error:
        fail(str(error))
    options = dict(classes=len(looker.class_names), zero_is_ignored=values.zero_is_ignored)

    def handle(index):
        image, annotated = read_image(images[index]), None
        if isinstance(looker, ObjectDetector):
            return save_detection(outputs[index], image, detector=looker)
        if label_files:
            annotated = read_labels(label_files[index], shape=image.shape[:2], **options)
        return save_segmentation(outputs[index], image, segmenter=looker, annotated=annotated)

    if not process(images, handle):
        sys.exit(1)


def define_own_flags(values: flags.FlagValues) -> None:
    """All of this tool."""
    define_flags(values)
    flags.DEFINE_string(
        "labels", None, "Segmentors: PNGs of class indices, 255 for none, as the images are called.", flag_values=values
    )
    help_text = "Label files hold 0 for no class and k + 1 for class k, as ADE20K's."
    flags.DEFINE_bool("zero_is_ignored", False, help_text, flag_values=values)


_FLAGS = {"What is written": ("output=DIR", "overwrite"), **IMAGE_FLAGS}
_FLAGS["Segmentors"] += ("labels=FILE_OR_DIR", "zero_is_ignored")

if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_own_flags)
