"""DAT and DAT++: the backbone and its classifier."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.models import attention
from dat_jax.models.layers import DepthwiseConv, DropPath, LayerNorm, LayerScale, Linear, Mlp, conv
from dat_jax.ops.attention import deformable as deformable_ops
from dat_jax.ops.layers import activation

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
LATER_STAGE_TYPES = frozenset("NEX")  # they came with DAT++: DAT v1 as released has none of them
DEFORMABLE_FORMS = deformable_ops.FORMS  # of ``DAT.deformable_form``
_REMAT_POLICIES = {
    "none": None,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_ENTRY_A_STAGE = (
    *("dims", "num_heads", "num_groups", "key_strides", "offset_kernels", "offset_range_factors", "position_bias"),
    *("use_offsets", "window_sizes", "neighborhood_sizes", "reduction_ratios", "lpu", "conv_mlp", "layer_scale_init"),
)


class Stem(nn.Module):
    """(B, H, W, 3) -> (B, H / 4, W / 4, features), rounded up with convolutions, down with plain patches."""

    features: int
    conv_patches: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        if not self.conv_patches:
            x = conv(self.features, 3, kernel_size=4, stride=4, padding=0, name="conv1", dtype=self.dtype)(x)
            return LayerNorm(name="norm1", dtype=self.dtype)(x)
        half = self.features // 2
        x = conv(half, 3, kernel_size=3, stride=2, padding=1, name="conv1", dtype=self.dtype)(x)
        x = activation.gelu(LayerNorm(name="norm1", dtype=self.dtype)(x))
        x = conv(self.features, half, kernel_size=3, stride=2, padding=1, name="conv2", dtype=self.dtype)(x)
        return LayerNorm(name="norm2", dtype=self.dtype)(x)


class DownProjection(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, features), rounded as the stem's."""

    features: int
    conv_patches: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        kernel_size, padding = (3, 1) if self.conv_patches else (2, 0)
        window = dict(kernel_size=kernel_size, stride=2, padding=padding)
        x = conv(self.features, x.shape[-1], **window, use_bias=False, name="conv", dtype=self.dtype)(x)
        return LayerNorm(name="norm", dtype=self.dtype)(x)


class Block(nn.Module):
    """(LPU,) attention and MLP, each in a residual branch. ``make_attention`` makes the attention, given its name."""

    make_attention: Any
    expansion: int
    lpu: bool
    conv_mlp: bool
    layer_scale_init: float
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x, drop_path_rate, train: bool):
        def branch(x, module, index):
            x = module(LayerNorm(name=f"norm{index}", dtype=self.dtype)(x))
            if self.layer_scale_init > 0:
                x = LayerScale(self.layer_scale_init, dtype=self.dtype, name=f"layer_scale{index}")(x)
            return DropPath()(x, drop_path_rate, train=train)

        if self.lpu:
            x = x + DepthwiseConv(dtype=self.dtype, implementation=self.implementation, name="lpu")(x)
        mlp = Mlp(self.expansion, self.conv_mlp, dtype=self.dtype, implementation=self.implementation, name="mlp")
        x = x + branch(x, self.make_attention(name="attn"), 1)
        return x + branch(x, mlp, 2)


class ConvBlock(nn.Module):
    """(LPU,) then one residual branch of depthwise convolution, LayerNorm and MLP, as in ConvNeXt (stage type X)."""

    window_size: int
    expansion: int
    lpu: bool
    conv_mlp: bool
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x, drop_path_rate, train: bool):
        options = dict(dtype=self.dtype, implementation=self.implementation)
        if self.lpu:
            x = x + DepthwiseConv(**options, name="lpu")(x)
        branch = DepthwiseConv(self.window_size, **options, name="conv")(x)
        branch = LayerNorm(name="norm", dtype=self.dtype)(branch)
        branch = Mlp(self.expansion, self.conv_mlp, **options, name="mlp")(branch)
        return x + DropPath()(branch, drop_path_rate, train=train)


class Stage(nn.Module):
    """The blocks of one resolution, after a projection where the width changes.

    Attributes:
      features: width.
      blocks: functions of a name and a parent, each making a block.
      drop_path_rates: of the blocks.
      period: blocks i and i + period are alike. Where scan is set, the repetitions are one loop over their stacked
        parameters, so that one of them is compiled; parameters keep their names.
      scan: see ``DAT``.
    """

    features: int
    blocks: Any
    drop_path_rates: tuple[float, ...]
    period: int
    scan: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool):
        if x.shape[-1] != self.features:
            x = Linear(self.features, name="proj", dtype=self.dtype)(x)
        if self.scan and len(self.blocks) > self.period and not self.is_initializing():
            return self._scan(x, train)
        for index, (make_block, rate) in enumerate(zip(self.blocks, self.drop_path_rates, strict=True)):
            # Drop path is all that training changes; remat makes a traced number of a rate of zero.
            x = make_block(name=f"blocks_{index}", parent=self)(x, rate, train and rate > 0)
        return x

    def _scan(self, x, train):
        """All repetitions of the first ``period`` blocks, in a loop."""
        blocks = [make_block(name=None, parent=None) for make_block in self.blocks[: self.period]]
        params = self.variables["params"]

        def stack(position):  # of the blocks at one position of the period: (repetitions, ...)
            trees = [params[f"blocks_{index}"] for index in range(position, len(self.blocks), self.period)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

        repetitions = len(self.blocks) // self.period
        rates = jnp.asarray(self.drop_path_rates, jnp.float32).reshape(repetitions, self.period)
        random = train and max(self.drop_path_rates) > 0
        keys = jax.random.split(self.make_rng("dropout"), rates.shape) if random else None
        sow = self.is_mutable_collection("intermediates")

        def repetition(x, inputs):
            params, rates, keys = inputs
            sown = []
            for position, block in enumerate(blocks):
                rngs = {"dropout": keys[position]} if random else {}
                arguments = ({"params": params[position]}, x, rates[position], random)
                if sow:
                    x, state = block.apply(*arguments, rngs=rngs, mutable=["intermediates"])
                    sown.append(state.get("intermediates", {}))
                else:
                    x = block.apply(*arguments, rngs=rngs)
            return x, sown

        x, sown = jax.lax.scan(repetition, x, ([stack(position) for position in range(self.period)], rates, keys))
        for index in range(len(self.blocks) if sow else 0):
            of_block = jax.tree.map(lambda leaf, i=index: leaf[i // self.period], sown[index % self.period])
            if of_block:
                self.put_variable("intermediates", f"blocks_{index}", of_block)
        return x


def _remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The block as ``DAT.remat`` says."""
    if policy == "none":
        return block
    # ``train`` decides what is computed; the module itself is argument 0
    return nn.remat(block, static_argnums=(3,), policy=_REMAT_POLICIES[policy])


def _period(kinds: str) -> int:
    """Of "NDNDND" 2, of "DD" 1, of "NDD" 3."""
    return next(p for p in range(1, len(kinds) + 1) if kinds[:p] * (len(kinds) // p) == kinds)


class DAT(nn.Module):
    """Vision transformer with deformable attention.

    ``model.apply(variables, images, train=False)`` takes images (B, H, W, 3), normalised by the ImageNet mean and
    deviation, of any size from 32 x 32, and returns logits (B, num_classes) in float32 or better. Training needs a
    random key "dropout" where the drop path rate is not zero.

    Attributes (tuples have one entry a stage):
      num_classes: width of the head.
      image_size: side, or (height, width), of the images that position tables are made for; others work as well.
      dim_stem, dims: widths.
      stages: a string of block types a stage, such as "ND"; ``STAGE_TYPES`` lists them.
      num_heads: attention heads.
      num_groups, key_strides, offset_kernels, offset_range_factors, position_bias, use_offsets: of D blocks, see
        ``attention.DeformableAttention``.
      deformable_form: which of the two published forms D blocks have. Both have the same parameters, so only the numbers
        show which form weights were trained with. With n keys on a side of H pixels, offset o of key i and range factor f:

        * "dat_pp", the form published with DAT++: reference point r = (i + 0.5) / (n - 1) * 2 - 1, position
          clip(r + o, -1, 1) if f < 0, else r + tanh(o) * f / (n - 1). Query i looks its position bias up at
          2 i / (H - 1) - 1.
        * "cvpr2022", DAT v1 as it was released: r = (i + 0.5) / n * 2 - 1, position tanh(r + o) if f < 0, else
          r + tanh(o) * f / n (r + o if f = 0). Query i looks its position bias up at (i + 0.5) / H * 2 - 1. There is no
          position bias "log_cpb".
      window_sizes: of L, S and X blocks. neighborhood_sizes: of N blocks. reduction_ratios: of P blocks.
      lpu, conv_mlp: whether a stage's blocks have a local perception unit, a convolution in the MLP.
      conv_patches: overlapping convolutions in stem and down-projections (DAT++), or plain patches.
      layer_scale_init: initial LayerScale; not positive for none.
      expansion: width of the MLPs, in widths of the stage.
      drop_path_rate: of the last block; rises linearly from 0 over all blocks.
      remat: what is computed again in the backward pass instead of kept: "none", "blocks" (all but the inputs of the
        blocks) or "dots" (all but those and the results of linear layers).
      scan_blocks: the repeated blocks of a stage are one loop over their stacked parameters instead of so many copies,
        which compiles faster. Parameters have the same names, results differ by rounding, drop path by its draws.
      dtype: of the computation. Parameters are float32; positions, softmax and statistics float32 or better.
      implementation: "auto" or "plain", of every op, or "pallas", TPU kernels of those that have one (see ``ops.dispatch``).

    Raises:
      ValueError: the settings do not fit together, or images have an impossible shape.

    Source: DAT++ (2309.01430), section 3 and table 1; DAT (CVPR 2022).
    """

    num_classes: int = 1000
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
        options = dict(conv_patches=self.conv_patches, dtype=self.dtype)
        rates = np.linspace(0, self.drop_path_rate, sum(map(len, self.stages)))
        starts = np.cumsum([0, *map(len, self.stages)])
        self.patch_proj = Stem(self.dim_stem, **options)
        self.stage_modules = [
            Stage(
                self.dims[i],
                [self._block_maker(i, kind) for kind in kinds],
                tuple(float(rate) for rate in rates[starts[i] : starts[i + 1]]),
                period=_period(kinds),
                scan=self.scan_blocks,
                dtype=self.dtype,
                name=f"stages_{i}",
            )
            for i, kinds in enumerate(self.stages)
        ]
        self.down_projs = [DownProjection(dim, **options) for dim in self.dims[1:]]
        self.cls_norm = LayerNorm(dtype=self.dtype)
        self.cls_head = Linear(self.num_classes, dtype=jnp.promote_types(self.dtype, jnp.float32))

    def features(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, ...]:
        """(B, H, W, 3) -> the map after each stage, strides 4, 8, 16 and 32, (B, H_i, W_i, dims[i]), without any norm
        after it.
        """
        self._check_images(images)
        x = self.patch_proj(images.astype(self.dtype))
        maps = []
        for index, stage in enumerate(self.stage_modules):
            x = stage(self.down_projs[index - 1](x) if index else x, train=train)
            maps.append(x)
        return tuple(maps)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> logits (B, num_classes)."""
        return self.classify(self.features(images, train=train)[-1])

    def classify(self, last_map: jax.Array) -> jax.Array:
        """The last of ``features``, (B, H, W, dims[-1]) -> logits (B, num_classes)."""
        x = self.cls_norm(last_map)
        return self.cls_head(x.mean(axis=(1, 2), dtype=jnp.promote_types(self.dtype, jnp.float32)))

    def _block_maker(self, i: int, kind: str):
        """A function of a name and a parent that makes a block of stage ``i``."""
        options = dict(dtype=self.dtype, implementation=self.implementation)
        common = dict(
            expansion=self.expansion,
            lpu=self.lpu[i],
            conv_mlp=self.conv_mlp[i],
            **options,
        )
        if kind == "X":
            make_conv_block = _remat(ConvBlock, self.remat)
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

        make_block = _remat(Block, self.remat)
        return lambda **place: make_block(make_attention, layer_scale_init=self.layer_scale_init[i], **common, **place)

    def map_shape(self, image_shape: tuple[int, int], *, stage: int) -> tuple[int, int]:
        """(H, W) of a stage's map for images of a size."""
        stride = 4 * 2**stage
        return tuple(-(-side // stride) if self.conv_patches else side // stride for side in image_shape)

    def table_shape(self, *, stage: int) -> tuple[int, int]:
        """(H, W) of the map that a stage's position tables are made for."""
        configured = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        return self.map_shape(configured, stage=stage)

    def _check(self):
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate wants a number from 0 to below 1, got {self.drop_path_rate}.")
        if self.remat not in _REMAT_POLICIES:
            raise ValueError(f"Unknown remat {self.remat!r}; choose one of {', '.join(_REMAT_POLICIES)}.")
        if self.deformable_form not in DEFORMABLE_FORMS:
            choices = ", ".join(DEFORMABLE_FORMS)
            raise ValueError(f"Unknown deformable_form {self.deformable_form!r}; choose one of {choices}.")
        for name in _ENTRY_A_STAGE:
            if len(getattr(self, name)) != len(self.stages):
                raise ValueError(
                    f"{name} wants one entry for each of the {len(self.stages)} stages, got {getattr(self, name)}."
                )
        for i, kinds in enumerate(self.stages):
            unknown = set(kinds) - set(STAGE_TYPES)
            if unknown:
                choices = ", ".join(f"{key} ({name})" for key, name in STAGE_TYPES.items())
                raise ValueError(f"Unknown block type {sorted(unknown)[0]!r} in stages; choose from {choices}.")
            if "D" in kinds and self.position_bias[i] == "log_cpb" and self.deformable_form == "cvpr2022":
                raise ValueError(f'Stage {i}: deformable_form "cvpr2022" has no position bias "log_cpb".')
            if "X" in kinds and self.window_sizes[i] % 2 == 0:  # the residual sum needs a map of the same size
                raise ValueError(f"Stage {i}: X blocks want an odd window, got {self.window_sizes[i]}.")
            if set(kinds) & set("NDLSPE") and self.dims[i] % self.num_heads[i]:
                raise ValueError(f"Stage {i}: {self.num_heads[i]} heads do not divide {self.dims[i]} channels.")

    def _check_images(self, images):
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < MIN_IMAGE_SIDE:
            raise ValueError(
                f"DAT wants images (B, H, W, 3) with sides of at least {MIN_IMAGE_SIDE} pixels, got {images.shape}."
            )
