"""What a trained classifier attends to in an image, block by block; for pictures of it."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from dat_jax.errors import UserError
from dat_jax.inference.classification import Classifier
from dat_jax.models.attention_weights import compute_attention
from dat_jax.tasks.preprocessing import normalize


@dataclasses.dataclass(frozen=True, eq=False)
class BlockAttention:
    """Of one block. Points are (y, x) in pixels of the image that the network sees, pixel i covering [i, i + 1).

    Attributes:
      name: such as "stages_2/blocks_1".
      kind: "D", deformable, or "N", neighborhood.
      map_shape: (H, W) of its map, whose pixels are the Q = H * W queries, row by row.
      image_shape: (height, width) of the image.
      groups: G of a D block; 1 of an N block.
      weights: float32 (M, Q, N), a query's sum to 1; of an N block N is the window's K * K pixels, row by row.
      positions, references: of a D block's keys, float32 (G, N, 2) and (N, 2), with offsets and before; None of an N block.
    """

    name: str
    kind: str
    map_shape: tuple[int, int]
    image_shape: tuple[int, int]
    groups: int
    weights: np.ndarray
    positions: np.ndarray | None = None
    references: np.ndarray | None = None

    @functools.cached_property
    def group_weights(self) -> np.ndarray:
        """Means over the heads of every group, (G, Q, N)."""
        return self.weights.reshape(self.groups, -1, *self.weights.shape[1:]).mean(axis=1)

    @property
    def received(self) -> np.ndarray:
        """What a key gets in the mean over the queries and the heads of its group, (G, N)."""
        return self.group_weights.mean(axis=1)

    @property
    def kernel_size(self) -> int:
        """K of an N block's window."""
        return round(self.weights.shape[-1] ** 0.5)

    def find_query(self, point: tuple[float, float]) -> tuple[int, int]:
        """(row, column) of the query whose cell has a point of the image in it."""
        sides = zip(point, self.image_shape, self.map_shape, strict=True)
        return tuple(min(max(int(at / side * count), 0), count - 1) for at, side, count in sides)

    def find_window(self, query: tuple[int, int]) -> np.ndarray | None:
        """(top, left, bottom, right) of an N block's window, shifted inward at the borders; None of a D block.

        On a map smaller than the window it reaches beyond the image, as the padding does.
        """
        if self.kind == "D":
            return None
        kernel_size = self.kernel_size
        starts = [
            min(max(at - kernel_size // 2, 0), max(side - kernel_size, 0))
            for at, side in zip(query, self.map_shape, strict=True)
        ]
        return np.array([*starts, *(start + kernel_size for start in starts)]) * np.tile(self.cell, 2)

    @property
    def cell(self) -> np.ndarray:
        """(height, width) of a pixel of the map, in pixels of the image."""
        return np.divide(self.image_shape, self.map_shape)

    def find_keys(self, query: tuple[int, int]) -> np.ndarray:
        """Positions of the keys that a query sees, (G, N, 2)."""
        if self.kind == "D":
            return self.positions
        inside = np.stack(np.meshgrid(*(np.arange(self.kernel_size),) * 2, indexing="ij"), axis=-1)
        return (self.find_window(query)[:2] + (inside.reshape(-1, 2) + 0.5) * self.cell)[None]

    def rank_keys(self, query: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups, indices and weights of the ``count`` most important keys of a query, over all groups, each (n,)."""
        weights = self.group_weights[:, query[0] * self.map_shape[1] + query[1]]
        order = np.argsort(-weights, axis=None, kind="stable")[:count]
        group, key = np.unravel_index(order, weights.shape)
        return group, key, weights[group, key]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageAttention:
    """Of one image.

    Attributes:
      image: uint8 (S, S, 3) RGB, as the network sees it.
      ranking: class name -> probability, see ``Classifier.rank``.
      blocks: by name, in the order of the model.
    """

    image: np.ndarray
    ranking: dict[str, float]
    blocks: dict[str, BlockAttention]


def make_attention_reader(classifier: Classifier) -> Callable[[np.ndarray], ImageAttention]:
    """A function of an image uint8 (H, W, 3) RGB, compiled once.

    Raises:
      UserError: the model has no deformable or neighborhood block.
    """
    model = classifier.model
    if not set("".join(model.stages)) & set("DN"):
        raise UserError("The model has no deformable (D) or neighborhood (N) block whose attention could be shown.")
    compute = jax.jit(lambda variables, images: compute_attention(model, variables, normalize(images)))

    def read(image: np.ndarray) -> ImageAttention:
        seen = classifier.transform({"image": image})["image"]
        found = jax.device_get(compute(classifier.variables, seen[None]))
        names = [name for name in block_names(model, "DN") if name in found]
        blocks = {name: _make_block(name, found[name], model, seen.shape[:2]) for name in names}
        return ImageAttention(image=seen, ranking=classifier.rank(classifier(image)), blocks=blocks)

    return read


def block_names(model, kinds: str) -> list[str]:
    """Of the blocks of some kinds, "DN" or a part of it, in the order of the model."""
    return [
        f"stages_{i}/blocks_{j}"
        for i, stage in enumerate(model.stages)
        for j, kind in enumerate(stage)
        if kind in kinds
    ]


def _make_block(name, found, model, image_shape):
    stage = int(name.split("/")[0].removeprefix("stages_"))
    map_shape = model.map_shape(image_shape, stage=stage)
    common = dict(name=name, map_shape=map_shape, image_shape=image_shape)
    weights = found["weights"][0].astype(np.float32)
    if "positions" not in found:
        weights = weights[:, : map_shape[0], : map_shape[1]]
        count = map_shape[0] * map_shape[1]
        return BlockAttention(**common, kind="N", groups=1, weights=weights.reshape(len(weights), count, -1))

    def to_image(points):  # -1 and 1 are the centres of the first and last pixel of the map
        pixels = (np.asarray(points, np.float32) + 1) / 2 * (np.array(map_shape) - 1)
        return ((pixels + 0.5) * np.divide(image_shape, map_shape)).astype(np.float32)

    positions, references = found["positions"][0], found["references"].reshape(-1, 2)
    return BlockAttention(
        **common,
        kind="D",
        groups=len(positions),
        weights=weights,
        positions=to_image(positions.reshape(len(positions), -1, 2)),
        references=to_image(references),
    )


def find_seen_point(
    classifier: Classifier, image_shape: tuple[int, int], pixel: tuple[float, float] | None
) -> tuple[float, float]:
    """Where the centre of a pixel of an image is in what the network sees of it.

    Args:
      classifier: resizes and cuts.
      image_shape: (height, width) of the image.
      pixel: (y, x); None for the centre of what is seen.

    Raises:
      UserError: it lies outside the image, or in a border that is cut off.
    """
    size, resize = (classifier.options[name] for name in ("image_size", "resize"))
    if pixel is None:
        return size / 2, size / 2
    asked, wanted = "{:g},{:g}".format(*pixel), "{} x {}".format(*image_shape)
    if not all(0 <= at < side for at, side in zip(pixel, image_shape, strict=True)):
        raise UserError(f"The query {asked} lies outside the image of {wanted} pixels (Y,X count from 0).")
    border = round((resize - size) / 2)
    point = tuple((at + 0.5) * resize / side - border for at, side in zip(pixel, image_shape, strict=True))
    if not all(0 <= at < size for at in point):
        # The first pixel whose centre is not before the border, and the last before the other one.
        edges = [[math.ceil(edge * side / resize - 0.5) for edge in (border, border + size)] for side in image_shape]
        seen = ", ".join(f"{axis} from {low} to {high - 1}" for axis, (low, high) in zip("YX", edges, strict=True))
        raise UserError(f"The query {asked} lies in the border that the network does not see: wanted {seen}.")
    return point
