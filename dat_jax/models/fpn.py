"""Feature pyramid network (1612.03144)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.ops.layers.resize import resize_nearest
from dat_jax.ops.sizes import clear, convolved

EXTRA_LEVELS = ("convolutions", "subsampling")


def level_sizes(sizes: Sequence[jax.Array | None], *, levels: int) -> list[jax.Array | None]:
    """Sizes of the examples' maps at each level of an ``FPN``, int (B, 2) or None each.

    Args:
      sizes: those of the input maps, int (B, 2) or None each.
      levels: see ``FPN``.
    """
    found = list(sizes)
    while len(found) < levels:
        found.append(convolved(found[-1], kernel_size=3, stride=2, padding=1))
    return found


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

    ``sizes``, int (B, 2) for each map, are the sizes of the examples' maps, see ``ops.sizes``. ``level_sizes`` has those of the
    levels.
    """

    features: int = 256
    levels: int = 0
    extra: str = "convolutions"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array], *, sizes: Sequence[jax.Array | None] | None = None
    ) -> tuple[jax.Array, ...]:
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

        of_levels = level_sizes(sizes or (None,) * len(maps), levels=self.levels)
        laterals = [conv(1, f"lateral_convs_{index}")(x) for index, x in enumerate(maps)]
        for index in range(len(laterals) - 1, 0, -1):
            resize = dict(sizes=of_levels[index], to=of_levels[index - 1])
            laterals[index - 1] += resize_nearest(laterals[index], laterals[index - 1].shape[1:3], **resize)
        outputs = [
            conv(3, f"fpn_convs_{index}")(clear(x, size))
            for index, (x, size) in enumerate(zip(laterals, of_levels[: len(maps)], strict=True))
        ]
        for index in range(len(maps), self.levels):
            if self.extra == "subsampling":
                outputs.append(outputs[-1][:, ::2, ::2])
            else:
                x = clear(maps[-1] if index == len(maps) else outputs[-1], of_levels[index - 1])
                outputs.append(conv(3, f"fpn_convs_{index}", stride=2)(x))
        return tuple(outputs)
