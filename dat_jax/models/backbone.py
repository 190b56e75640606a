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
    """Feature maps for another head: images (B, H, W, 3), normalized -> one map (B, H_i, W_i, C_i) per chosen stage.

    The next stage gets the map without its norm. ``sizes``: see ``DAT.features``. Training needs a random key "dropout" if the
    drop path rate is not zero.

    Attributes:
      dat: the model; its classifier is not used and has no parameters.
      out_indices: indices of the stages whose maps are returned, in ascending order; None for all, usually 0, 1, 2 and 3 with
        the strides 4, 8, 16 and 32. Stages after the last one are not computed and have no parameters.
      output_norms: whether each returned map has a LayerNorm of its own, as in the published segmentors and detectors.
      dtype: of the norms.

    Raises:
      ValueError: ``out_indices`` are not indices of stages in ascending order.

    Source: the published detection and segmentation code.
    """

    dat: DAT
    out_indices: tuple[int, ...] | None = None
    output_norms: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, sizes: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        indices = self.dat.resolve_out_indices(self.out_indices)
        maps = self.dat.features(images, train=train, sizes=sizes, out_indices=indices)
        if not self.output_norms:
            return maps
        with dispatch.gradients_for(self.dat.implementation):
            return tuple(
                LayerNorm(name=f"norms_{index}", dtype=self.dtype)(x) for index, x in zip(indices, maps, strict=True)
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of channels of each map."""
        return tuple(self.dat.dims[index] for index in self.dat.resolve_out_indices(self.out_indices))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of each map."""
        return tuple(4 * 2**index for index in self.dat.resolve_out_indices(self.out_indices))

    @nn.nowrap
    def level_sizes(self, sizes: jax.Array | None) -> tuple[jax.Array | None, ...]:
        """Int (B, 2) for each map, the sizes for images of these sizes; None for each map if ``sizes`` is None."""
        indices = self.dat.resolve_out_indices(self.out_indices)
        return tuple(None if sizes is None else self.dat.map_sizes(sizes, stage=index) for index in indices)
