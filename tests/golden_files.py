"""Reads the recorded arrays of tests/golden."""

import functools
import gzip
import json
import math
import pathlib

import numpy as np

DIRECTORY = pathlib.Path(__file__).parent / "golden"


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

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose key starts with the prefix, without it."""
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}


def read(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file by key; those of float16 are kept together, high bytes and low bytes apart, as that packs better."""
    with np.load(DIRECTORY / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    shapes = json.loads(str(arrays.pop("float16.index")))
    high, low = (arrays.pop(f"float16.{half}").astype(np.uint16) for half in ("high", "low"))
    parts = np.split((high << 8 | low).view(np.float16), np.cumsum([math.prod(shape) for shape in shapes.values()]))
    return arrays | {key: part.reshape(shapes[key]) for key, part in zip(shapes, parts, strict=False)}


def read_keys(name: str) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Of a published model, HEAD_SIZE such as semfpn_tiny: number of parameters, and shape of every entry by name."""
    recorded = json.loads(gzip.decompress((DIRECTORY / "keys.json.gz").read_bytes()))[name]
    return recorded["params_total"], {key: tuple(shape) for key, shape in recorded["shapes"].items()}


@functools.cache
def load(kind: str) -> tuple[dict[str, np.ndarray], dict, list[dict], dict[str, np.ndarray]]:
    """A recorded detector: retinanet, maskrcnn or cascade.

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
    """(B, C, H, W) -> (B, H, W, C)."""
    return np.moveaxis(array, 1, -1)


def relative_error(got, wanted) -> float:
    """Largest difference over the largest wanted magnitude."""
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())
