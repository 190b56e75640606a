"""What a run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dat_jax.tasks import Task


@flax.struct.dataclass
class TrainState:
    """step: int32, finished optimizer steps. ema_params: None unless asked for."""

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema_params: Any

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What is evaluated: the averaged weights where there are any."""
        return {"params": self.params if self.ema_params is None else self.ema_params, **self.model_state}


def init_state(key: jax.Array, batch, *, task: Task, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state at step 0."""
    model_state = dict(task.init(key, batch))
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        ema_params=params if ema else None,
    )


def own_memory(state: TrainState) -> TrainState:
    """A copy whose arrays share memory with nothing, as a step that takes the memory of its state wants it.

    Arrays that were put on a CPU may still lie in the memory of a file or of NumPy, and averaged weights start as the same
    arrays as the weights.
    """
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state)
