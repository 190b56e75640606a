"""Semantic segmentation: SemanticFPN and UperNet on a DAT backbone."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.backbone import Backbone
from dat_jax.models.dat import DAT
from dat_jax.models.fpn import FPN
from dat_jax.models.layers import ConvUnit
from dat_jax.models.mesh_axes import MeshModule
from dat_jax.ops.layers.resize import adaptive_average_pool, resize_bilinear


class PixelClassifier(nn.Module):
    """Dropout of whole channels and a 1 x 1 convolution: (B, H, W, C) -> logits (B, H, W, num_classes), float32 or better."""

    num_classes: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        init = nn.initializers.normal(0.01)
        return nn.Conv(self.num_classes, (1, 1), kernel_init=init, dtype=dtype, name="conv_seg")(x)


class SemanticFPNHead(nn.Module):
    """Sums the maps of an FPN at the size of the finest one, and classifies pixels (1901.02446).

    The maps have strides 4, 8, 16, ... Each coarser map is upsampled by 3 x 3 units, each followed by a doubling of the size. The
    defaults are the published settings. ``sizes``: see ``FPN``.

    Attributes:
      num_classes: number of classes.
      channels: channels of the units.
      dropout: rate of channels dropped before the classifier.
      dtype: of the computation.
      frozen_batch_norm: see ``Segmentor``.
    """

    num_classes: int
    channels: int = 128
    dropout: float = 0.1
    dtype: Any = jnp.float32
    frozen_batch_norm: bool = False

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array], *, train: bool, sizes: Sequence[jax.Array | None] | None = None
    ) -> jax.Array:
        options: dict[str, Any] = dict(dtype=self.dtype, frozen_batch_norm=self.frozen_batch_norm)
        total, finest = None, None if sizes is None else sizes[0]
        for level, x in enumerate(maps):
            size = None if sizes is None else sizes[level]
            for index in range(max(1, level)):
                unit = ConvUnit(self.channels, 3, **options, name=f"scale_heads_{level}_{2 * index}")
                x = unit(x, train=train, sizes=size)
                if level:
                    doubled = None if size is None else 2 * size
                    x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), sizes=size, to=doubled)
                    size = doubled
            total = x if total is None else total + resize_bilinear(x, total.shape[1:3], sizes=size, to=finest)
        return PixelClassifier(self.num_classes, self.dropout, self.dtype, name="classifier")(total, train=train)


class UperNetHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down pyramid, and fusion of all levels at the finest one (1807.10221).

    ``sizes``: see ``FPN``.

    Attributes:
      num_classes: number of classes.
      channels: channels of the units.
      dropout: rate of channels dropped before the classifier.
      pool_sides: sides of the maps of the pyramid pooling.
      dtype: of the computation.
      frozen_batch_norm: see ``Segmentor``.
    """

    num_classes: int
    channels: int = 512
    dropout: float = 0.1
    pool_sides: tuple[int, ...] = (1, 2, 3, 6)
    dtype: Any = jnp.float32
    frozen_batch_norm: bool = False

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array], *, train: bool, sizes: Sequence[jax.Array | None] | None = None
    ) -> jax.Array:
        options: dict[str, Any] = dict(dtype=self.dtype, frozen_batch_norm=self.frozen_batch_norm)

        def unit(x, side, name, size=None):
            return ConvUnit(self.channels, side, **options, name=name)(x, train=train, sizes=size)

        *finer, coarsest = maps
        level_sizes = [None] * len(maps) if sizes is None else list(sizes)
        last = level_sizes[-1]
        pooled = [coarsest]
        for index, side in enumerate(self.pool_sides):
            x = unit(adaptive_average_pool(coarsest, side, sizes=last), 1, f"psp_modules_{index}")
            pooled_size = None if last is None else jnp.full_like(last, side)
            pooled.append(resize_bilinear(x, coarsest.shape[1:3], sizes=pooled_size, to=last))
        laterals = [unit(x, 1, f"lateral_convs_{index}") for index, x in enumerate(finer)]
        laterals.append(unit(jnp.concatenate(pooled, axis=-1), 3, "bottleneck", last))
        for index in range(len(laterals) - 1, 0, -1):
            resize = dict(sizes=level_sizes[index], to=level_sizes[index - 1])
            laterals[index - 1] += resize_bilinear(laterals[index], laterals[index - 1].shape[1:3], **resize)
        levels = [unit(x, 3, f"fpn_convs_{index}", level_sizes[index]) for index, x in enumerate(laterals[:-1])] + [
            laterals[-1]
        ]
        resized = [
            resize_bilinear(x, levels[0].shape[1:3], sizes=size, to=level_sizes[0]) if index else x
            for index, (x, size) in enumerate(zip(levels, level_sizes, strict=True))
        ]
        x = unit(jnp.concatenate(resized, axis=-1), 3, "fpn_bottleneck", level_sizes[0])
        return PixelClassifier(self.num_classes, self.dropout, self.dtype, name="classifier")(x, train=train)


class FCNHead(nn.Module):
    """3 x 3 units and a classifier, the auxiliary head of UperNet. ``sizes``: see ``ops.sizes``.

    Attributes:
      num_classes: number of classes.
      channels: channels of the units.
      num_convs: number of units (published: 1).
      dropout: rate of channels dropped before the classifier.
      dtype: of the computation.
      frozen_batch_norm: see ``Segmentor``.
    """

    num_classes: int
    channels: int = 256
    num_convs: int = 1
    dropout: float = 0.1
    dtype: Any = jnp.float32
    frozen_batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, sizes: jax.Array | None = None) -> jax.Array:
        options: dict[str, Any] = dict(dtype=self.dtype, frozen_batch_norm=self.frozen_batch_norm)
        for index in range(self.num_convs):
            x = ConvUnit(self.channels, 3, **options, name=f"convs_{index}")(x, train=train, sizes=sizes)
        return PixelClassifier(self.num_classes, self.dropout, self.dtype, name="classifier")(x, train=train)


class Segmentor(MeshModule):
    """Backbone and heads: images (B, H, W, 3), normalized, of any size from 32 x 32 -> logits of every class.

    ``model.apply(variables, images, train=False)`` returns a dictionary of arrays in float32 or better:

    * "logits": (B, H / 4, W / 4, num_classes), with sizes rounded up.
    * "auxiliary_logits": (B, H / 16, W / 16, num_classes), with sizes rounded up, if there is an auxiliary head.

    With ``sizes``, int (B, 2), each image is the top left (height, width) pixels of its array, see ``DAT.features``. Its logits
    fill the top left of the arrays; ``logits_sizes`` has their sizes. This is for evaluation: in training the statistics of
    BatchNorm would be those of whole arrays.

    The variables are "params" and "batch_stats", the running averages of BatchNorm. Training updates them
    (``mutable=["batch_stats"]``), over a mesh with the statistics of the global batch, and needs a random key "dropout".

    Attributes:
      dat: the backbone; its classifier is not used.
      num_classes: number of classes.
      head: one of ``HEADS``.
      channels: channels of the head (published: 128 for sem_fpn, 512 for upernet).
      neck_channels: channels of the FPN before the head of sem_fpn.
      pool_sides: sides of the maps of upernet's pyramid pooling.
      auxiliary_channels: channels of upernet's auxiliary head on the third map; 0 for no auxiliary head.
      auxiliary_convs: number of 3 x 3 units in the auxiliary head.
      dropout: rate of channels dropped before each classifier.
      dtype: of the computation.
      frozen_batch_norm: whether training leaves BatchNorm as it is: it normalizes with the running averages and does not update
        them, and the gradients of its scale and bias are zero. The optimizer must not decay them.

    Raises:
      ValueError: unknown head, or training with ``sizes``.

    Source: DAT++ (2309.01430), section 4.3, as published on MMSegmentation.
    """

    dat: DAT
    num_classes: int = 150
    head: str = "upernet"
    channels: int = 512
    neck_channels: int = 256
    pool_sides: tuple[int, ...] = (1, 2, 3, 6)
    auxiliary_channels: int = 256
    auxiliary_convs: int = 1
    dropout: float = 0.1
    dtype: Any = jnp.float32
    frozen_batch_norm: bool = False

    def setup(self):
        if self.head not in HEADS:
            raise ValueError(f"Unknown head {self.head!r}; choose one of {', '.join(HEADS)}.")
        self.backbone = Backbone(self.dat.clone(parent=None), dtype=self.dtype)
        options: dict[str, Any] = dict(  # of several types
            num_classes=self.num_classes,
            dropout=self.dropout,
            dtype=self.dtype,
            frozen_batch_norm=self.frozen_batch_norm,
        )
        if self.head == "sem_fpn":
            self.neck = FPN(self.neck_channels, dtype=self.dtype)
        pooling = dict(pool_sides=self.pool_sides) if self.head == "upernet" else {}
        self.decode_head = HEADS[self.head](channels=self.channels, **pooling, **options)
        if self.head == "upernet" and self.auxiliary_channels:
            self.auxiliary_head = FCNHead(channels=self.auxiliary_channels, num_convs=self.auxiliary_convs, **options)

    def __call__(
        self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        if train and sizes is not None:
            raise ValueError("A segmentor is trained with images that fill their arrays, but sizes were given.")
        maps, level_sizes = self.backbone(images, train=train, sizes=sizes), self.backbone.level_sizes(sizes)
        outputs = {}
        if self.head == "upernet" and self.auxiliary_channels:
            outputs["auxiliary_logits"] = self.auxiliary_head(maps[2], train=train, sizes=level_sizes[2])
        if self.head == "sem_fpn":
            maps = self.neck(maps, sizes=level_sizes)
        sizes_of_maps = None if sizes is None else level_sizes
        return {"logits": self.decode_head(maps, train=train, sizes=sizes_of_maps), **outputs}

    @nn.nowrap
    def logits_sizes(self, sizes: jax.Array) -> jax.Array:
        """Int (B, 2), the sizes of the logits for images of these sizes."""
        return self.dat.map_sizes(sizes, stage=0)


HEADS = {"sem_fpn": SemanticFPNHead, "upernet": UperNetHead}
