"""Rules for the parameters that decay, by name in ``config.optimizer.decay_rule``."""

import re

import jax


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
