"""Image files on disk: finding, reading and numbering them."""

import io
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dat_jax.data.image_files import is_image
from dat_jax.data.images import decode_image
from dat_jax.errors import UserError


def find_images(names: Sequence[str]) -> list[pathlib.Path]:
    """Find image files.

    Args:
      names: files, folders, whose images are returned in the order of their names, or "-" for names on stdin, one per line.

    Raises:
      UserError: a file is missing, or there is no image in a folder or on stdin.
    """
    images = []
    for name in names:
        path = pathlib.Path(name)
        if name == "-":
            files = find_images([line for line in sys.stdin.read().splitlines() if line not in ("", "-")])
        elif path.is_dir():
            files = sorted(file for file in path.iterdir() if is_image(file.name) and file.is_file())
        elif path.is_file():
            files = [path]
        else:
            raise UserError(f"There is no image or folder {path}.")
        if not files:
            raise UserError(f"There is no image in {'stdin' if name == '-' else path}.")
        images += files
    return images


def read_image(path: pathlib.Path) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3), RGB. Orientation tags are not applied.

    Raises:
      UserError: the file cannot be read or decoded, or has more than 8 bits per channel.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror}.") from error
    pixels = decode_image(data, name=str(path))
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith(("I", "F")):  # decoding clips larger values
            raise UserError(f"The image {path} has more than 8 bits per channel; expected an 8-bit image.")
    return pixels


def numbers_are_names(images: Sequence[pathlib.Path]) -> bool:
    """Whether every file name is a different number, as in COCO."""
    numbers = {int(path.stem) for path in images if path.stem.isdecimal()}
    return len(numbers) == len(images)


def number_images(images: Sequence[pathlib.Path]) -> list[int]:
    """Image ids: the numbers in the file names, as in COCO, if every name is a different number; otherwise 1, 2, 3, ..."""
    if numbers_are_names(images):
        return [int(path.stem) for path in images]
    return list(range(1, len(images) + 1))
