"""A look at label maps before training, for mistakes that would otherwise train a useless model."""

import concurrent.futures
import logging
from typing import Any

import numpy as np

from dat_jax.data.image_files import DamagedFile
from dat_jax.data.segmentation_transforms import IGNORED
from dat_jax.data.sources import spread_indices, warn_if_turned
from dat_jax.errors import UserError, name_some

logger = logging.getLogger(__name__)
_MAX_MAPS = 500  # label maps to read per split, which takes seconds
_FEW_LABELED = 0.01  # fraction of pixels with a class, below which a warning is logged
_ADVICE = (
    f"Label files hold the index of the class, and {IGNORED} for pixels without a class. If yours hold other values, such as 0 "
    "and 255 for two classes, set config.data.label_values=0,255."
)


def check_labels(source: Any, *, split: str) -> None:
    """Count the pixels of each class, in at most 500 label maps spread over the source, and log what is unusual as a warning.

    Args:
      source: see ``data.segmentation_sources``. Sources without ``read_label``, which are not made of files, are not checked.
      split: "training" or "validation", for the messages.

    Raises:
      UserError: no map can be read, no pixel has a class, or all training maps were read and only one of several classes occurs.
    """
    if not hasattr(source, "read_label"):
        return
    indices = spread_indices(len(source), _MAX_MAPS)
    counts = count_pixels(source, indices)
    warn_if_turned(source, indices, split=split, annotations="label maps")
    maps = f"the {len(indices):,} {split} label maps" + (
        f" read of {len(source):,}" if len(indices) < len(source) else ""
    )
    names, labeled = source.class_names, counts[: len(source.class_names)]
    total = int(counts.sum())
    if not total:
        source.read_label(indices[0])  # raises the reason
    if not labeled.any():
        raise UserError(f"No pixel of {maps} has a class. {_ADVICE}")
    fraction = labeled.sum() / total
    if fraction < _FEW_LABELED:
        logger.warning("Only %.2g %% of the pixels in %s have a class. %s", 100 * fraction, maps, _ADVICE)
    missing = [name for name, count in zip(names, labeled, strict=True) if not count]
    complete = len(indices) == len(source)
    if len(missing) == len(names) - 1 > 0 and complete and split == "training":
        raise UserError(
            f"Only the class {names[int(labeled.argmax())]} occurs in {maps}, and {name_some(missing)} never: there is nothing "
            f"to learn. {100 * (1 - fraction):.1f} % of the pixels have no class. {_ADVICE}"
        )
    if missing and (complete or 2 * len(missing) > len(names)):
        logger.warning(
            "%d of %d classes do not occur in %s: %s. %.1f %% of the pixels have no class. %s",
            *(len(missing), len(names), maps, name_some(missing), 100 * (1 - fraction), _ADVICE),
        )


def count_pixels(source: Any, indices: list[int]) -> np.ndarray:
    """Count the pixels of each value in some label maps, int64 (256,). Damaged label files are left out."""

    def count(index: int) -> np.ndarray:
        try:
            return np.bincount(source.read_label(index).ravel(), minlength=256)
        except DamagedFile:
            return np.zeros(256, np.int64)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return sum(pool.map(count, indices), np.zeros(256, np.int64))
