"""Averages of the parameters, which are evaluated in their place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dat_jax.training.optimizers.named import SCHEDULE_FREE, find_evaluation_params

Average = Callable[[Any, Any, optax.OptState, jax.Array], Any]


def make_average(config: ConfigDict) -> Average | None:
    """Make the function that updates the average after each step.

    Args:
      config: a configuration.

    Returns:
      (average, parameters, optimizer state, number of finished steps before this one) -> the next average: an exponential
      moving average for ``config.ema_decay``, and the one that the optimizer keeps for schedule-free AdamW. None if parameters
      are not averaged.

    Source of the warm-up of the decay: timm's ModelEmaV3.
    """
    if config.optimizer.name == SCHEDULE_FREE:
        return lambda average, params, opt_state, step: find_evaluation_params(opt_state, params)
    if config.ema_decay == 0:
        return None

    def update(average, params, opt_state, step):
        step_size = 1 - config.ema_decay
        if config.ema_warmup:
            step_size = jnp.maximum(step_size, (1.0 + step) ** (-2 / 3))
        return optax.incremental_update(params, average, step_size=step_size)

    return update
