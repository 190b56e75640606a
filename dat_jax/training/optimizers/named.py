"""The optimizers that ``config.optimizer.name`` selects. All are those of optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib

from dat_jax.training.optimizers.clipping import clip_by_global_norm
from dat_jax.training.optimizers.parameter_groups import ParameterGroups, scale_updates

SCHEDULE_FREE = "schedule_free_adamw"


def make_optimizer(
    schedule: optax.Schedule, groups: ParameterGroups, config: ConfigDict
) -> optax.GradientTransformation:
    """Make the optimizer that ``config.name`` selects, for the parameters that learn.

    Except for SGD, weight decay is decoupled: each step subtracts the learning rate times ``weight_decay`` times the parameter,
    whatever the gradient is.

    Args:
      schedule: learning rate by step.
      groups: factors of the learning rate, and which parameters decay.
      config: the group ``optimizer`` of a configuration.
    """
    optimizer = _MAKERS[config.name](schedule, config, groups.decays)
    if any(factor != 1 for factor in jax.tree.leaves(groups.factors)):
        optimizer = scale_updates(optimizer, groups.factors)
    if config.name == SCHEDULE_FREE:  # `optimizer` moves the weights that are averaged
        optimizer = contrib.schedule_free(optimizer, schedule, b1=config.b1)
    return optax.chain(clip_by_global_norm(config.clip_norm), optimizer) if config.clip_norm > 0 else optimizer


def find_evaluation_params(opt_state: optax.OptState, params: Any) -> Any:
    """The parameters that schedule-free AdamW evaluates, an average.

    Args:
      opt_state: state of the optimizer that ``make_optimizer`` makes.
      params: the parameters that learn, at which gradients are computed.
    """
    is_state = lambda node: isinstance(node, contrib.ScheduleFreeState)  # noqa: E731
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    return contrib.schedule_free_eval_params(states[0], params)


def is_updated_by_muon(params: Any) -> Any:
    """True for the parameters that Muon updates, those with two axes; AdamW updates the others. Source: optax.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
    """
    return jax.tree.map(lambda leaf: len(leaf.shape) == 2, params)


def _adamw(schedule, config, mask):
    return optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask
    )


def _schedule_free_adamw(schedule, config, mask):
    """The base of schedule-free AdamW: it has no momentum, which the average of ``contrib.schedule_free`` replaces."""
    rms = optax.scale_by_rms(decay=config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    return optax.chain(rms, decay, optax.scale_by_learning_rate(schedule))


def _lamb(schedule, config, mask):
    return optax.lamb(schedule, **config.lamb, weight_decay=config.weight_decay, mask=mask)


def _lion(schedule, config, mask):
    return optax.lion(schedule, **config.lion, weight_decay=config.weight_decay, mask=mask)


def _sgd(schedule, config, mask):
    """SGD whose weight decay is added to the gradient, before the momentum, as in PyTorch."""
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    return optax.chain(decay, optax.sgd(schedule, **config.sgd))


def _adafactor(schedule, config, mask):
    keys = config.adafactor
    update = optax.adafactor(
        1.0,
        min_dim_size_to_factor=keys.min_side,
        decay_rate=keys.decay_rate,
        multiply_by_parameter_scale=keys.scale_by_parameter,
        clipping_threshold=keys.clip_rms or None,
        momentum=keys.momentum or None,
        eps=keys.eps,
    )
    return _add_decay(update, schedule, config.weight_decay, mask)


def _muon(schedule, config, mask):
    """Muon for the parameters with two axes, AdamW for the others, both with Nesterov's momentum."""
    keys = config.muon
    update = contrib.muon(
        1.0,
        beta=keys.momentum,
        ns_steps=keys.steps,
        consistent_rms=keys.update_rms or None,
        eps=config.eps,
        adam_b1=config.b1,
        adam_b2=config.b2,
    )
    return _add_decay(update, schedule, config.weight_decay, mask)


def _add_decay(update, schedule, weight_decay, mask):
    """Decoupled decay and the schedule, for an optimizer with a learning rate of 1 and without a mask or a scaled decay."""
    return optax.chain(update, optax.add_decayed_weights(-weight_decay, mask), optax.scale_by_schedule(schedule))


_MAKERS: dict[str, Callable[[optax.Schedule, ConfigDict, Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
    SCHEDULE_FREE: _schedule_free_adamw,
}
OPTIMIZERS = tuple(_MAKERS)
