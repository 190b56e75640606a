"""Feature pyramid network (1612.03144)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.ops.resize import resize_nearest


class FPN(nn.Module):
    """Maps (B, H_i, W_i, C_i), fine to coarse -> as many of width ``features``: 1 x 1, top-down sums, 3 x 3.

    Neither norm nor activation; the coarser map is resized by nearest neighbour to the exact size of the finer one.
    """

    features: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        def conv(side, name):
            return nn.Conv(
                self.features,
                (side, side),
                padding=side // 2,
                kernel_init=nn.initializers.xavier_uniform(),
                dtype=self.dtype,
                name=name,
            )

        laterals = [conv(1, f"lateral_convs_{index}")(x) for index, x in enumerate(maps)]
        for index in range(len(laterals) - 1, 0, -1):
            laterals[index - 1] += resize_nearest(laterals[index], laterals[index - 1].shape[1:3])
        return tuple(conv(3, f"fpn_convs_{index}")(x) for index, x in enumerate(laterals))
