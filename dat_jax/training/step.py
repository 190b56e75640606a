"""One optimizer step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dat_jax.tasks import Task
from dat_jax.training.optimizer import global_norm
from dat_jax.training.state import TrainState

_DROPOUT_STREAM = 1  # random streams: fold_in(seed, stream), then the step


def make_train_step(
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Makes ``train_step(state, batch) -> (state, metrics)``, to be jitted.

    Args:
      task, optimizer, schedule: the schedule only reports the learning rate.
      seed: every random draw is a function of it, the step and the part of the batch.
      accumulate_steps: A: the batch is split into A parts, whose gradients are averaged.
      ema_decay: of the averaged weights, if the state has them.

    Returns:
      A function. Metrics: those of the task, "grad_norm" before clipping, "learning_rate", and "skipped",
      "skipped_in_a_row" of the new state: where the loss or the gradient is not a finite number the step only counts.
    """

    def gradients(state, batch, key):
        def loss(params):
            value, metrics, model_state = task.loss({"params": params, **state.model_state}, batch, key)
            return value, (metrics, model_state)

        grads, (metrics, model_state) = jax.grad(loss, has_aux=True)(state.params)
        return grads, metrics, model_state

    def accumulated_gradients(state, batch, key):
        """Every A-th example goes into one part, so that each part keeps the batch's layout on the devices."""
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // accumulate_steps, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add_part(carry, part):
            state, total = carry
            batch, index = part
            grads, metrics, model_state = gradients(state, batch, jax.random.fold_in(key, index))
            total = jax.tree.map(lambda t, x: t + x / accumulate_steps, total, (grads, metrics))
            return (state.replace(model_state=model_state), total), None

        shapes = jax.eval_shape(gradients, state, jax.tree.map(lambda x: x[0], parts), key)[:2]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (state, (grads, metrics)), _ = jax.lax.scan(add_part, (state, zeros), (parts, jnp.arange(accumulate_steps)))
        return grads, metrics, state.model_state

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT_STREAM), state.step)
        compute = accumulated_gradients if accumulate_steps > 1 else gradients
        grads, metrics, model_state = compute(state, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema_params, params)
        grad_norm = global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        metrics = {**metrics, "grad_norm": grad_norm, "learning_rate": schedule(state.step)}
        updated = dict(params=params, model_state=model_state, opt_state=opt_state, ema_params=ema_params)
        kept = {name: getattr(state, name) for name in updated}
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            **jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept),
        )
        metrics |= {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state, metrics

    return train_step
