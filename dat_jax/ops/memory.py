"""Helpers for backward passes that recompute arrays instead of storing them."""

from typing import Any

import jax


def recompute_from(residuals: Any) -> Any:
    """Returns the stored arrays as new values, so that the compiler recomputes what is derived from them.

    Otherwise XLA finds that the forward pass computed the same values and stores that result, which is larger.
    ``jax.checkpoint`` does the same with the inputs of the computation that it repeats.
    """
    return jax.lax.optimization_barrier(residuals)
