"""What a backward pass computes again stays apart from what the forward pass computed."""

from typing import Any

import jax


def barrier(kept: Any) -> Any:
    """The arrays that were kept, as new ones to the compiler.

    XLA would find that the forward pass computed the same from them, and keep that result, which is larger. It is what
    ``jax.checkpoint`` does with the inputs of what it computes again.
    """
    return jax.lax.optimization_barrier(kept)
