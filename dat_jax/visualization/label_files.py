"""Annotated label maps on disk, for figures of segmentors."""

import pathlib
from collections.abc import Sequence

import numpy as np

from dat_jax.data.segmentation_sources import decode_label
from dat_jax.errors import UserError
from dat_jax.evaluation.segmentation import IGNORED


def find_label_files(images: Sequence[pathlib.Path], path: pathlib.Path) -> list[pathlib.Path]:
    """Label file of each image: <stem>.png in the folder ``path``, or ``path`` itself for a single image.

    Raises:
      UserError: a label file is missing, or ``path`` is a file and there are several images.
    """
    if path.is_file() and len(images) > 1:
        raise UserError(f"--labels must be a folder for several images, got the file {path}.")
    files = [path / f"{image.stem}.png" for image in images] if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise UserError(f"There is no label file {file}.")
    return files


def read_labels(
    path: pathlib.Path, *, shape: tuple[int, int], classes: int, zero_is_ignored: bool = False
) -> np.ndarray:
    """Read a PNG of class indices as uint8 (H, W); 255 means no class.

    Args:
      path: file to read.
      shape: (H, W) of the image, which the label map must have.
      classes: number of classes.
      zero_is_ignored: in the file, 0 means no class and k + 1 means class k.

    Raises:
      UserError: the file cannot be read, has another format or size, or contains a value that is not a class.
    """
    try:
        values = decode_label(path.read_bytes(), path=str(path))
    except OSError as error:
        raise UserError(f"The label file {path} cannot be read: {error.strerror}.") from error
    if values.shape != shape:
        raise UserError(
            "The label file {} must have the {} x {} pixels of its image, got {} x {}.".format(
                path, *shape, *values.shape
            )
        )
    labels = np.where(values == IGNORED, values, values - np.uint8(1)) if zero_is_ignored else values
    invalid = values[(labels >= classes) & (labels != IGNORED)]
    if invalid.size:
        raise UserError(f"The label file {path} contains {invalid.min()}, which is not one of {classes} classes.")
    return labels
