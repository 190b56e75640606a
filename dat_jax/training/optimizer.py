"""AdamW with the gradient clipping and weight decay of the published recipes."""

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


def decay_matrices(params):
    """True for parameters with more than one axis, except position bias tables.

    ``rpe_table`` (including the weights of the log-CPB network) and ``relative_position_bias_table`` do not decay; the
    ``rpb`` of neighborhood attention does. Source: the published recipe of the classifiers.
    """

    def decays(path, leaf):
        return leaf.ndim > 1 and not _is_table(jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(decays, params)


def decay_all_but_norms(params):
    """True for all parameters except those of LayerNorm and position bias tables; biases and BatchNorm decay too.

    Source: the published recipe of the segmentors, which selects names that contain "norm"; those of BatchNorm are "bn".
    """

    def decays(path, leaf):
        del leaf
        name = jax.tree_util.keystr(path)
        return not (_is_table(name) or "norm" in name or re.search(_NAMELESS_NORMS, name))

    return jax.tree_util.tree_map_with_path(decays, params)


def decay_all_but_norms_and_bn(params):
    """True for all parameters except those of LayerNorm, BatchNorm and position bias tables; biases decay.

    Source: the published recipe of the detectors, which is that of the segmentors with mmcv's ``norm_decay_mult=0``.
    """

    def decays(path, decays_by_name):
        return decays_by_name and "['bn']" not in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(decays, decay_all_but_norms(params))


# LayerNorms whose published names are positions in a sequence
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
    """Make AdamW with decoupled weight decay.

    Args:
      schedule: learning rate by step.
      b1, b2, eps: of Adam.
      weight_decay: factor of the decay.
      decay_rule: name in ``DECAY_RULES``, which selects the parameters that decay.
      clip_norm: gradients are clipped to this global norm first; 0 disables clipping.
    """
    mask = DECAY_RULES[decay_rule]
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return optax.chain(clip_by_global_norm(clip_norm), adamw) if clip_norm > 0 else adamw
