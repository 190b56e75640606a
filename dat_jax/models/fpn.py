"""Feature pyramid network (1612.03144)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.ops.layers.resize import resize_nearest

EXTRA_LEVELS = ("convolutions", "subsampling")


class FPN(nn.Module):
    """Maps (B, H_i, W_i, C_i), from fine to coarse -> levels (B, H_i, W_i, features), and optionally coarser ones.

    1 x 1 convolutions, sums from coarse to fine, then 3 x 3 convolutions, without norms or activations. For the sum the coarser
    map is resized by nearest neighbor to the exact size of the finer one.

    Attributes:
      features: channels of all levels.
      levels: number of levels in the output; 0 for the number of input maps.
      extra: how the additional levels are computed. "convolutions": 3 x 3 with stride 2, the first one of the coarsest input map,
        every other one of the level before it. "subsampling": every second pixel of the level before it.
      dtype: of the computation.
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
