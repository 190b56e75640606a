"""Readers of the recorded arrays in tests/golden."""

import functools
import gzip
import json
import math
import pathlib

import numpy as np

DIRECTORY = pathlib.Path(__file__).parents[1] / "golden"


class Golden:
    """A recorded file: its arrays, the configuration, the weights and the images (channels-last)."""

    def __init__(self, name: str, dtype):
        self.arrays = read(name)
        for key in [key for key in self.arrays if key.endswith("gradnorm")]:  # by name, as JSON text
            norms = json.loads(str(self.arrays.pop(key)))
            self.arrays |= {f"{key}.{name}": np.float64(norm) for name, norm in norms.items()}
        self.config = json.loads(str(self.arrays["config"]))
        # Integer buffers stay as they are.
        self.state_dict = {
            key: value.astype(dtype) if value.dtype == np.float16 else value
            for key, value in self.group("param.").items()
        }
        if "images" in self.arrays:
            self.images = channels_last(self.arrays["images"].astype(dtype))

    def map_error(self, key: str, got) -> float:
        """Return the ``relative_error`` of a map (B, H, W, C), on every fourth row and column if only these are recorded."""
        if f"{key}_4" in self.arrays:
            return relative_error(got[:, ::4, ::4], channels_last(self.arrays[f"{key}_4"]))
        return relative_error(got, channels_last(self.arrays[key]))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the arrays whose key starts with a prefix, by the rest of the key."""
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}


def read(name: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by key, also of files written by ``tests.golden.pack``."""
    with np.load(DIRECTORY / f"{name}.npz" if isinstance(name, str) else name) as file:
        arrays = {key: file[key] for key in file.files}
    for dtype in ("float16", "float32"):
        if f"{dtype}.index" in arrays:
            shapes = json.loads(str(arrays.pop(f"{dtype}.index")))
            planes = [arrays.pop(f"{dtype}.byte{index}") for index in range(np.dtype(dtype).itemsize)]
            numbers = np.stack(planes, axis=-1).reshape(-1).view(dtype)
            parts = np.split(numbers, np.cumsum([math.prod(shape) for shape in shapes.values()]))
            arrays |= {key: part.reshape(shapes[key]) for key, part in zip(shapes, parts, strict=False)}
    return arrays


def read_keys(name: str) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Return the number of parameters of a published model, and its shapes by name. Names are HEAD_SIZE, as in semfpn_tiny."""
    recorded = json.loads(gzip.decompress((DIRECTORY / "keys.json.gz").read_bytes()))[name]
    return recorded["params_total"], {key: tuple(shape) for key, shape in recorded["shapes"].items()}


@functools.cache
def load(kind: str) -> tuple[dict[str, np.ndarray], dict, list[dict], dict[str, np.ndarray]]:
    """Load a recorded detector: retinanet, maskrcnn or cascade.

    Returns:
      arrays: by recorded name and as recorded, channels-first; images float16, M.gradnorm.NAME one by one.
      config: MMDetection's ``model`` mapping.
      img_metas: of both images, img_shape, pad_shape, ori_shape, scale_factor.
      state_dict: weights by published name in float64; counters of BatchNorm are integers.

    The result is shared by all callers: copy before changing it.
    """
    golden = Golden(f"{kind}_mini", np.float64)
    return golden.arrays, golden.config, json.loads(str(golden.arrays["img_metas"])), golden.state_dict


def channels_last(array: np.ndarray) -> np.ndarray:
    """Convert (B, C, H, W) to (B, H, W, C)."""
    return np.moveaxis(array, 1, -1)


def relative_error(got, wanted) -> float:
    """Return the largest difference divided by the largest expected magnitude."""
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())
