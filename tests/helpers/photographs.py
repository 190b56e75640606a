"""Photographs that come with packages of the test environment, cropped and resized."""

import functools
import importlib.util
import pathlib

import numpy as np
from PIL import Image

_FILES = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)


def photograph_files() -> list[pathlib.Path]:
    """Return the contents of three JPEG files of 640 x 427, 640 x 427 and 512 x 600 pixels."""
    return [pathlib.Path(importlib.util.find_spec(package).origin).parent / path for package, path in _FILES]


@functools.cache
def photographs(*, width: int, height: int) -> list[np.ndarray]:
    """Return twenty crops of the photographs, of several places and sizes, resized to uint8 (height, width, 3)."""
    rng = np.random.default_rng(0)
    images = []
    for index in range(20):
        with Image.open(photograph_files()[index % 3]) as image:
            image = image.convert("RGB")
        w, h = (int(rng.integers(side // 2, side + 1)) for side in image.size)
        x, y = (int(rng.integers(side - part + 1)) for side, part in zip(image.size, (w, h), strict=True))
        images.append(np.asarray(image.crop((x, y, x + w, y + h)).resize((width, height))))
    return images
