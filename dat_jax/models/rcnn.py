"""Mask R-CNN (1703.06870) and Cascade Mask R-CNN (1906.09756): the networks, without the selection of boxes between them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.backbone import Backbone
from dat_jax.models.dat import DAT
from dat_jax.models.fpn import FPN, level_sizes
from dat_jax.models.layers import ConvUnit
from dat_jax.models.mesh_axes import MeshModule
from dat_jax.models.rpn import ANCHOR_RATIOS, ANCHOR_SCALES, RPNHead

BOX_SIDE, MASK_SIDE = 7, 14  # published sides of the RoI features for the heads
CASCADE_STAGES = 3
BOX_HEAD_SIZES = {True: dict(num_convs=4, num_layers=1), False: dict(num_convs=0, num_layers=2)}  # key: is it a cascade


class BoxHead(nn.Module):
    """RoI features (N, 7, 7, C) -> logits (N, K + 1), background last, and deltas (N, K * 4), class-major; float32 or better.

    With ``mask``, bool (N,), only those rows count in the statistics of BatchNorm.

    Attributes:
      num_classes: K, without background.
      num_convs: number of 3 x 3 convolutions with BatchNorm (published: 4 in a cascade, otherwise 0).
      num_layers: number of hidden linear layers after them (published: 1 in a cascade, otherwise 2).
      width: features of the hidden linear layers.
      dtype: of the hidden layers.
      frozen_batch_norm: see ``RCNN``.
    """

    num_classes: int
    num_convs: int = 0
    num_layers: int = 2
    width: int = 1024
    dtype: Any = jnp.float32
    frozen_batch_norm: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        wide = jnp.promote_types(self.dtype, jnp.float32)
        options: dict[str, Any] = dict(dtype=self.dtype, frozen_batch_norm=self.frozen_batch_norm)
        for index in range(self.num_convs):
            x = ConvUnit(x.shape[-1], 3, **options, name=f"shared_convs_{index}")(x, train=train, mask=mask)
        x = x.reshape(x.shape[0], -1)
        for index in range(self.num_layers):
            init = nn.initializers.xavier_uniform()
            x = nn.relu(nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=f"shared_fcs_{index}")(x))

        def output_layer(features, std, name):
            return nn.Dense(features, kernel_init=nn.initializers.normal(std), dtype=wide, name=name)(x)

        return output_layer(self.num_classes + 1, 0.01, "fc_cls"), output_layer(4 * self.num_classes, 0.001, "fc_reg")


class MaskHead(nn.Module):
    """RoI features (N, 14, 14, C) -> logits (N, 28, 28, K), float32 or better.

    3 x 3 convolutions, a 2 x 2 deconvolution that doubles the size, and a 1 x 1 convolution. The stride of the deconvolution is
    2, so it is a matrix product at every pixel and a rearrangement.

    Attributes:
      num_classes: K.
      num_convs: number of 3 x 3 convolutions.
      dtype: of the hidden layers.
    """

    num_classes: int
    num_convs: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, features = nn.initializers.variance_scaling(2.0, "fan_out", "normal"), x.shape[-1]
        for index in range(self.num_convs):
            name = f"convs_{index}"
            x = nn.relu(nn.Conv(features, (3, 3), padding=1, kernel_init=init, dtype=self.dtype, name=name)(x))
        x = nn.DenseGeneral((2, 2, features), kernel_init=init, use_bias=False, dtype=self.dtype, name="upsample")(x)
        bias = self.param("upsample_bias", nn.initializers.zeros, (features,))
        count, height, width = x.shape[:3]
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(count, 2 * height, 2 * width, features)
        x = nn.relu(x + bias.astype(x.dtype).reshape(1, 1, 1, features))
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Conv(self.num_classes, (1, 1), kernel_init=init, dtype=wide, name="conv_logits")(x)


class RCNN(MeshModule):
    """Backbone, pyramid of five levels (strides 4 to 64), RPN, and the heads for boxes and masks.

    With ``sizes``, int (B, 2), each image is the top left (height, width) pixels of its array, see ``DAT.features``.

    The variables are "params" and, in a cascade, "batch_stats". Methods are functions of arrays; ``tasks.detection.objective``
    selects the boxes and extracts their features from the pyramid.

    Attributes:
      dat: the backbone; its classifier is not used.
      num_classes: number of classes, without background.
      cascade: True for Cascade Mask R-CNN: three box and mask heads, with BatchNorm in the box heads, and a last level by
        subsampling. False for Mask R-CNN: one head of each kind, and a last level by convolution.
      features: channels of the pyramid.
      width: features of the hidden linear layers in the box heads.
      box_convs: number of convolutions in each box head; None for the published number, 4 in a cascade and 0 otherwise.
      box_layers: number of hidden linear layers in each box head; None for the published number, 1 in a cascade and 2 otherwise.
      mask_convs: number of convolutions in each mask head.
      box_side: side of the RoI features for the box heads.
      mask_side: side of the RoI features for the mask heads.
      anchor_scales: scales of the RPN's anchors at every position, see ``ops.detection.anchors``.
      anchor_ratios: aspect ratios of the RPN's anchors at every position, see ``ops.detection.anchors``.
      anchor_means: means of the RPN's deltas, see ``ops.detection.boxes.encode_boxes``.
      anchor_stds: standard deviations of the RPN's deltas, see ``ops.detection.boxes.encode_boxes``.
      box_means: means of each box head's deltas, four numbers per head; empty for the published ones, see
        ``tasks.detection.rcnn``.
      box_stds: standard deviations of each box head's deltas, four numbers per head; empty for the published ones.
      dtype: of the computation.
      frozen_batch_norm: whether training leaves the BatchNorm of a cascade as it is, see ``Segmentor``.

    Source: DAT++ (2309.01430), section 4.2, as published on MMDetection.
    """

    dat: DAT
    num_classes: int = 80
    cascade: bool = False
    features: int = 256
    width: int = 1024
    box_convs: int | None = None
    box_layers: int | None = None
    mask_convs: int = 4
    box_side: int = BOX_SIDE
    mask_side: int = MASK_SIDE
    anchor_scales: tuple[float, ...] = ANCHOR_SCALES
    anchor_ratios: tuple[float, ...] = ANCHOR_RATIOS
    anchor_means: tuple[float, ...] = (0.0,) * 4
    anchor_stds: tuple[float, ...] = (1.0,) * 4
    box_means: tuple[tuple[float, ...], ...] = ()
    box_stds: tuple[tuple[float, ...], ...] = ()
    dtype: Any = jnp.float32
    frozen_batch_norm: bool = False

    def setup(self):
        num_anchors = len(self.anchor_scales) * len(self.anchor_ratios)
        self.backbone = Backbone(self.dat.clone(parent=None), dtype=self.dtype)
        extra = "subsampling" if self.cascade else "convolutions"
        self.neck = FPN(self.features, levels=5, extra=extra, dtype=self.dtype)
        self.rpn_head = RPNHead(num_anchors, self.features, dtype=self.dtype)
        published = BOX_HEAD_SIZES[self.cascade]
        sizes = {
            name: default if value is None else value
            for (name, default), value in zip(published.items(), (self.box_convs, self.box_layers), strict=True)
        }
        options: dict[str, Any] = dict(num_classes=self.num_classes, dtype=self.dtype)  # of several types
        box_options: dict[str, Any] = dict(
            width=self.width, frozen_batch_norm=self.frozen_batch_norm, **sizes, **options
        )
        self.bbox_heads = [BoxHead(**box_options) for _ in range(self.stages)]
        self.mask_heads = [MaskHead(num_convs=self.mask_convs, **options) for _ in range(self.stages)]

    @property
    def stages(self) -> int:
        """Number of heads of each kind."""
        return CASCADE_STAGES if self.cascade else 1

    def pyramid(
        self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Images (B, H, W, 3) -> the five levels (B, H_i, W_i, features)."""
        return self.neck(self.backbone(images, train=train, sizes=sizes), sizes=self.backbone.level_sizes(sizes))

    @nn.nowrap
    def level_sizes(self, sizes: jax.Array | None) -> list[jax.Array | None]:
        """Sizes of the five levels, int (B, 2) or None each, for the sizes of the images."""
        maps = [None if sizes is None else self.dat.map_sizes(sizes, stage=stage) for stage in range(4)]
        return level_sizes(maps, levels=5)

    def propose(
        self, pyramid: tuple[jax.Array, ...], *, sizes: jax.Array | None = None
    ) -> dict[str, tuple[jax.Array, ...]]:
        """{"scores": (B, H_i, W_i, A), "deltas": (B, H_i, W_i, A * 4)} of each level, see ``RPNHead``."""
        scores, deltas = zip(*map(self.rpn_head, pyramid, self.level_sizes(sizes)), strict=True)
        return {"scores": scores, "deltas": deltas}

    def boxes(
        self, roi_features: jax.Array, *, stage: int = 0, train: bool = False, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """RoI features (N, 7, 7, features) -> logits (N, K + 1) and deltas (N, K * 4) of a stage, see ``BoxHead``."""
        return self.bbox_heads[stage](roi_features, train=train, mask=mask)

    def masks(self, roi_features: jax.Array, *, stage: int = 0) -> jax.Array:
        """RoI features (N, 14, 14, features) -> logits (N, 28, 28, K) of a stage, see ``MaskHead``."""
        return self.mask_heads[stage](roi_features)

    def __call__(
        self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
    ) -> dict[str, tuple[jax.Array, ...]]:
        """Images (B, H, W, 3) -> the outputs of the RPN, see ``propose``. Also initializes all heads."""
        pyramid = self.pyramid(images, train=train, sizes=sizes)
        if self.is_initializing():
            for stage in range(self.stages):
                self.boxes(jnp.zeros((1, self.box_side, self.box_side, self.features), self.dtype), stage=stage)
                self.masks(jnp.zeros((1, self.mask_side, self.mask_side, self.features), self.dtype), stage=stage)
        return self.propose(pyramid, sizes=sizes)
