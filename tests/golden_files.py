"""Reads the recorded arrays of tests/golden."""

import json
import pathlib

import numpy as np

DIRECTORY = pathlib.Path(__file__).parent / "golden"


class Golden:
    """A recorded file: its arrays, the configuration, the weights and the images (channels-last)."""

    def __init__(self, name: str, dtype):
        with np.load(DIRECTORY / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
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


def channels_last(array: np.ndarray) -> np.ndarray:
    """(B, C, H, W) -> (B, H, W, C)."""
    return np.moveaxis(array, 1, -1)


def relative_error(got, wanted) -> float:
    """Largest difference over the largest wanted magnitude."""
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())
