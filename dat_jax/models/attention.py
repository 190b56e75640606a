"""Attention modules of the stage types: parameters and projections around the functions of ``dat_jax.ops.attention``.

Each module maps (B, H, W, C) to (B, H, W, C), for any H and W. With ``sizes``, int (B, 2), each example fills only this part of
the map, see ``ops.sizes``.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.layers import (
    DepthwiseConv,
    KernelAndBias,
    LayerNorm,
    Linear,
    conv,
    table_init,
    uniform_init,
)
from dat_jax.ops.attention.branches import (
    deformable_branch,
    deformable_uses_pallas,
    neighborhood_branch,
    neighborhood_uses_pallas,
)
from dat_jax.ops.attention.deformable import deformable_attention, key_grid_shape, key_positions
from dat_jax.ops.attention.grid_sample import grid_sample, to_pixels
from dat_jax.ops.attention.multi_head import multi_head_attention
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.attention.position_bias import log_displacements
from dat_jax.ops.attention.slide import slide_attention
from dat_jax.ops.attention.window import window_attention
from dat_jax.ops.layers.activation import gelu
from dat_jax.ops.layers.norm_linear import choose_norm_linear, norm_linear
from dat_jax.ops.layers.resize import traced_bilinear_weights
from dat_jax.ops.sizes import clear, convolved, inside

POSITION_BIAS_KINDS = ("table", "dwc", "fixed", "log_cpb", "none")


def _pad_bottom_right(x, height, width):
    """Pads with zeros below and to the right, up to the given size."""
    return jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))


class AttentionModule(nn.Module):
    """The attention of a block. It may also compute the whole residual branch around it, as one kernel."""

    def fuses(self, shape: tuple[int, ...], sizes: jax.Array | None, *, is_branch: bool) -> bool:
        """Whether the module of a map (B, H, W, C) takes the arguments ``norm`` and ``factors`` of a residual branch.

        Args:
          shape: (B, H, W, C).
          sizes: see ``ops.sizes``.
          is_branch: always True.
        """
        del shape, sizes, is_branch
        return False


class DeformableAttention(AttentionModule):
    """Deformable attention with a position bias of one of five kinds (stage type D).

    It sows the key positions as intermediates/positions: (B, G, Hk, Wk, 2), (y, x), normalized to [-1, 1].

    Attributes:
      num_heads: M, a divisor of the channels.
      num_groups: G, a divisor of M.
      key_stride: stride of the offset network's depthwise convolution.
      offset_kernel: kernel size of that convolution.
      offset_range_factor: f; negative for free offsets and clamped positions.
      position_bias: the kind of position bias.

        * "table": a lookup in a table.
        * "dwc": a depthwise convolution of the queries, added to the output.
        * "fixed": one parameter for each head, query and key.
        * "log_cpb": a small network on log-spaced displacements.
        * "none": no position bias.
      use_offsets: False for no offsets and no sampling: the keys are x average-pooled, without position bias.
      table_shape: (H0, W0), shape of the map that tables are made for.
      form: "dat_pp" or "cvpr2022", see ``DAT.deformable_form``.
      dtype: of the computation; positions are float32 or better.
      implementation: "auto", "plain", "pallas" or "triton", for every op in the module, see ``ops.dispatch``.

    Source: DAT (CVPR 2022), section 3.2; DAT++ (2309.01430), section 3.3; kinds as in the published code.
    """

    num_heads: int
    num_groups: int
    key_stride: int
    offset_kernel: int
    offset_range_factor: float
    position_bias: str
    use_offsets: bool
    table_shape: tuple[int, int]
    form: str = "dat_pp"
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x,
        sizes: jax.Array | None = None,
        *,
        norm: tuple[jax.Array, jax.Array] | None = None,
        factors: jax.Array | None = None,
    ):
        """The attention of ``x``, or with ``norm`` and ``factors`` the residual branch of ``branches.deformable_branch``."""
        batch, height, width, channels = x.shape
        groups, kind = self.num_groups, self.position_bias
        key_shape, key_sizes = self._key_shape((height, width)), self._key_sizes(sizes)
        inputs, projection = x.astype(self.dtype), None
        if norm is not None:
            projection = KernelAndBias((channels, channels), channels, name="proj_q")()
            x, query = norm_linear(inputs, *norm, *projection, implementation=self.implementation)
        else:
            x = clear(x, sizes)
            query = Linear(channels, name="proj_q", dtype=self.dtype)(x)
        if channels % groups or self.num_heads % groups:
            raise ValueError(f"The {groups} groups must divide the {channels} channels and the {self.num_heads} heads.")
        if kind not in POSITION_BIAS_KINDS:
            raise ValueError(f"Unknown position bias {kind!r}; choose one of {', '.join(POSITION_BIAS_KINDS)}.")

        if self.use_offsets:
            positions = self._to_positions(self._predict_offsets(query, sizes), key_sizes)
            points = to_pixels(positions, (height, width), sizes).reshape(batch, groups, -1, 2)
            sampled = grid_sample(x, points, implementation=self.implementation)
        else:
            shape = (batch, groups, *key_shape, 2)
            positions = self._to_positions(jnp.zeros(shape), key_sizes)
            sampled = average_pool(x, stride=self.key_stride, pooled_shape=key_shape, sizes=sizes)
            sampled = sampled.reshape(batch, -1, channels)
        self.sow("intermediates", "positions", positions)

        key = Linear(channels, name="proj_k", dtype=self.dtype)(sampled)
        value = Linear(channels, name="proj_v", dtype=self.dtype)(sampled)
        lookup: dict[str, Any] = {}  # arguments of several types
        bias = None
        if self.use_offsets and kind == "table":
            side_y, side_x = (2 * size - 1 for size in self.table_shape)
            table = self.param("rpe_table", table_init(0.01), (self.num_heads, side_y, side_x))
            lookup = dict(table=table, **table_lookup(positions, (height, width), self.table_shape, self.form, sizes))
        elif self.use_offsets and kind == "fixed":
            bias = self._fixed_bias((height, width), sizes)
        elif self.use_offsets and kind == "log_cpb":
            bias = self._log_cpb(positions.reshape(batch, groups, -1, 2), (height, width), sizes)
        if norm is not None and projection is not None and factors is not None:
            return deformable_branch(
                inputs,
                *norm,
                *projection,
                key,
                value,
                lookup["points"],
                lookup["table"],
                *KernelAndBias((channels, channels), channels, name="proj_out")(),
                factors,
                num_heads=self.num_heads,
                implementation="pallas",
            )
        out = deformable_attention(
            query,
            key,
            value,
            num_heads=self.num_heads,
            **lookup,
            bias=bias,
            points_inside=self.offset_range_factor < 0,  # such positions are clamped
            sizes=sizes,
            key_mask=None if key_sizes is None else inside(key_shape, key_sizes).reshape(batch, -1),
            implementation=self.implementation,
        )
        if self.use_offsets and kind == "dwc":
            convolve = DepthwiseConv(dtype=self.dtype, implementation=self.implementation, name="rpe_table")
            out = out + convolve(query, sizes)
        return Linear(channels, name="proj_out", dtype=self.dtype)(out)

    def fuses(self, shape: tuple[int, ...], sizes: jax.Array | None, *, is_branch: bool) -> bool:
        """See ``AttentionModule``."""
        looks_up = self.use_offsets and self.position_bias == "table" and self.form == "dat_pp"
        if not is_branch or sizes is not None or not looks_up or self.offset_range_factor >= 0:
            return False
        keys = math.prod(self._key_shape(shape[1:3]))
        # It is used only with the kernel of the branch, so this is where its call is recorded.
        if self.implementation == "auto":
            choose_norm_linear(tuple(shape), shape[-1], self.dtype)
        return deformable_uses_pallas(
            shape,
            points=(shape[0], self.num_groups, keys, 2),
            table=(self.num_heads, *(2 * size - 1 for size in self.table_shape)),
            num_heads=self.num_heads,
            dtype=self.dtype,
            implementation=self.implementation,
        )

    def _key_shape(self, map_shape):
        return key_grid_shape(map_shape, kernel_size=self.offset_kernel, stride=self.key_stride)

    def _key_sizes(self, sizes):
        kernel_size, stride = self.offset_kernel, self.key_stride
        padding = 0 if kernel_size == stride else kernel_size // 2
        return convolved(sizes, kernel_size=kernel_size, stride=stride, padding=padding)

    def _to_positions(self, offsets, key_sizes):
        return key_positions(offsets, range_factor=self.offset_range_factor, form=self.form, key_sizes=key_sizes)

    def _predict_offsets(self, query, sizes):
        """(B, H, W, C) -> (B, G, Hk, Wk, 2). In float32 or better: positions must resolve fractions of a pixel."""
        channels = query.shape[-1]
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        groups, kernel_size, stride = self.num_groups, self.offset_kernel, self.key_stride
        padding = 0 if kernel_size == stride else kernel_size // 2
        make = functools.partial(DepthwiseConv, kernel_size, stride, padding, groups=groups, dtype=dtype)
        x = make(implementation=self.implementation, name="conv_offset_0")(query, sizes)
        x = jnp.moveaxis(x.reshape(*x.shape[:3], groups, channels // groups), 3, 1)  # (B, G, Hk, Wk, C / G)
        x = gelu(LayerNorm(name="conv_offset_1", dtype=dtype)(x))
        return Linear(2, name="conv_offset_3", dtype=dtype, use_bias=False)(x)

    def _fixed_bias(self, map_shape, sizes):
        """(1 | B, M, H * W, N): the learned bias, resized linearly over queries and keys if the map has another size."""
        key_shape, table_keys = self._key_shape(map_shape), self._key_shape(self.table_shape)
        shape = (self.num_heads, math.prod(self.table_shape), math.prod(table_keys))
        bias = self.param("rpe_table", table_init(0.01), shape)
        if sizes is not None:
            bias = bias.reshape(self.num_heads, *self.table_shape, *table_keys)
            lines = [(map_shape, self.table_shape, sizes), (key_shape, table_keys, self._key_sizes(sizes))]
            weights = [
                jax.vmap(functools.partial(traced_bilinear_weights, old, count=count, dtype=bias.dtype))(new[:, axis])
                for shape, old_shape, new in lines
                for axis, (count, old) in enumerate(zip(shape, old_shape, strict=True))
            ]
            bias = jnp.einsum("myxvu,bhy,bwx,biv,bju->bmhwij", bias, *weights, precision=jax.lax.Precision.HIGHEST)
            return bias.reshape(sizes.shape[0], self.num_heads, math.prod(map_shape), math.prod(key_shape))
        if map_shape != self.table_shape:
            bias = bias.reshape(self.num_heads, *self.table_shape, *table_keys)
            bias = jax.image.resize(bias, (self.num_heads, *map_shape, *key_shape), "linear", antialias=False)
        return bias.reshape(1, self.num_heads, math.prod(map_shape), math.prod(key_shape))

    def _log_cpb(self, positions, map_shape, sizes):
        """(B, G, N, 2) -> bias (B, M, H * W, N)."""
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        heads = self.num_heads // self.num_groups
        x = log_displacements(positions, map_shape=map_shape, sizes=sizes)
        x = nn.relu(Linear(32, name="rpe_table_0", dtype=dtype)(x))
        x = Linear(heads, name="rpe_table_2", dtype=dtype, use_bias=False)(x)  # (B, G, H * W, N, M / G)
        return jnp.moveaxis(x, -1, 2).reshape(x.shape[0], self.num_heads, *x.shape[2:4])


def table_lookup(
    positions: jax.Array,
    map_shape: tuple[int, int],
    table_shape: tuple[int, int],
    form: str,
    sizes: jax.Array | None = None,
) -> dict[str, Any]:
    """Arguments "points" and "query_grid" of ``deformable_attention`` with a table.

    Args:
      positions: (B, G, Hk, Wk, 2), key positions (y, x) in normalized coordinates.
      map_shape: (H, W) of the map.
      table_shape: (H0, W0) of the map that the table was made for.
      form: see ``DAT.deformable_form``.
      sizes: int (B, 2), the size of each example's map; None for ``map_shape``.
    """
    if form == "dat_pp":
        points, grid = to_pixels(positions, map_shape, sizes), "corners"
    else:
        points, grid = to_pixels(positions, table_shape), "centers"
    return dict(points=points.reshape(*positions.shape[:2], -1, 2), query_grid=grid)


def average_pool(
    x: jax.Array, *, stride: int, pooled_shape: tuple[int, int], sizes: jax.Array | None = None
) -> jax.Array:
    """Mean over windows of stride x stride pixels; windows that reach over the border average the pixels inside the map.

    Args:
      x: (B, H, W, C).
      stride: side and step of the windows.
      pooled_shape: (H', W'). Windows entirely outside the map give zero.
      sizes: int (B, 2), the size of each example's map, beyond which ``x`` is zero; None for (H, W).

    Returns:
      (B, H', W', C).
    """
    covered = tuple(size * stride for size in pooled_shape)

    def window_sums(maps):  # (B, H, W, C) -> (B, H', W', C)
        maps = maps[:, : covered[0], : covered[1]]
        maps = _pad_bottom_right(maps, *covered)
        return maps.reshape(maps.shape[0], pooled_shape[0], stride, pooled_shape[1], stride, -1).sum(axis=(2, 4))

    if sizes is None:
        ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    else:
        ones = inside((x.shape[1], x.shape[2]), sizes)[..., None].astype(x.dtype)
    return window_sums(x) / jnp.maximum(window_sums(ones), 1)


class NeighborhoodAttention(AttentionModule):
    """Neighborhood attention (stage type N).

    A side smaller than the window is padded with zeros before the projection, without a mask, and cropped after the
    attention, as published for dense prediction.

    Attributes:
      num_heads: M, a divisor of the channels.
      kernel_size: side of the window in pixels.
      dtype: of the computation.
      implementation: see ``ops.dispatch``.
    """

    num_heads: int
    kernel_size: int
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x,
        sizes: jax.Array | None = None,
        *,
        norm: tuple[jax.Array, jax.Array] | None = None,
        factors: jax.Array | None = None,
    ):
        """The attention of ``x``, or with ``norm`` and ``factors`` the residual branch of ``branches.neighborhood_branch``."""
        _, height, width, channels = x.shape
        k = self.kernel_size
        if norm is not None and factors is not None:
            return neighborhood_branch(
                x.astype(self.dtype),
                *norm,
                *KernelAndBias((channels, 3 * channels), channels, name="qkv")(),
                self.param("rpb", table_init(0.02), (self.num_heads, 2 * k - 1, 2 * k - 1)),
                *KernelAndBias((channels, channels), channels, name="proj")(),
                factors,
                kernel_size=k,
                num_heads=self.num_heads,
                implementation="pallas",
            )
        x = _pad_bottom_right(clear(x, sizes), max(height, k), max(width, k))
        query, key, value = jnp.split(Linear(3 * channels, name="qkv", dtype=self.dtype)(x), 3, axis=-1)
        table = self.param("rpb", table_init(0.02), (self.num_heads, 2 * k - 1, 2 * k - 1))
        out = neighborhood_attention(
            query,
            key,
            value,
            table,
            kernel_size=k,
            num_heads=self.num_heads,
            sizes=None if sizes is None else jnp.maximum(sizes, k),
            implementation=self.implementation,
        )
        return Linear(channels, name="proj", dtype=self.dtype)(out[:, :height, :width])

    def fuses(self, shape: tuple[int, ...], sizes: jax.Array | None, *, is_branch: bool) -> bool:
        """See ``AttentionModule``."""
        options = dict(dtype=self.dtype, implementation=self.implementation)
        heads, side = self.num_heads, self.kernel_size
        return (
            is_branch
            and sizes is None
            and neighborhood_uses_pallas(shape, kernel_size=side, num_heads=heads, **options)
        )


class WindowAttention(AttentionModule):
    """Window attention (stage type L), or shifted window attention (stage type S).

    A side that is not a multiple of the window is padded with zeros before the projection, without a mask, and cropped after the
    attention, as published for dense prediction.

    Attributes:
      num_heads: M, a divisor of the channels.
      window_size: side of the windows in pixels.
      shifted: whether the windows are shifted.
      dtype: of the computation.
    """

    num_heads: int
    window_size: int
    shifted: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, sizes: jax.Array | None = None):
        _, height, width, channels = x.shape
        w = self.window_size
        x = _pad_bottom_right(clear(x, sizes), -(-height // w) * w, -(-width // w) * w)
        query, key, value = jnp.split(Linear(3 * channels, name="proj_qkv", dtype=self.dtype)(x), 3, axis=-1)
        shape = ((2 * w - 1) ** 2, self.num_heads)
        table = self.param("relative_position_bias_table", table_init(0.01), shape)
        out = window_attention(
            query,
            key,
            value,
            table,
            window_size=w,
            num_heads=self.num_heads,
            shifted=self.shifted,
            sizes=None if sizes is None else -(-sizes // w) * w,
        )
        return Linear(channels, name="proj_out", dtype=self.dtype)(out[:, :height, :width])


class SpatialReductionAttention(AttentionModule):
    """Attention of every pixel to a map that a strided convolution reduced (stage type P).

    As published, the convolution ignores rows and columns beyond its last whole window. A map smaller than one window is padded
    with zeros to one window.

    Attributes:
      num_heads: M, a divisor of the channels.
      ratio: stride and kernel size of the convolution; 1 for no convolution.
      dtype: of the computation.

    Source: Pyramid Vision Transformer (2102.12122).
    """

    num_heads: int
    ratio: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, sizes: jax.Array | None = None):
        batch, height, width, channels = x.shape
        x = clear(x, sizes)
        query = Linear(channels, name="q", dtype=self.dtype)(x).reshape(batch, -1, channels)
        if self.ratio > 1:
            x = _pad_bottom_right(x, max(height, self.ratio), max(width, self.ratio))
            reduce = functools.partial(conv, channels, channels, kernel_size=self.ratio, stride=self.ratio, padding=0)
            x = reduce(name="proj_ds_0", dtype=self.dtype)(x)
            x = LayerNorm(name="proj_ds_1", dtype=self.dtype)(x)
        bias = None
        if sizes is not None:
            keys = inside((x.shape[1], x.shape[2]), jnp.maximum(sizes // self.ratio, 1)).reshape(batch, 1, 1, -1)
            bias = jnp.where(keys, jnp.zeros((), jnp.promote_types(self.dtype, jnp.float32)), -jnp.inf)
        packed = Linear(2 * channels, name="kv", dtype=self.dtype)(x.reshape(batch, -1, channels))
        key, value = jnp.split(packed, 2, axis=-1)
        out = multi_head_attention(query, key, value, num_heads=self.num_heads, bias=bias)
        return Linear(channels, name="proj", dtype=self.dtype)(out.reshape(batch, height, width, channels))


class SlideAttention(AttentionModule):
    """Slide attention (stage type E), computed in a quarter of the channels.

    Attributes:
      num_heads: M; 4 * M divides the channels.
      dtype: of the computation.

    Source: Slide-Transformer (2304.04237), in the form of the published DAT++ code.
    """

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, sizes: jax.Array | None = None):
        batch, height, width, channels = x.shape
        inner, heads = channels // 4, self.num_heads
        if channels % (4 * heads):
            raise ValueError(
                f"Slide attention expected channels that are a multiple of 4 * {heads} heads, got {channels}."
            )
        packed = Linear(3 * inner, name="qkv", dtype=self.dtype)(x)
        packed = packed.reshape(batch, height, width, heads, 3, inner // heads)  # ordered (head, q | k | v, width)
        query, key, value = (packed[..., i, :].reshape(batch, height, width, inner) for i in range(3))
        key, value = clear(key, sizes), clear(value, sizes)
        versions = 9 * inner // heads
        kernel = self.param("dep_conv1_kernel", uniform_init(9), (3, 3, 1, versions))
        bias_fixed = self.param("dep_conv_bias", uniform_init(9), (versions,))
        bias_learned = self.param("dep_conv1_bias", uniform_init(9), (versions,))
        table = self.param("relative_position_bias_table", table_init(0.01), (1, heads, 1, 9, 1, 1))
        out = slide_attention(
            query,
            key,
            value,
            kernel.astype(self.dtype),
            (bias_fixed + bias_learned).astype(self.dtype),
            table.reshape(heads, 9).astype(self.dtype),
            num_heads=heads,
            scale=1 / math.sqrt(channels / heads),
        )
        return Linear(channels, name="proj", dtype=self.dtype)(out)
