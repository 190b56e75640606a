"""Buckets: a few static shapes that hold images of all sizes, so that few programs are compiled.

Models take the true sizes of the images as an argument (``ops.sizes``), so the choice of buckets changes no result, only the
number of programs and the number of wasted pixels.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dat_jax.errors import UserError

Shape = tuple[int, int]  # (height, width) in pixels

MAX_WASTE = 0.12  # share of the pixels of all buckets that is not image
MAX_SIDE = 2**14  # pixels of a bucket
MULTIPLE = 32  # of the sides of the ladder, like the largest stride of the backbones
_LADDER_STEP = 1.25
# Images that follow each other in one of these orders share buckets.
_ORDERS: tuple[Callable[[Shape], tuple], ...] = (
    lambda shape: (shape[1] / shape[0], shape),
    lambda shape: (shape[0] * shape[1], shape),
    lambda shape: (shape[0], shape[1]),
    lambda shape: (shape[1], shape[0]),
)


def choose_buckets(shapes: Iterable[Shape], *, max_waste: float = MAX_WASTE, multiple: int = 1) -> list[Shape]:
    """Choose the fewest buckets for the sizes of a data set that waste at most this share of their pixels.

    The sizes are ordered in a few ways, such as by aspect ratio. For each order dynamic programming finds the best division into
    runs of 1, 2, ... buckets.

    Args:
      shapes: (height, width) of every image in pixels.
      max_waste: 1 minus the pixels of all images divided by the pixels of their buckets. Rounding to the multiple counts, so a
        small value may be impossible; then there is one bucket for each rounded size.
      multiple: the sides of buckets are multiples of it.

    Returns:
      The buckets, sorted.
    """
    shapes = list(shapes)
    if not shapes:
        return []
    counts = Counter(round_up(shape, multiple) for shape in shapes)
    pixels = sum(height * width for height, width in shapes)
    limit = pixels / (1 - max_waste)
    lines = [sorted(counts, key=order) for order in _ORDERS]
    costs = [_run_costs(line, counts) for line in lines]
    tables = [_Division(cost) for cost in costs]
    for count in range(1, len(counts) + 1):
        best = min(range(len(lines)), key=lambda k: tables[k].cost(count))
        if tables[best].cost(count) <= limit or count == len(counts):
            runs = tables[best].runs(count)
            return sorted({_hull(lines[best][start:stop]) for start, stop in runs})
    raise AssertionError


def find_bucket(shape: Shape, buckets: Sequence[Shape]) -> Shape:
    """Return the smallest bucket that holds an image.

    Raises:
      UserError: none does.
    """
    fitting = [bucket for bucket in buckets if bucket[0] >= shape[0] and bucket[1] >= shape[1]]
    if not fitting:
        listed = ", ".join(f"{height}x{width}" for height, width in buckets)
        raise UserError(f"No bucket holds an image of {shape[0]} x {shape[1]} pixels. The buckets are {listed}.")
    return min(fitting, key=math.prod)


def ladder_bucket(shape: Shape, *, multiple: int = MULTIPLE) -> Shape:
    """Return a bucket for an image when the sizes of the others are not known: sides of a geometric ladder.

    Each side of the ladder is a quarter longer than the one before it, so a side is at most a quarter too long.
    """

    def step(side: int) -> int:
        rung = multiple
        while rung < side:
            rung = -(-max(rung + multiple, int(rung * _LADDER_STEP)) // multiple) * multiple
        return rung

    return step(shape[0]), step(shape[1])


def round_up(shape: Shape, multiple: int) -> Shape:
    """Return (height, width), each rounded up to a multiple."""
    height, width = (-(-side // multiple) * multiple for side in shape)
    return height, width


def check_sizes(sizes: Iterable[Sequence[int]], *, min_side: int = 1) -> list[Shape]:
    """Check sizes of images that a caller passed, and return them as pairs of integers.

    Args:
      sizes: (height, width) of each image in pixels.
      min_side: smallest side.

    Raises:
      UserError: one of them is not a pair of whole numbers of at least ``min_side``.
    """
    checked = []
    for size in sizes if isinstance(sizes, Iterable) and not isinstance(sizes, str) else [sizes]:
        sides = list(size) if isinstance(size, (Sequence, np.ndarray)) and not isinstance(size, str) else []
        is_whole = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides)
        if len(sides) != 2 or not is_whole or min(sides) < min_side:
            raise UserError(
                f"Expected (height, width) of each image, whole numbers of at least {min_side}, got {size!r}. "
                "Pass a list such as [(480, 640)]."
            )
        checked.append((int(sides[0]), int(sides[1])))
    return checked


def parse_buckets(text: str, *, key: str = "buckets") -> list[Shape]:
    """Parse heights and widths such as "608x832,832x608".

    Args:
      text: the buckets.
      key: what an error calls them.

    Raises:
      UserError: the text has another format, or a side is longer than ``MAX_SIDE``.
    """
    matches = [re.fullmatch(r"\s*([1-9]\d{0,4})x([1-9]\d{0,4})\s*", part) for part in text.split(",")]
    parts = [match for match in matches if match]
    if len(parts) < len(matches):
        choices = ', or one of "auto" and "exact" where these are offered' if text.strip().isalpha() else ""
        raise UserError(f'{key}: expected heights and widths such as "608x832,832x608"{choices}, got {text!r}.')
    buckets = [(int(part[1]), int(part[2])) for part in parts]
    if max(map(max, buckets)) > MAX_SIDE:
        raise UserError(f"{key}: sides must be at most {MAX_SIDE} pixels, got {text!r}.")
    return buckets


def plan_shapes(
    view_shapes: Mapping[tuple[int, int], tuple[tuple[int, int], ...]], buckets: Sequence[tuple[int, int]] | None
) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
    """Choose the shape of the array of each view.

    Args:
      view_shapes: for each size of the original images, the (height, width) of its views.
      buckets: choices for the first view; None for arrays of exactly the size of the views. For further views the images in one
        bucket share the smallest array that holds all of them.

    Returns:
      For each size of the original images, the (height, width) of the arrays of its views.

    Raises:
      UserError: no bucket holds an image.
    """
    if buckets is None:
        return dict(view_shapes)
    groups: dict[tuple[int, int], list] = {}
    for size, shapes in view_shapes.items():
        groups.setdefault(find_bucket(shapes[0], buckets), []).append((size, shapes))
    planned = {}
    for bucket, members in groups.items():
        hulls = [
            tuple(max(sides) for sides in zip(*views, strict=True))
            for views in zip(*(m[1] for m in members), strict=True)
        ]
        planned |= {size: (bucket, *hulls[1:]) for size, _ in members}
    return planned


def measure_waste(shapes: Iterable[Shape], buckets: Sequence[Shape]) -> float:
    """Return the share of the pixels of the buckets, counted once for each image, that is not image."""
    shapes = list(shapes)
    padded = sum(math.prod(find_bucket(shape, buckets)) for shape in shapes)
    return 1 - sum(map(math.prod, shapes)) / max(padded, 1)


def pad_views(record: dict[str, Any], shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return a record with "view_0", ... in arrays of the given shapes, and with their sizes "size_of_view_0", ..."""
    names = [f"view_{number}" for number in range(len(shapes))]
    padded = [pad_view(record[name], shape, name=name) for name, shape in zip(names, shapes, strict=True)]
    return {**record, **{key: value for entries in padded for key, value in entries.items()}}


def pad_view(view: np.ndarray, shape: tuple[int, int], *, name: str) -> dict[str, np.ndarray]:
    """Return a view in an array of the given (height, width), and its size."""
    padded = np.zeros((*shape, view.shape[2]), view.dtype)
    padded[: view.shape[0], : view.shape[1]] = view
    return {name: padded, f"size_of_{name}": np.array(view.shape[:2], np.int32)}


def _hull(shapes: Sequence[Shape]) -> Shape:
    """The smallest shape that holds all of them."""
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    return height, width


def _run_costs(line: Sequence[Shape], counts: Counter) -> np.ndarray:
    """(n, n): pixels of the bucket for the sizes i to j of a line, counted once for each image; infinite for j < i."""
    sides = np.array(line, np.float64)
    number = np.array([counts[shape] for shape in line], np.float64)
    costs = np.full((len(line), len(line)), np.inf)
    for first in range(len(line)):
        height, width = (np.maximum.accumulate(sides[first:, axis]) for axis in (0, 1))
        costs[first, first:] = height * width * number[first:].cumsum()
    return costs


class _Division:
    """The best divisions of a line of sizes into runs, computed for one more run when it is asked for."""

    def __init__(self, costs: np.ndarray):
        self._costs = costs
        self._best = [costs[0]]  # best cost of the sizes up to j, with 1, 2, ... runs
        self._starts: list[np.ndarray] = []  # first size of the last run of these divisions, from two runs on

    def cost(self, count: int) -> float:
        while len(self._best) < count:
            before = np.concatenate([[np.inf], self._best[-1][:-1]])[:, None] + self._costs
            self._starts.append(before.argmin(axis=0))
            self._best.append(before.min(axis=0))
        return float(self._best[count - 1][-1])

    def runs(self, count: int) -> list[tuple[int, int]]:
        """(start, stop) of each run of the best division into ``count`` runs."""
        stops = [len(self._costs)]
        for starts in reversed(self._starts[: count - 1]):
            stops.append(int(starts[stops[-1] - 1]))
        return list(itertools.pairwise(reversed([*stops, 0])))
