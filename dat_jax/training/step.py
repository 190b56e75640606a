"""The training step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dat_jax.tasks.objective import Guides, Objective
from dat_jax.training.averaging import Average
from dat_jax.training.optimizers.clipping import global_norm
from dat_jax.training.optimizers.parameter_groups import merge, select
from dat_jax.training.state import TrainState

_RANDOM_STREAM = 1  # random keys: fold_in(seed, stream), then fold_in of the step


def make_train_step(
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    frozen: Any,
    schedule: optax.Schedule,
    seed: int,
    accumulate_steps: int = 1,
    average: Average | None = None,
    further_averages: Mapping[str, Average] | None = None,
    guide: Callable[..., Guides] | None = None,
) -> Callable[..., tuple[TrainState, dict]]:
    """Make ``train_step(state, batch) -> (state, metrics)``, to be jitted.

    A step whose loss or gradient is not finite is skipped: only the counters of the state change.

    Args:
      objective: model and loss.
      optimizer: turns gradients of the parameters that learn into updates.
      frozen: tree with the structure of the parameters, True for those that do not learn. Their gradients are not computed.
      schedule: learning rate by step, for the metrics only.
      seed: every random draw is a function of the seed, the step and the part of the batch.
      accumulate_steps: number of parts A into which a batch is split; their gradients are averaged.
      average: see ``training.averaging``; it is called without the frozen parameters. None: the state has no average.
      further_averages: functions that update ``TrainState.further_averages``, by name.
      guide: (state, *arguments) -> models that the loss learns from, see ``tasks.objective.Guides``. The step then takes these
        arguments after the batch. None: it learns from the labels only.

    Returns:
      A function. Its metrics are those of the objective, "grad_norm" before clipping, "learning_rate", and "skipped" and
      "skipped_in_a_row" of the new state.
    """

    def gradients(state, batch, key, *guides):
        def loss(learned):
            variables = {"params": merge(learned, state.params), **state.model_state}
            value, metrics, model_state = objective.loss(variables, batch, key, *guides)
            return value, (metrics, model_state)

        grads, (metrics, model_state) = jax.grad(loss, has_aux=True)(select(state.params, frozen))
        return grads, metrics, model_state

    def accumulated_gradients(state, batch, key, *guides):
        """Every A-th example belongs to the same part, so that each part has the batch's layout on the devices."""
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // accumulate_steps, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add_part(carry, part):
            state, total = carry
            batch, index = part
            grads, metrics, model_state = gradients(state, batch, jax.random.fold_in(key, index), *guides)
            total = jax.tree.map(lambda t, x: t + x / accumulate_steps, total, (grads, metrics))
            return (state.replace(model_state=model_state), total), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda state, batch: gradients(state, batch, key, *guides), state, first)[:2]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (state, (grads, metrics)), _ = jax.lax.scan(add_part, (state, zeros), (parts, jnp.arange(accumulate_steps)))
        return grads, metrics, state.model_state

    def train_step(state, batch, *guide_arguments):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _RANDOM_STREAM), state.step)
        compute = accumulated_gradients if accumulate_steps > 1 else gradients
        guides = () if guide is None else (guide(state, *guide_arguments),)
        grads, metrics, model_state = compute(state, batch, key, *guides)
        learned = select(state.params, frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, learned)
        learned = optax.apply_updates(learned, updates)

        def update(average, averaged):  # frozen parameters are kept as they are: averaging would round them
            return merge(average(select(averaged, frozen), learned, opt_state, state.step), averaged)

        new = dict(
            params=merge(learned, state.params),
            model_state=model_state,
            opt_state=opt_state,
            ema_params=None if average is None else update(average, state.ema_params),
            further_averages={
                name: update(average, state.further_averages[name])
                for name, average in (further_averages or {}).items()
            }
            or None,
        )
        grad_norm, learning_rate = global_norm(grads), schedule(state.step)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        old = {name: getattr(state, name) for name in new}
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            **jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old),
        )
        metrics = {
            **metrics,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step
