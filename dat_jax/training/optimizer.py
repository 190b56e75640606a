"""AdamW as the published recipes have it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax


def global_norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares, of a tree named as the model's parameters.

    Added from the last block to the first, the order in which a backward pass makes its gradients. In another order XLA
    computes the gradients of the weights in that other order too, and keeps every block's activations and their
    gradients until then.
    """

    def place(item):  # stages_2/blocks_10 after stages_2/blocks_9
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", jax.tree_util.keystr(item[0]))]

    backward = sorted(jax.tree_util.tree_leaves_with_path(tree), key=place, reverse=True)
    return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(leaf)) for _, leaf in backward]).sum())


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), PyTorch's rule; optax's own has no 1e-6."""

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_matrices(params):
    """True for the parameters that decay: those with more than one axis, but for position bias tables.

    ``rpe_table`` (with the log-CPB network's weights) and ``relative_position_bias_table`` do not decay; the ``rpb`` of
    neighborhood attention does. Source: the published classifiers' recipe.
    """

    def decays(path, leaf):
        return leaf.ndim > 1 and not _is_table(jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(decays, params)


def decay_all_but_norms(params):
    """True for all parameters but those of LayerNorms and position bias tables: biases and BatchNorm's decay too.

    Source: the published segmentors' recipe, which goes by names that contain "norm"; BatchNorms are "bn".
    """

    def decays(path, leaf):
        del leaf
        name = jax.tree_util.keystr(path)
        return not (_is_table(name) or "norm" in name or re.search(_NAMELESS_NORMS, name))

    return jax.tree_util.tree_map_with_path(decays, params)


def decay_all_but_norms_and_bn(params):
    """True for all parameters but those of norms, BatchNorms too, and position bias tables: biases decay.

    Source: the published detectors' recipe, the segmentors' with mmcv's ``norm_decay_mult=0``.
    """

    def decays(path, decays_by_name):
        return decays_by_name and "['bn']" not in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(decays, decay_all_but_norms(params))


# LayerNorms that are named by their place in a sequence, as published
_NAMELESS_NORMS = r"\['(conv_offset_1|proj_ds_1)'\]"


def _is_table(name: str) -> bool:
    return "rpe_table" in name or "relative_position_bias_table" in name


DECAY_RULES = {
    "matrices": decay_matrices,
    "all_but_norms": decay_all_but_norms,
    "all_but_norms_and_bn": decay_all_but_norms_and_bn,
}


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    decay_rule: str,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay by one of ``DECAY_RULES``, after clipping to ``clip_norm`` where that is > 0."""
    mask = DECAY_RULES[decay_rule]
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return optax.chain(clip_by_global_norm(clip_norm), adamw) if clip_norm > 0 else adamw
