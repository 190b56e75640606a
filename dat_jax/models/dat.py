"""DAT and DAT++: the backbone and the classifier."""

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dat_jax.models import attention
from dat_jax.models.blocks import REMAT_POLICIES, Block, ConvBlock, Stage, find_period, with_remat
from dat_jax.models.layers import LayerNorm, Linear
from dat_jax.models.mesh_axes import MeshModule
from dat_jax.models.patches import DownProjection, Stem
from dat_jax.ops import dispatch
from dat_jax.ops.attention.deformable import FORMS, key_grid_shape
from dat_jax.ops.sizes import clear, inside

STAGE_TYPES = {
    "N": "neighborhood attention",
    "D": "deformable attention",
    "L": "window attention",
    "S": "shifted window attention",
    "P": "spatial-reduction attention",
    "E": "slide attention",
    "X": "depthwise convolution",
}
MIN_IMAGE_SIDE = 32
LATER_STAGE_TYPES = frozenset("NEX")  # introduced with DAT++, not in the released DAT v1
DEFORMABLE_FORMS = FORMS  # choices of ``DAT.deformable_form``
_PER_STAGE_FIELDS = (
    *("dims", "num_heads", "num_groups", "key_strides", "offset_kernels", "offset_range_factors", "position_bias"),
    *("use_offsets", "window_sizes", "neighborhood_sizes", "reduction_ratios", "lpu", "conv_mlp", "layer_scale_init"),
)


class DAT(MeshModule):
    """Vision transformer with deformable attention.

    ``model.apply(variables, images, train=False)`` takes images (B, H, W, in_channels) of any size from 32 x 32, normalized by
    the mean and standard deviation of each channel, such as those of ImageNet, and returns logits (B, num_classes) in float32
    or better. Training needs a random key "dropout" if the drop path rate is not zero.

    Attributes:
      num_classes: number of classes.
      in_channels: number of channels of the images.
      image_size: side, or (height, width), of the images that position tables are made for; other sizes work as well.
      dim_stem: channels of the stem.
      dims: channels of each stage. All tuples have one entry per stage.
      stages: block types of each stage as a string, such as "ND"; ``STAGE_TYPES`` lists them.
      num_heads: number of attention heads.
      num_groups: number of offset groups of D blocks, see ``attention.DeformableAttention``.
      key_strides: stride of the key grid of D blocks.
      offset_kernels: kernel size of the offset network of D blocks.
      offset_range_factors: offset range factor of D blocks.
      position_bias: position bias of D blocks, one of ``attention.POSITION_BIAS_KINDS``.
      use_offsets: whether D blocks have offsets.
      deformable_form: which of the two published forms D blocks have. Both have the same parameters, so weights do not show
        which form they were trained with. With n keys on a side of H pixels, offset o of key i and range factor f:

        * "dat_pp", the form published with DAT++: the reference point is r = (i + 0.5) / (n - 1) * 2 - 1, the position is
          clip(r + o, -1, 1) if f < 0, otherwise r + tanh(o) * f / (n - 1). For the position bias query i is at
          2 i / (H - 1) - 1.
        * "cvpr2022", the form of the released DAT v1: r = (i + 0.5) / n * 2 - 1, the position is tanh(r + o) if f < 0, r + o if
          f = 0, otherwise r + tanh(o) * f / n. For the position bias query i is at (i + 0.5) / H * 2 - 1. There is no position
          bias "log_cpb".
      window_sizes: side of the windows of L, S and X blocks.
      neighborhood_sizes: side of the windows of N blocks.
      reduction_ratios: reduction of the map in P blocks.
      lpu: whether blocks have a local perception unit.
      conv_mlp: whether blocks have a convolution in the MLP.
      layer_scale_init: initial LayerScale; not positive for none.
      conv_patches: True for overlapping convolutions in stem and down-projections (DAT++), False for plain patches.
      expansion: hidden width of the MLPs, in widths of the stage.
      drop_path_rate: drop path rate of the last block; rates rise linearly from 0 over all blocks.
      remat: what the backward pass recomputes to save memory: "none", "blocks" (all but the inputs of the blocks) or "dots" (all
        but those and the results of linear layers).
      scan_blocks: whether the repeated blocks of a stage are one loop over stacked parameters, which compiles faster.
        Parameters keep their names; results differ by rounding, and drop path draws other random numbers.
      dtype: of the computation. Parameters are float32; positions, softmax and statistics are float32 or better.
      implementation: "auto", "plain", "pallas" or "triton", for every op, see ``ops.dispatch``. Only "plain" supports
        ``jax.jvp``.

    Raises:
      ValueError: the settings are inconsistent, or images have a wrong shape.

    Source: DAT++ (2309.01430), section 3 and table 1; DAT (CVPR 2022).
    """

    num_classes: int = 1000
    in_channels: int = 3
    image_size: int | tuple[int, int] = 224
    dim_stem: int = 64
    dims: tuple[int, ...] = (64, 128, 256, 512)
    stages: tuple[str, ...] = ("ND", "NDND", "ND" * 9, "DD")
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    num_groups: tuple[int, ...] = (1, 2, 4, 8)
    key_strides: tuple[int, ...] = (8, 4, 2, 1)
    offset_kernels: tuple[int, ...] = (9, 7, 5, 3)
    offset_range_factors: tuple[float, ...] = (-1, -1, -1, -1)
    position_bias: tuple[str, ...] = ("table", "table", "table", "table")
    use_offsets: tuple[bool, ...] = (True, True, True, True)
    deformable_form: str = "dat_pp"
    window_sizes: tuple[int, ...] = (7, 7, 7, 7)
    neighborhood_sizes: tuple[int, ...] = (7, 7, 7, 7)
    reduction_ratios: tuple[int, ...] = (8, 4, 2, 1)
    lpu: tuple[bool, ...] = (True, True, True, True)
    conv_mlp: tuple[bool, ...] = (True, True, True, True)
    layer_scale_init: tuple[float, ...] = (-1, -1, -1, -1)
    conv_patches: bool = True
    expansion: int = 4
    drop_path_rate: float = 0.0
    remat: str = "none"
    scan_blocks: bool = False
    dtype: Any = jnp.float32
    implementation: str = "auto"

    def setup(self):
        self._check()
        rates = np.linspace(0, self.drop_path_rate, sum(map(len, self.stages)))
        starts = np.cumsum([0, *map(len, self.stages)])
        self.patch_proj = Stem(self.dim_stem, conv_patches=self.conv_patches, dtype=self.dtype)
        self.stage_modules = [
            Stage(
                self.dims[i],
                [self._block_maker(i, kind) for kind in kinds],
                tuple(float(rate) for rate in rates[starts[i] : starts[i + 1]]),
                period=find_period(kinds),
                scan=self.scan_blocks,
                dtype=self.dtype,
                name=f"stages_{i}",
            )
            for i, kinds in enumerate(self.stages)
        ]
        self.down_projs = [
            DownProjection(dim, conv_patches=self.conv_patches, dtype=self.dtype) for dim in self.dims[1:]
        ]
        self.cls_norm = LayerNorm(dtype=self.dtype)
        self.cls_head = Linear(self.num_classes, dtype=jnp.promote_types(self.dtype, jnp.float32))

    def features(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        sizes: jax.Array | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Images (B, H, W, in_channels) -> the map after each stage, (B, H_i, W_i, dims[i]), without a norm.

        The strides are 4, 8, 16 and 32. With ``sizes``, int (B, 2), each image is the top left (height, width) pixels of its
        array, at least 32 x 32. Its maps fill the top left of the arrays, up to ``map_sizes``, and have the values that the
        image gives by itself.

        ``out_indices`` are the stages whose maps are returned, see ``resolve_out_indices``. Later ones are not computed.
        """
        out_indices = self.resolve_out_indices(out_indices)
        self._check_images(images)
        self._check_sizes(images, sizes)
        with dispatch.gradients_for(self.implementation):
            x = self.patch_proj(clear(images.astype(self.dtype), sizes), sizes)
            maps, map_sizes = [], None
            for index, stage in enumerate(self.stage_modules[: out_indices[-1] + 1]):
                if index:
                    x = self.down_projs[index - 1](x, map_sizes)
                map_sizes = None if sizes is None else self.map_sizes(sizes, stage=index)
                x = stage(x, train=train, sizes=map_sizes)
                maps.append(x)
        return tuple(maps[index] for index in out_indices)

    def __call__(self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None) -> jax.Array:
        """Images (B, H, W, in_channels) -> logits (B, num_classes). ``sizes``: see ``features``."""
        return self.classify(self.features(images, train=train, sizes=sizes)[-1], sizes=sizes)

    def classify(self, last_map: jax.Array, *, sizes: jax.Array | None = None) -> jax.Array:
        """The last of ``features``, (B, H, W, dims[-1]) -> logits (B, num_classes). ``sizes`` are those of the images."""
        with dispatch.gradients_for(self.implementation):
            return self.cls_head(self.pool(last_map, sizes=sizes))

    def pool(self, last_map: jax.Array, *, sizes: jax.Array | None = None) -> jax.Array:
        """The last of ``features``, (B, H, W, dims[-1]) -> the input of the head, (B, dims[-1]): the mean after a norm."""
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        with dispatch.gradients_for(self.implementation):
            x = self.cls_norm(last_map)
            if sizes is None:
                return x.mean(axis=(1, 2), dtype=dtype)
            last_sizes = self.map_sizes(sizes, stage=len(self.dims) - 1)
            pixels = inside((x.shape[1], x.shape[2]), last_sizes).sum(axis=(1, 2))
            return clear(x, last_sizes).sum(axis=(1, 2), dtype=dtype) / pixels.astype(dtype)[:, None]

    def _block_maker(self, i: int, kind: str):
        """Returns a function of a name and a parent that creates a block of stage ``i``."""
        options = dict(dtype=self.dtype, implementation=self.implementation)
        common = dict(
            expansion=self.expansion,
            lpu=self.lpu[i],
            conv_mlp=self.conv_mlp[i],
            **options,
        )
        if kind == "X":
            make_conv_block = with_remat(ConvBlock, self.remat)
            return lambda **place: make_conv_block(self.window_sizes[i], **common, **place)

        def make_attention(name):
            heads = self.num_heads[i]
            if kind == "N":
                return attention.NeighborhoodAttention(heads, self.neighborhood_sizes[i], **options, name=name)
            if kind in "LS":
                window = self.window_sizes[i]
                return attention.WindowAttention(heads, window, shifted=kind == "S", dtype=self.dtype, name=name)
            if kind == "P":
                return attention.SpatialReductionAttention(heads, self.reduction_ratios[i], dtype=self.dtype, name=name)
            if kind == "E":
                return attention.SlideAttention(heads, dtype=self.dtype, name=name)
            return attention.DeformableAttention(
                num_heads=heads,
                num_groups=self.num_groups[i],
                key_stride=self.key_strides[i],
                offset_kernel=self.offset_kernels[i],
                offset_range_factor=self.offset_range_factors[i],
                position_bias=self.position_bias[i],
                use_offsets=self.use_offsets[i],
                table_shape=self.table_shape(stage=i),
                form=self.deformable_form,
                **options,
                name=name,
            )

        make_block = with_remat(Block, self.remat)
        return lambda **place: make_block(make_attention, layer_scale_init=self.layer_scale_init[i], **common, **place)

    @nn.nowrap
    def resolve_out_indices(self, out_indices: Sequence[int] | None) -> tuple[int, ...]:
        """Indices of stages as a tuple; those of all stages if ``out_indices`` is None.

        Raises:
          ValueError: they are not a sequence of one or more integers from 0 to the last stage in ascending order.
        """
        indices = range(len(self.stages)) if out_indices is None else out_indices
        if (
            not isinstance(indices, Sequence)
            or not indices
            or not all(type(index) is int and 0 <= index < len(self.stages) for index in indices)
            or not all(index < later for index, later in itertools.pairwise(indices))
        ):
            raise ValueError(
                f"out_indices must be one or more stages from 0 to {len(self.stages) - 1} in ascending order, got {out_indices}."
            )
        return tuple(indices)

    def map_shape(self, image_shape: Sequence[int], *, stage: int) -> tuple[int, int]:
        """(H, W) of the map of a stage for images of (height, width)."""
        stride = 4 * 2**stage
        height, width = (-(-side // stride) if self.conv_patches else side // stride for side in image_shape)
        return height, width

    def key_shape(self, image_shape: Sequence[int], *, stage: int) -> tuple[int, int]:
        """(Hk, Wk) of the grid of keys of the deformable blocks of a stage, for images of (height, width)."""
        return key_grid_shape(
            self.map_shape(image_shape, stage=stage),
            kernel_size=self.offset_kernels[stage],
            stride=self.key_strides[stage],
        )

    def map_sizes(self, sizes: jax.Array, *, stage: int) -> jax.Array:
        """Int (B, 2), the sizes of the maps of a stage, from 0, for images of these sizes.

        Raises:
          ValueError: there is no such stage.
        """
        if stage not in range(len(self.stages)):
            raise ValueError(f"Expected a stage from 0 to {len(self.stages) - 1}, got {stage}.")
        sizes = jnp.asarray(sizes)
        stride = 4 * 2**stage
        return -(-sizes // stride) if self.conv_patches else sizes // stride

    def table_shape(self, *, stage: int) -> tuple[int, int]:
        """(H, W) of the map that the position tables of a stage are made for."""
        configured = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        return self.map_shape(configured, stage=stage)

    def _check(self):
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"Unknown remat {self.remat!r}; choose one of {', '.join(REMAT_POLICIES)}.")
        if self.deformable_form not in DEFORMABLE_FORMS:
            choices = ", ".join(DEFORMABLE_FORMS)
            raise ValueError(f"Unknown deformable_form {self.deformable_form!r}; choose one of {choices}.")
        dispatch.check_name(self.implementation)
        for name in _PER_STAGE_FIELDS:
            if len(getattr(self, name)) != len(self.stages):
                raise ValueError(
                    f"{name} expected one entry for each of the {len(self.stages)} stages, got {getattr(self, name)}."
                )
        for i, kinds in enumerate(self.stages):
            unknown = set(kinds) - set(STAGE_TYPES)
            if unknown:
                choices = ", ".join(f"{key} ({name})" for key, name in STAGE_TYPES.items())
                raise ValueError(f"Unknown block type {sorted(unknown)[0]!r} in stages; choose from {choices}.")
            if "D" in kinds and self.position_bias[i] == "log_cpb" and self.deformable_form == "cvpr2022":
                raise ValueError(f'Stage {i}: deformable_form "cvpr2022" has no position bias "log_cpb".')
            if "X" in kinds and self.window_sizes[i] % 2 == 0:  # an even window would change the size of the map
                raise ValueError(f"Stage {i}: X blocks need an odd window size, got {self.window_sizes[i]}.")
            if set(kinds) & set("NDLSPE") and self.dims[i] % self.num_heads[i]:
                raise ValueError(f"Stage {i}: {self.num_heads[i]} heads do not divide {self.dims[i]} channels.")

    def _check_sizes(self, images, sizes):
        if sizes is None:
            return
        is_array = isinstance(sizes, (jax.Array, np.ndarray))
        if not is_array or sizes.shape != (images.shape[0], 2) or not jnp.issubdtype(sizes.dtype, jnp.signedinteger):
            got = f"{sizes.dtype} {sizes.shape}" if is_array else type(sizes).__name__
            raise ValueError(
                f"DAT expected sizes as an int32 array ({images.shape[0]}, 2), the height and width of each image, got {got}."
            )
        if isinstance(sizes, Tracer):
            return
        sides = np.asarray(sizes)
        if (sides < MIN_IMAGE_SIDE).any() or (sides > np.asarray(images.shape[1:3])).any():
            raise ValueError(
                f"DAT expected sizes with sides from {MIN_IMAGE_SIDE} pixels to those of the images, {images.shape[1:3]}, "
                f"got {sides.tolist()}."
            )

    def _check_images(self, images):
        is_batch = images.ndim == 4 and images.shape[-1] == self.in_channels and images.shape[0] > 0
        if not is_batch or min(images.shape[1:3]) < MIN_IMAGE_SIDE:
            raise ValueError(
                f"DAT expected images (B, H, W, {self.in_channels}), at least one, with sides of at least {MIN_IMAGE_SIDE} "
                f"pixels, got {images.shape}."
            )
