"""The one place that chooses between the exact algorithms of an op, by platform and size.

Every op with several algorithms takes ``implementation=``: the name of one of them, "auto" for the fastest known on this
platform, or "plain" for the obvious one that the others are tested against.
"""

import jax

IMPLEMENTATIONS = {
    "grid_sample": ("matmul", "gather", "map_coordinates"),
    "position_bias": ("slice", "matmul", "gather", "map_coordinates"),
    "neighborhood_attention": ("tiles", "dense", "gather"),
    "depthwise_conv": ("shifts", "conv"),
}
PLAIN = {
    "grid_sample": "map_coordinates",
    "position_bias": "gather",
    "neighborhood_attention": "gather",
    "depthwise_conv": "conv",
}


def choose(op: str, implementation: str, *, map_shape: tuple[int, int], table_fits: bool = False) -> str:
    """Name of the algorithm to run.

    Args:
      op: a key of ``IMPLEMENTATIONS``.
      implementation: "auto", "plain" or an algorithm of the op.
      map_shape: (H, W) of the map that the op works on.
      table_fits: of "position_bias", whether the table was made for this map size.

    Raises:
      ValueError: the op has no such implementation.
    """
    if implementation == "auto":
        return _fastest(op, map_shape, table_fits)
    if implementation == "plain":
        return PLAIN[op]
    if implementation not in IMPLEMENTATIONS[op]:
        choices = ", ".join(("auto", "plain", *IMPLEMENTATIONS[op]))
        raise ValueError(f"{op} has no implementation {implementation!r}; choose one of {choices}.")
    return implementation


def _fastest(op, map_shape, table_fits):
    """On CPU by what was fastest there; products instead of gathers elsewhere, which has not been timed on a device yet."""
    cpu = jax.default_backend() == "cpu"
    if op == "depthwise_conv":
        return "shifts" if cpu else "conv"  # XLA's CPU depthwise convolution is 10 to 30 times slower than shifts
    if op == "position_bias":
        return "slice" if cpu and table_fits else "matmul"
    if op == "neighborhood_attention":
        return "dense" if max(map_shape) <= 16 else "tiles"
    # The matrix of hat weights has H * W numbers a point: past this size the gather's few rows are less work.
    return "matmul" if map_shape[0] * map_shape[1] <= 4096 else "gather"
