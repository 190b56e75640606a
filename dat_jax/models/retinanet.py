"""RetinaNet (1708.02002): class scores and a box for every anchor."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.backbone import Backbone
from dat_jax.models.dat import DAT
from dat_jax.models.fpn import FPN, level_sizes
from dat_jax.models.mesh_axes import MeshModule
from dat_jax.ops.sizes import clear, inside

STRIDES = (8, 16, 32, 64, 128)
ANCHOR_SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))  # multiples of the stride
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height over width
_PRIOR = 0.01  # initial probability of every class


def small_conv(features: int, side: int, *, dtype: Any, bias: float = 0.0) -> nn.Conv:
    """A convolution that keeps the size of the map, initialized like the published dense heads: N(0, 0.01)."""
    return nn.Conv(
        features,
        (side, side),
        padding=side // 2,
        kernel_init=nn.initializers.normal(0.01),
        bias_init=nn.initializers.constant(bias),
        dtype=dtype,
    )


class RetinaHead(nn.Module):
    """(B, H, W, C) -> score logits (B, H, W, A * K), anchor-major, and deltas (B, H, W, A * 4), float32 or better.

    All levels share one head. With ``sizes``, see ``ops.sizes``, scores beyond the size are -inf.

    Attributes:
      num_classes: K, without background.
      num_anchors: A, anchors per position.
      features: channels of the hidden convolutions.
      depth: number of hidden convolutions in each of the two branches.
      dtype: of the hidden convolutions.
    """

    num_classes: int
    num_anchors: int
    features: int
    depth: int = 4
    dtype: Any = jnp.float32

    def setup(self):
        wide = jnp.promote_types(self.dtype, jnp.float32)
        self.cls_convs = [small_conv(self.features, 3, dtype=self.dtype) for _ in range(self.depth)]
        self.reg_convs = [small_conv(self.features, 3, dtype=self.dtype) for _ in range(self.depth)]
        prior = math.log(_PRIOR / (1 - _PRIOR))
        self.retina_cls = small_conv(self.num_anchors * self.num_classes, 3, dtype=wide, bias=prior)
        self.retina_reg = small_conv(self.num_anchors * 4, 3, dtype=wide)

    def __call__(self, x: jax.Array, sizes: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        scores = deltas = clear(x, sizes)
        for conv in self.cls_convs:
            scores = clear(nn.relu(conv(scores)), sizes)
        for conv in self.reg_convs:
            deltas = clear(nn.relu(conv(deltas)), sizes)
        return drop_scores(self.retina_cls(scores), sizes), self.retina_reg(deltas)


def drop_scores(scores: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """Return score logits (B, H, W, A) with -inf beyond the size of each example, so that no candidate is chosen there."""
    if sizes is None:
        return scores
    return jnp.where(inside((scores.shape[1], scores.shape[2]), sizes)[..., None], scores, -jnp.inf)


class RetinaNet(MeshModule):
    """Images (B, H, W, 3), normalized -> {"scores", "deltas"}, each for five levels with strides 8 to 128, see ``RetinaHead``.

    With ``sizes``, int (B, 2), each image is the top left (height, width) pixels of its array, see ``DAT.features``.

    Attributes:
      dat: the backbone; its classifier is not used.
      num_classes: number of classes, without background.
      features: channels of the pyramid and the head.
      depth: number of hidden convolutions in each branch of the head.
      anchor_scales: scales of the anchors at every position, see ``ops.detection.anchors``.
      anchor_ratios: aspect ratios of the anchors at every position, see ``ops.detection.anchors``.
      anchor_means: means of the deltas, see ``ops.detection.boxes.encode_boxes``.
      anchor_stds: standard deviations of the deltas, see ``ops.detection.boxes.encode_boxes``.
      dtype: of the computation.

    Source: DAT++ (2309.01430), section 4.2, as published on MMDetection.
    """

    dat: DAT
    num_classes: int = 80
    features: int = 256
    depth: int = 4
    anchor_scales: tuple[float, ...] = ANCHOR_SCALES
    anchor_ratios: tuple[float, ...] = ANCHOR_RATIOS
    anchor_means: tuple[float, ...] = (0.0,) * 4
    anchor_stds: tuple[float, ...] = (1.0,) * 4
    dtype: Any = jnp.float32

    def setup(self):
        num_anchors = len(self.anchor_scales) * len(self.anchor_ratios)
        self.backbone = Backbone(self.dat.clone(parent=None), out_indices=(1, 2, 3), dtype=self.dtype)
        self.neck = FPN(self.features, levels=5, dtype=self.dtype)
        self.bbox_head = RetinaHead(self.num_classes, num_anchors, self.features, self.depth, dtype=self.dtype)

    def pyramid(
        self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Images (B, H, W, 3) -> the five levels (B, H_i, W_i, features)."""
        maps = self.backbone(images, train=train, sizes=sizes)
        return self.neck(maps, sizes=self.backbone.level_sizes(sizes))

    @nn.nowrap
    def level_sizes(self, sizes: jax.Array | None) -> list[jax.Array | None]:
        """Sizes of the five levels, int (B, 2) or None each, for the sizes of the images."""
        maps = [None if sizes is None else self.dat.map_sizes(sizes, stage=stage) for stage in range(1, 4)]
        return level_sizes(maps, levels=5)

    def __call__(
        self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
    ) -> dict[str, tuple[jax.Array, ...]]:
        levels = self.pyramid(images, train=train, sizes=sizes)
        scores, deltas = zip(*map(self.bbox_head, levels, self.level_sizes(sizes)), strict=True)
        return {"scores": scores, "deltas": deltas}
