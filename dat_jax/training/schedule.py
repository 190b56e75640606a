"""Learning rate schedules."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def make_schedule(config: ConfigDict, *, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """Make the schedule of ``config.schedule``.

    Args:
      config: configuration of the run. The rates of a cosine schedule are scaled by batch_size / reference_batch_size.
      steps_per_epoch: number of steps per epoch.
      total_steps: number of steps of the whole run.

    Returns:
      Number of finished steps -> learning rate.
    """
    schedule = config.schedule
    if schedule.kind == "poly":
        return warmup_poly(
            base_lr=schedule.base_lr,
            power=schedule.power,
            warmup_steps=schedule.warmup_steps,
            warmup_ratio=schedule.warmup_ratio,
            total_steps=total_steps,
        )
    if schedule.kind == "step":
        return warmup_step(
            base_lr=schedule.base_lr,
            warmup_steps=schedule.warmup_steps,
            warmup_ratio=schedule.warmup_ratio,
            drops=schedule.drops,
            factor=schedule.factor,
            steps_per_epoch=steps_per_epoch,
        )
    scale = config.batch_size / schedule.reference_batch_size
    return warmup_cosine(
        base_lr=schedule.base_lr * scale,
        warmup_lr=schedule.warmup_lr * scale,
        min_lr=schedule.min_lr * scale,
        warmup_steps=round(schedule.warmup_epochs * steps_per_epoch),
        total_steps=total_steps,
    )


def warmup_cosine(
    *, base_lr: float, warmup_lr: float, min_lr: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up followed by a cosine that is counted from step 0, both one step late.

    Let t be the number of finished steps minus one, and 0 at the first step. The rate is warmup_lr + t / warmup_steps *
    (base_lr - warmup_lr) for t < warmup_steps, then min_lr + (base_lr - min_lr) / 2 * (1 + cos(pi * t / total_steps)), and
    min_lr from total_steps on. It is one step late because the published loop advances its scheduler after the optimizer.

    Source: the published recipe (timm's cosine schedule without a warm-up prefix).
    """

    def schedule(count):
        t = jnp.maximum(count - 1, 0) * 1.0
        warm = warmup_lr + t / max(warmup_steps, 1) * (base_lr - warmup_lr)
        cosine = min_lr + (base_lr - min_lr) / 2 * (1 + jnp.cos(jnp.pi * jnp.minimum(t / total_steps, 1.0)))
        return jnp.where(t < warmup_steps, warm, cosine)

    return schedule


def warmup_poly(
    *, base_lr: float, power: float, warmup_steps: int, warmup_ratio: float, total_steps: int
) -> optax.Schedule:
    """Polynomial decay base_lr * (1 - t / total_steps) ** power with linear warm-up.

    t is the number of finished steps; the rate is 0 from total_steps on. During warm-up it is multiplied by
    1 - (1 - t / warmup_steps) * (1 - warmup_ratio).

    Source: the published recipe of the segmentors.
    """

    def schedule(count):
        rate = base_lr * jnp.maximum(1 - count * 1.0 / total_steps, 0) ** power
        return rate * _warmup_factor(count, warmup_steps, warmup_ratio)

    return schedule


def warmup_step(
    *,
    base_lr: float,
    warmup_steps: int,
    warmup_ratio: float,
    drops: Sequence[float],
    factor: float,
    steps_per_epoch: int,
) -> optax.Schedule:
    """Step decay: base_lr times ``factor`` after each of ``drops`` (in epochs), with the warm-up of ``warmup_poly``.

    A drop after e epochs holds from t = e * steps_per_epoch on, the first step of the next epoch, where t is the number of
    finished steps.

    Source: the published recipe of the detectors (mmcv's step policy by epochs with linear warm-up by steps).
    """

    def schedule(count):
        decay = math.prod(jnp.where(count >= epochs * steps_per_epoch, factor, 1.0) for epochs in drops)
        return base_lr * decay * _warmup_factor(count, warmup_steps, warmup_ratio)

    return schedule


def _warmup_factor(count, steps: int, ratio: float):
    """Rise linearly from ``ratio`` to 1 over the first ``steps`` steps, and stay at 1."""
    return jnp.where(count < steps, 1 - (1 - count / max(steps, 1)) * (1 - ratio), 1.0)
