"""The global norm of the gradient, and clipping to it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax


def global_norm(tree: Any) -> jax.Array:
    """Global L2 norm of a tree with the model's parameter names.

    Squares are added from the last block to the first, the order in which the backward pass computes the gradients. In any
    other order XLA also computes the gradients of the weights in that order, and keeps the activations of every block, and
    their gradients, in memory until then.
    """

    def natural_order(item):  # stages_2/blocks_10 comes after stages_2/blocks_9
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", jax.tree_util.keystr(item[0]))]

    backward = sorted(jax.tree_util.tree_leaves_with_path(tree), key=natural_order, reverse=True)
    return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(leaf)) for _, leaf in backward]).sum())


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), as PyTorch does. ``optax.clip_by_global_norm`` has no 1e-6."""

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
