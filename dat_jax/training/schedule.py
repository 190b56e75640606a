"""The learning rate of every step."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import optax


def warmup_cosine(
    *, base_lr: float, warmup_lr: float, min_lr: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up, then a cosine counted from step 0, one step late.

    With t the number of finished steps less one (and 0 at the first): warmup_lr + t / warmup_steps * (base_lr -
    warmup_lr) for t < warmup_steps, else min_lr + (base_lr - min_lr) / 2 * (1 + cos(pi * t / total_steps)), and min_lr
    from total_steps on. One step late because the published loop advances its scheduler after the optimizer's step.

    Source: the published recipe (timm's cosine schedule, without a warm-up prefix).
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
    """base_lr * (1 - t / total_steps) ** power, in warm-up times 1 - (1 - t / warmup_steps) * (1 - warmup_ratio).

    t is the number of finished steps; 0 from total_steps on. Source: the published segmentors' recipe.
    """

    def schedule(count):
        rate = base_lr * jnp.maximum(1 - count * 1.0 / total_steps, 0) ** power
        return rate * _warmup(count, warmup_steps, warmup_ratio)

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
    """base_lr, times ``factor`` after each of ``drops``, in epochs; in warm-up as ``warmup_poly``.

    A drop after e epochs holds from t = e * steps_per_epoch on, the first step of the next epoch; t is the number of finished
    steps. Source: the published detectors' recipe (mmcv's step policy by epochs, with its linear warm-up by steps).
    """

    def schedule(count):
        dropped = math.prod(jnp.where(count >= epochs * steps_per_epoch, factor, 1.0) for epochs in drops)
        return base_lr * dropped * _warmup(count, warmup_steps, warmup_ratio)

    return schedule


def _warmup(count, steps: int, ratio: float):
    """From ``ratio`` to 1, linearly over so many steps, and 1 from then on."""
    return jnp.where(count < steps, 1 - (1 - count / max(steps, 1)) * (1 - ratio), 1.0)
