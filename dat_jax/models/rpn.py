"""Region proposal network (1506.01497)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.retinanet import drop_scores, small_conv
from dat_jax.ops.sizes import clear

STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SCALES = (8.0,)  # multiples of the stride
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height over width


class RPNHead(nn.Module):
    """(B, H, W, C) -> score logits (B, H, W, A) and deltas (B, H, W, A * 4), float32 or better. All levels share one head.

    With ``sizes``, see ``ops.sizes``, scores beyond the size are -inf.

    Attributes:
      num_anchors: A, anchors per position.
      features: channels of the hidden convolution.
      dtype: of the hidden convolution.
    """

    num_anchors: int
    features: int
    dtype: Any = jnp.float32

    def setup(self):
        wide = jnp.promote_types(self.dtype, jnp.float32)
        self.rpn_conv = small_conv(self.features, 3, dtype=self.dtype)
        self.rpn_cls = small_conv(self.num_anchors, 1, dtype=wide)
        self.rpn_reg = small_conv(self.num_anchors * 4, 1, dtype=wide)

    def __call__(self, x: jax.Array, sizes: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        x = nn.relu(self.rpn_conv(clear(x, sizes)))
        return drop_scores(self.rpn_cls(x), sizes), self.rpn_reg(x)
