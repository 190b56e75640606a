"""The backbone of dense prediction: DAT's feature maps, each with a norm of its own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.dat import DAT
from dat_jax.models.layers import LayerNorm


class Backbone(nn.Module):
    """(B, H, W, 3), normalised -> the four maps of ``DAT.features``, those of ``out_indices`` after a LayerNorm each.

    The next stage gets the map before its norm. ``dat`` is used without its classifier, so there are no parameters of one.
    Source: the published detection and segmentation code.
    """

    dat: DAT
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, ...]:
        maps = self.dat.features(images, train=train)
        return tuple(
            LayerNorm(name=f"norms_{index}", dtype=self.dtype)(x) if index in self.out_indices else x
            for index, x in enumerate(maps)
        )
