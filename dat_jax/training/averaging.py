"""Averages of the parameters, which are evaluated in their place or beside them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dat_jax.checkpoints.averages import name_average
from dat_jax.training.optimizers.named import SCHEDULE_FREE, find_evaluation_params

Average = Callable[[Any, Any, optax.OptState, jax.Array], Any]


def make_average(config: ConfigDict) -> Average | None:
    """Make the function that updates the evaluated average after each step.

    Args:
      config: a configuration.

    Returns:
      (average, parameters, optimizer state, number of finished steps before this one) -> the next average: an exponential
      moving average for ``config.ema_decay``, and the one that the optimizer keeps for schedule-free AdamW. None if the
      parameters themselves are evaluated.
    """
    if config.optimizer.name == SCHEDULE_FREE:
        return lambda average, params, opt_state, step: find_evaluation_params(opt_state, params)
    return make_moving_average(config.ema_decay, warmup=config.ema_warmup) if config.ema_decay else None


def make_further_averages(config: ConfigDict) -> dict[str, Average]:
    """Make the functions that update the averages of ``config.ema_decays``, by their names.

    See ``checkpoints.averages`` for the names.
    """
    return {name_average(decay): make_moving_average(decay, warmup=config.ema_warmup) for decay in config.ema_decays}


def make_moving_average(decay: float, *, warmup: bool) -> Average:
    """Make the function that updates an exponential moving average.

    Args:
      decay: d of the update average = d * average + (1 - d) * parameters.
      warmup: whether the decay is at most 1 - (1 + step) ** (-2 / 3). Source: timm's ModelEmaV3.
    """

    def update(average, params, opt_state, step):
        step_size = 1 - decay
        if warmup:
            step_size = jnp.maximum(step_size, (1.0 + step) ** (-2 / 3))
        return optax.incremental_update(params, average, step_size=step_size)

    return update
