"""Averages of the parameters, which are evaluated in their place."""

from collections.abc import Callable
from typing import Any

import optax
from ml_collections import ConfigDict

from dat_jax.training.optimizers.named import SCHEDULE_FREE, find_evaluation_params


def make_average(config: ConfigDict) -> Callable[[Any, Any, optax.OptState], Any] | None:
    """Make the function that updates the average after each step.

    Args:
      config: a configuration.

    Returns:
      (average, parameters, optimizer state) -> the next average: an exponential moving average for ``config.ema_decay``, the
      one that the optimizer keeps for schedule-free AdamW, and None if parameters are not averaged.
    """
    if config.optimizer.name == SCHEDULE_FREE:
        return lambda average, params, opt_state: find_evaluation_params(opt_state, params)
    if config.ema_decay > 0:
        step_size = 1 - config.ema_decay
        return lambda average, params, opt_state: optax.incremental_update(params, average, step_size=step_size)
    return None
