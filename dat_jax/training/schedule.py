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
