"""The layers between the stages, which make patches of pixels: the stem and the down-projections."""

from typing import Any

import flax.linen as nn
import jax

from dat_jax.models.layers import LayerNorm, conv
from dat_jax.ops.layers.activation import gelu
from dat_jax.ops.memory import store_on_cpu
from dat_jax.ops.sizes import clear, convolved


class Stem(nn.Module):
    """Images (B, H, W, C) -> (B, H / 4, W / 4, features). ``sizes``: of the images, see ``ops.sizes``; zeros lie beyond them.

    Attributes:
      features: output channels.
      conv_patches: True for two overlapping convolutions, which round sizes up; False for plain patches, which round down.
      dtype: of the computation.
    """

    features: int
    conv_patches: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, sizes: jax.Array | None = None):
        if not self.conv_patches:
            x = conv(self.features, x.shape[-1], kernel_size=4, stride=4, padding=0, name="conv1", dtype=self.dtype)(x)
            return LayerNorm(name="norm1", dtype=self.dtype)(x)
        half = self.features // 2
        x = conv(half, x.shape[-1], kernel_size=3, stride=2, padding=1, name="conv1", dtype=self.dtype)(x)
        x = gelu(LayerNorm(name="norm1", dtype=self.dtype)(x))
        x = clear(x, convolved(sizes, kernel_size=3, stride=2, padding=1))
        x = conv(self.features, half, kernel_size=3, stride=2, padding=1, name="conv2", dtype=self.dtype)(x)
        return LayerNorm(name="norm2", dtype=self.dtype)(x)


class DownProjection(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, features). ``sizes``: of the input, see ``ops.sizes``.

    Attributes:
      features: output channels.
      conv_patches: True for overlapping convolutions, which round sizes up; False for plain patches, which round down.
      dtype: of the computation.
    """

    features: int
    conv_patches: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, sizes: jax.Array | None = None):
        x = store_on_cpu(clear(x, sizes))
        kernel_size, padding = (3, 1) if self.conv_patches else (2, 0)
        window = dict(kernel_size=kernel_size, stride=2, padding=padding)
        x = conv(self.features, x.shape[-1], **window, use_bias=False, name="conv", dtype=self.dtype)(x)
        return LayerNorm(name="norm", dtype=self.dtype)(x)
