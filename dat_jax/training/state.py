"""What a run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dat_jax.tasks import Task


@flax.struct.dataclass
class TrainState:
    """What the next step needs.

    Attributes:
      step: int32, finished steps, skipped ones included.
      ema_params: None unless asked for.
      skipped, skipped_in_a_row: int32, steps whose loss or gradient was not a finite number, which left all else as it was:
        so far, and since the last other one.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema_params: Any
    skipped: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    skipped_in_a_row: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))

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
