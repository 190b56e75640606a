"""The state of a training run."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dat_jax.training.optimizers.parameter_groups import select


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: int32 scalar, number of finished steps, including skipped ones.
      params: parameters.
      model_state: further variables of the model, such as {"batch_stats": ...}.
      opt_state: state of the optimizer.
      ema_params: an average of the parameters, which is evaluated; or None.
      further_averages: averages of the parameters that are evaluated too, by name; or None.
      skipped, skipped_in_a_row: int32 scalars, number of steps that were skipped because the loss or the gradient was not
        finite: in total, and since the last step that was not skipped. A skipped step changes nothing but these counters.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema_params: Any
    further_averages: Any = None
    skipped: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    skipped_in_a_row: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))

    @property
    def eval_variables(self) -> dict[str, Any]:
        """Variables to evaluate: with the averaged parameters if there are any."""
        return {"params": self.params if self.ema_params is None else self.ema_params, **self.model_state}

    @property
    def further_variables(self) -> dict[str, dict[str, Any]]:
        """Variables to evaluate beside ``eval_variables``, by the name of their average."""
        return {name: {"params": params, **self.model_state} for name, params in (self.further_averages or {}).items()}


def make_state(
    variables: Mapping[str, Any],
    *,
    optimizer: optax.GradientTransformation,
    frozen: Any,
    averaged: bool,
    further_averages: Collection[str] = (),
) -> TrainState:
    """Make the state before the first step.

    Args:
      variables: variables of the model, {"params": ..., and others}.
      optimizer: the optimizer.
      frozen: tree with the structure of the parameters, True for those that do not learn. They have no optimizer state.
      averaged: whether the state has an average of the parameters. It starts as the parameters.
      further_averages: names of further averages, which start as the parameters, too.
    """
    model_state = dict(variables)
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(select(params, frozen)),
        ema_params=params if averaged else None,
        further_averages={name: params for name in further_averages} or None,
    )


def copy_state(state: TrainState) -> TrainState:
    """Copy a state into memory of its own, as a step that donates its state requires.

    Arrays that were put on a CPU may share memory with a file or NumPy, and averaged parameters start as the same arrays as
    the parameters.
    """
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state)
