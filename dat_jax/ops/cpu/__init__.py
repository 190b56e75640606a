"""Algorithms that are only faster on XLA's CPU backend, the counterpart of ``ops.pallas`` for TPUs.

Models never call them directly: an op of ``ops.attention`` or ``ops.layers`` uses them where ``ops.dispatch`` selects them.
They compute the same values and gradients as the plain formulas, up to rounding.

| module | op | why |
|---|---|---|
| ``depthwise`` | ``depthwise_conv``, implementation "shifts" | XLA's depthwise convolution is 10 to 30 times slower |
| ``linear`` | ``linear`` | transposes the narrower operand of the kernel's gradient |
| ``neighborhood_rows`` | ``neighborhood_attention``, implementation "rows" | reuses memory from row to row |
| ``position_bias`` | ``table_position_bias``, implementation "slice" | copies contiguous rows, adds without a scatter |
| ``sums`` | sums over all axes but the channels | XLA does not vectorize a reduction over outer axes |
"""
