"""Image files on disk: finding, reading and numbering them."""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dat_jax.data.image_files import is_image, list_suffixes
from dat_jax.data.image_format import RGB, ImageFormat, decode
from dat_jax.errors import UserError, name_some
from dat_jax.storage import fetch


def check_image(image: Any, image_format: ImageFormat = RGB) -> np.ndarray:
    """Return an image as an array.

    Raises:
      UserError: it is not an array (H, W, C) of the format with at least one pixel, or has values that are not finite.
    """
    array = image if isinstance(image, np.ndarray) else np.asarray(image)
    channels, dtype = image_format.channels, image_format.dtype
    if array.dtype != dtype or array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise UserError(f"Expected an image as an array, {dtype} (H, W, {channels}), got {array.dtype} {array.shape}.")
    image_format.check(array, name="passed")
    return array


def find_images(names: Sequence[str], *, recursive: bool = False) -> list[pathlib.Path]:
    """Find image files.

    Args:
      names: files, folders, whose images are returned in the order of their names, or "-" for names on stdin, one per line.
      recursive: whether the folders in folders are read too.

    Raises:
      UserError: a file is missing, or there is no image in a folder or on stdin.
    """
    images = []
    for name in names:
        path = pathlib.Path(name) if os.path.exists(name) or name in ("", "-") else fetch(name)
        if name == "-":
            lines = sys.stdin.read().splitlines()
            files = find_images([line for line in lines if line not in ("", "-")], recursive=recursive)
        elif not name:
            raise UserError("The name of an image or folder is empty.")
        elif os.path.isdir(path):  # unlike pathlib's method, False for a name that the system refuses to look up
            files = _find_in_folder(path, recursive=recursive)
        elif os.path.isfile(path):
            files = [path]
        else:
            raise UserError(f"There is no image or folder {name}.")
        if not files:
            raise UserError("There is no image in stdin.")
        images += files
    return images


def _find_in_folder(path: pathlib.Path, *, recursive: bool) -> list[pathlib.Path]:
    entries = path.rglob("*") if recursive else path.iterdir()
    files = sorted(
        file
        for file in entries
        if is_image(file.name, arrays=True)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if files:
        return files
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    advice = (
        f" Its folders are not read: {name_some(folders)}. --recursive reads them." if folders and not recursive else ""
    )
    raise UserError(f"There is no image in {path}: expected files named {list_suffixes(arrays=True)}.{advice}")


def read_image(path: pathlib.Path, image_format: ImageFormat = RGB) -> np.ndarray:
    """Read an image file as an array (H, W, C) of a format, upright; see ``image_format.decode``.

    Raises:
      UserError: the file cannot be read or decoded, or has another format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror}.") from error
    return decode(data, name=str(path), image_format=image_format)


def numbers_are_names(images: Sequence[pathlib.Path]) -> bool:
    """Whether every file name is a different number, as in COCO."""
    numbers = {int(path.stem) for path in images if path.stem.isdecimal()}
    return len(numbers) == len(images)


def number_images(images: Sequence[pathlib.Path]) -> list[int]:
    """Image ids: the numbers in the file names, as in COCO, if every name is a different number; otherwise 1, 2, 3, ..."""
    if numbers_are_names(images):
        return [int(path.stem) for path in images]
    return list(range(1, len(images) + 1))
