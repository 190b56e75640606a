"""RetinaNet (1708.02002): class scores and a box for every anchor."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.backbone import Backbone
from dat_jax.models.dat import DAT
from dat_jax.models.fpn import FPN
from dat_jax.models.mesh_axes import MeshModule

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

    All levels share one head.

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

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = deltas = x
        for conv in self.cls_convs:
            scores = nn.relu(conv(scores))
        for conv in self.reg_convs:
            deltas = nn.relu(conv(deltas))
        return self.retina_cls(scores), self.retina_reg(deltas)


class RetinaNet(MeshModule):
    """Images (B, H, W, 3), normalized -> {"scores", "deltas"}, each for five levels with strides 8 to 128, see ``RetinaHead``.

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

    def pyramid(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, ...]:
        """Images (B, H, W, 3) -> the five levels (B, H_i, W_i, features)."""
        return self.neck(self.backbone(images, train=train)[1:])

    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, tuple[jax.Array, ...]]:
        scores, deltas = zip(*map(self.bbox_head, self.pyramid(images, train=train)), strict=True)
        return {"scores": scores, "deltas": deltas}
