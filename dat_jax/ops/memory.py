"""Helpers that decide which arrays the compiler stores, and which it computes where they are needed."""

from typing import Any

import jax

from dat_jax.ops import dispatch


def recompute_from(residuals: Any) -> Any:
    """Returns the stored arrays as new values, so that the compiler recomputes what is derived from them.

    Otherwise XLA finds that the forward pass computed the same values and stores that result, which is larger.
    ``jax.checkpoint`` does the same with the inputs of the computation that it repeats.
    """
    return jax.lax.optimization_barrier(residuals)


def store_on_cpu(x: jax.Array) -> jax.Array:
    """Returns ``x``, which XLA's CPU backend then stores before anything reads it.

    Without this, the backend may fuse the computation of ``x`` into the product or convolution that reads it, and calls a library
    for all of it, which is slower. In the evaluation of dat_pp_tiny with 8 images (jax 0.12, 2 CPU cores), LayerNorm and the
    linear layer from 64 to 256 channels took 14 ms together and take 8 one after the other. The first down-projection took 40 ms,
    because the last MLP of its stage was fused into it, and 70 ms more to store slices for that; it takes 5.
    """
    return jax.lax.optimization_barrier(x) if dispatch.uses_cpu_algorithms() else x
