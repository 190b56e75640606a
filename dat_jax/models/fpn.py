"""Feature pyramid network (1612.03144)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.ops.layers.resize import resize_nearest

EXTRA_LEVELS = ("convolutions", "subsampling")


class FPN(nn.Module):
    """Maps (B, H_i, W_i, C_i), fine to coarse -> as many of width ``features``, and coarser ones: 1 x 1, top-down sums, 3 x 3.

    Neither norm nor activation; the coarser map is resized by nearest neighbour to the exact size of the finer one.

    Attributes:
      features: width of all levels.
      levels: how many come out; 0 for as many as go in.
      extra: where the further ones come from: "convolutions", 3 x 3 with stride 2, the first on the coarsest map that goes in
        and each other one on the level before it; or "subsampling" of the level before by 2.
    """

    features: int = 256
    levels: int = 0
    extra: str = "convolutions"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        if self.extra not in EXTRA_LEVELS:
            raise ValueError(f"Unknown extra levels {self.extra!r}; choose one of {', '.join(EXTRA_LEVELS)}.")

        def conv(side, name, stride=1):
            return nn.Conv(
                self.features,
                (side, side),
                strides=(stride, stride),
                padding=side // 2,
                kernel_init=nn.initializers.xavier_uniform(),
                dtype=self.dtype,
                name=name,
            )

        laterals = [conv(1, f"lateral_convs_{index}")(x) for index, x in enumerate(maps)]
        for index in range(len(laterals) - 1, 0, -1):
            laterals[index - 1] += resize_nearest(laterals[index], laterals[index - 1].shape[1:3])
        outputs = [conv(3, f"fpn_convs_{index}")(x) for index, x in enumerate(laterals)]
        for index in range(len(maps), self.levels):
            if self.extra == "subsampling":
                outputs.append(outputs[-1][:, ::2, ::2])
            else:
                outputs.append(conv(3, f"fpn_convs_{index}", stride=2)(maps[-1] if index == len(maps) else outputs[-1]))
        return tuple(outputs)
