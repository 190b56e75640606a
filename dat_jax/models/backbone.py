"""The backbone of dense prediction: the feature maps of a DAT, each with its own norm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.dat import DAT
from dat_jax.models.layers import LayerNorm
from dat_jax.models.mesh_axes import MeshModule
from dat_jax.ops import dispatch


class Backbone(MeshModule):
    """Images (B, H, W, 3), normalized -> the four maps of ``DAT.features``, with a LayerNorm on some of them.

    The next stage gets the map without this norm. ``sizes``: see ``DAT.features``.

    Attributes:
      dat: the model; its classifier is not used and has no parameters.
      out_indices: indices of the maps with a norm.
      dtype: of the norms.

    Source: the published detection and segmentation code.
    """

    dat: DAT
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        maps = self.dat.features(images, train=train, sizes=sizes)
        with dispatch.gradients_for(self.dat.implementation):
            return tuple(
                LayerNorm(name=f"norms_{index}", dtype=self.dtype)(x) if index in self.out_indices else x
                for index, x in enumerate(maps)
            )

    @nn.nowrap
    def level_sizes(self, sizes: jax.Array | None) -> tuple[jax.Array | None, ...]:
        """Int (B, 2) for each map, the sizes for images of these sizes; None for each map if ``sizes`` is None."""
        if sizes is None:
            return (None,) * len(self.dat.dims)
        return tuple(self.dat.map_sizes(sizes, stage=stage) for stage in range(len(self.dat.dims)))
