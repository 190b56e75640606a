"""The learning rate of every step."""

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
        t = count * 1.0
        rate = base_lr * jnp.maximum(1 - t / total_steps, 0) ** power
        warm = 1 - (1 - t / max(warmup_steps, 1)) * (1 - warmup_ratio)
        return jnp.where(t < warmup_steps, rate * warm, rate)

    return schedule
