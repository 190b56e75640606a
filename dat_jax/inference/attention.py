"""Attention of a trained classifier to one image, block by block, for figures.

Unless noted otherwise, points are (y, x) in pixels of the image that the network sees; pixel i covers [i, i + 1).
"""

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
from dat_jax.visualization.displayable import to_rgb

NO_ATTENTION = "The model has no deformable (D) or neighborhood (N) block whose attention could be drawn."


@dataclasses.dataclass(frozen=True, eq=False)
class BlockAttention:
    """Attention of one block, with M heads, Q queries and N keys per query.

    Attributes:
      name: such as "stages_2/blocks_1".
      kind: "D" (deformable) or "N" (neighborhood).
      map_shape: (H, W) of the feature map, whose pixels are the Q = H * W queries in row-major order.
      image_shape: (height, width) of the image that the network sees.
      groups: number G of offset groups of a D block; 1 for an N block.
      weights: attention weights, float32 (M, Q, N), which sum to 1 over the keys of a query. The keys of an N block are the
        K * K pixels of its window in row-major order.
      positions: positions of the keys of a D block, float32 (G, N, 2); None for an N block.
      references: positions of these keys before the offsets, float32 (N, 2); None for an N block.
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
        """Attention weights averaged over the heads of each group, (G, Q, N)."""
        return self.weights.reshape(self.groups, -1, *self.weights.shape[1:]).mean(axis=1)

    @property
    def received(self) -> np.ndarray:
        """Attention that each key receives, averaged over all queries and the heads of its group, (G, N)."""
        return self.group_weights.mean(axis=1)

    @property
    def kernel_size(self) -> int:
        """Side K of the window of an N block, in pixels of the feature map."""
        return round(self.weights.shape[-1] ** 0.5)

    def find_query(self, point: tuple[float, float]) -> tuple[int, int]:
        """(row, column) of the query whose cell of the feature map contains a point of the image."""
        sides = zip(point, self.image_shape, self.map_shape, strict=True)
        row, column = (min(max(int(at / side * count), 0), count - 1) for at, side, count in sides)
        return row, column

    def find_window(self, query: tuple[int, int]) -> np.ndarray | None:
        """Window of an N block around a query, (top, left, bottom, right), shifted inward at the borders of the image.

        On a feature map smaller than the window it extends beyond the image, as the padding does. None for a D block.
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
        """(height, width) of a pixel of the feature map, in pixels of the image."""
        return np.divide(self.image_shape, self.map_shape)

    def find_keys(self, query: tuple[int, int]) -> np.ndarray:
        """Positions of the keys of a query, (G, N, 2)."""
        window = self.find_window(query)
        if window is None:
            assert self.positions is not None
            return self.positions
        offsets = np.stack(np.meshgrid(*(np.arange(self.kernel_size),) * 2, indexing="ij"), axis=-1)
        return (window[:2] + (offsets.reshape(-1, 2) + 0.5) * self.cell)[None]

    def rank_keys(self, query: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The keys with the largest weights for a query, over all groups.

        Args:
          query: (row, column).
          count: maximum number of keys.

        Returns:
          Groups, indices of keys within their group, and weights, each (n,), in descending order of the weights.
        """
        weights = self.group_weights[:, query[0] * self.map_shape[1] + query[1]]
        order = np.argsort(-weights, axis=None, kind="stable")[:count]
        group, key = np.unravel_index(order, weights.shape)
        return group, key, weights[group, key]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageAttention:
    """Attention of all D and N blocks of a classifier to one image.

    Attributes:
      image: the input of the network, as ``to_rgb`` shows it, uint8 (S, S, 3).
      ranking: class name -> probability, see ``Classifier.rank``.
      blocks: block name -> attention, in the order of the model.
    """

    image: np.ndarray
    ranking: dict[str, float]
    blocks: dict[str, BlockAttention]


def make_attention_reader(classifier: Classifier) -> Callable[[np.ndarray], ImageAttention]:
    """Make a function of an image (H, W, C) of ``classifier.image_format`` that computes the attention of the classifier to it.

    Raises:
      UserError: the model has no deformable or neighborhood block.
    """
    model = classifier.model
    names = block_names(model, "DN")
    if not names:
        raise UserError(NO_ATTENTION)
    statistics = {name: classifier.options[name] for name in ("mean", "std")}
    compute = jax.jit(lambda variables, images: compute_attention(model, variables, normalize(images, **statistics)))

    def read(image: np.ndarray) -> ImageAttention:
        network_input = classifier.transform({"image": image})["image"]
        arrays = jax.device_get(compute(classifier.variables, network_input[None]))
        blocks = {
            name: _make_block(name, arrays[name], model, network_input.shape[:2]) for name in names if name in arrays
        }
        return ImageAttention(image=to_rgb(network_input), ranking=classifier.rank(classifier(image)), blocks=blocks)

    return read


def block_names(model, kinds: str) -> list[str]:
    """Names of the blocks whose kind ("D" or "N") is in ``kinds``, in the order of the model."""
    return [
        f"stages_{i}/blocks_{j}"
        for i, stage in enumerate(model.stages)
        for j, kind in enumerate(stage)
        if kind in kinds
    ]


def _make_block(name, arrays, model, image_shape):
    stage = int(name.split("/")[0].removeprefix("stages_"))
    map_shape = model.map_shape(image_shape, stage=stage)
    common = dict(name=name, map_shape=map_shape, image_shape=image_shape)
    weights = arrays["weights"][0].astype(np.float32)
    if "positions" not in arrays:
        weights = weights[:, : map_shape[0], : map_shape[1]]
        count = map_shape[0] * map_shape[1]
        return BlockAttention(**common, kind="N", groups=1, weights=weights.reshape(len(weights), count, -1))

    def to_image(points):  # -1 and 1 are the centers of the first and last pixel of the map
        pixels = (np.asarray(points, np.float32) + 1) / 2 * (np.array(map_shape) - 1)
        return ((pixels + 0.5) * np.divide(image_shape, map_shape)).astype(np.float32)

    positions, references = arrays["positions"][0], arrays["references"].reshape(-1, 2)
    return BlockAttention(
        **common,
        kind="D",
        groups=len(positions),
        weights=weights,
        positions=to_image(positions.reshape(len(positions), -1, 2)),
        references=to_image(references),
    )


def find_input_point(
    classifier: Classifier, image_shape: tuple[int, int], pixel: tuple[float, float] | None
) -> tuple[float, float]:
    """Position of the center of an image's pixel in the resized and cropped input of the network.

    Args:
      classifier: classifier whose preprocessing is applied.
      image_shape: (height, width) of the original image.
      pixel: (y, x) in the original image, counted from 0; None for the center of the crop.

    Returns:
      (y, x) in pixels of the network's input; pixel i covers [i, i + 1).

    Raises:
      UserError: the pixel lies outside the image, or in the border that is cropped.
    """
    size, resize = (classifier.options[name] for name in ("image_size", "resize"))
    if pixel is None:
        return size / 2, size / 2
    query = "{:g},{:g}".format(*pixel)
    if not all(0 <= at < side for at, side in zip(pixel, image_shape, strict=True)):
        height, width = image_shape
        raise UserError(f"The query {query} lies outside the image of {height} x {width} pixels (Y,X count from 0).")
    border = round((resize - size) / 2)
    point = tuple((at + 0.5) * resize / side - border for at, side in zip(pixel, image_shape, strict=True))
    if not all(0 <= at < size for at in point):
        # The first pixel whose center lies inside the crop, and the first one after the crop.
        edges = [[math.ceil(edge * side / resize - 0.5) for edge in (border, border + size)] for side in image_shape]
        ranges = " and ".join(f"{axis} from {low} to {high - 1}" for axis, (low, high) in zip("YX", edges, strict=True))
        raise UserError(f"The query {query} lies in the border that is cropped; expected {ranges}.")
    return point
