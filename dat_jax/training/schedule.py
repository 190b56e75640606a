"""Length of a run in steps, and its learning rates."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dat_jax.config.keys import DERIVED
from dat_jax.errors import UserError
from dat_jax.tasks.task import count_steps

_MIN_STEPS = 1000  # of a derived length: fine-tuning on some hundred images needs about this number
_MIN_EPOCHS = 30
_EVALUATIONS = 20
_BATCHES_PER_EPOCH = 16  # at least, unless the batch would be smaller than _MIN_BATCH
_MIN_BATCH, _MAX_BATCH = 8, 128
_PEAK_RATE, _LOWEST_PEAK_RATE = 5e-4, 1e-4  # for _MIN_STEPS steps, and for long runs

# Fine-tuning starts at small rates and with a new head, so that few steps barely change it: 60 steps gave 14 % with 6 classes.
# From scratch, only runs that cannot be meant as trainings are shorter than 300 steps: the shortest quickstart has 372.
_FEW_FINETUNING_STEPS, _FEW_STEPS = 500, 300
_LARGEST_PART = 1 / 3  # of the run, for the warm-up and for the time constant of the moving average


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """Length of a run and its learning rates.

    Attributes:
      config: the configuration, with derived values (-1) replaced.
      steps_per_epoch, total_steps: number of steps per epoch and of the whole run.
      eval_steps: number of steps between evaluations.
      schedule: number of finished steps -> learning rate.
      warnings: sentences about lengths with which the run cannot work.
    """

    config: ConfigDict
    steps_per_epoch: int
    total_steps: int
    eval_steps: int
    schedule: optax.Schedule
    warnings: Sequence[str]


def plan_run(config: ConfigDict, *, examples: int, parts: int) -> RunPlan:
    """Determine the length of a run and its learning rates from the size of the training set.

    Args:
      config: configuration of the run.
      examples: number of training examples.
      parts: number of parts of a batch, of which a derived batch size is a multiple.

    Raises:
      UserError: there are fewer examples than in a batch.
    """
    config = resolve_length(config, examples=examples, parts=parts)
    if config.batch_size > examples:
        raise UserError(f"config.batch_size {config.batch_size} is larger than the {examples} training examples.")
    steps_per_epoch = examples // config.batch_size
    total_steps = count_steps(config, examples=examples)
    lengths = dict(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    return RunPlan(
        config,
        **lengths,
        eval_steps=config.eval.every_steps or config.eval.every * steps_per_epoch,
        schedule=make_schedule(config, **lengths),
        warnings=list_length_warnings(config, **lengths),
    )


def resolve_length(config: ConfigDict, *, examples: int, parts: int) -> ConfigDict:
    """Replace each -1 of ``batch_size``, ``epochs``, ``eval.every`` and the group ``schedule``.

    * The batch size is a power of two from 8 to 128 with at least 16 batches per epoch, if there are 128 examples. With fewer
      than 8 examples it is smaller.
    * The length is 30 epochs, or more for 1000 steps.
    * The warm-up is a tenth of the run.
    * Evaluations are a twentieth of the run apart, and at least one epoch: with few images, each takes longer than an epoch.
    * The learning rates are meant for the batch size of the run. The peak is 5e-4 for 1000 steps, and falls with the square root
      of the number of steps to 1e-4. The first and the last rate are a hundredth of the peak.

    Args:
      config: the configuration.
      examples: number of training examples.
      parts: number of parts of a batch, of which the derived batch size is a multiple.
    """
    schedule = config.schedule
    if DERIVED not in (config.batch_size, config.epochs, config.eval.every, *schedule.values()):
        return config
    config = config.copy_and_resolve_references()
    schedule = config.schedule
    with config.unlocked():
        if config.batch_size == DERIVED:
            batches = max(examples // _BATCHES_PER_EPOCH, 1)
            batch_size = min(max(2 ** int(math.log2(batches)), _MIN_BATCH), _MAX_BATCH)
            batch_size = min(batch_size, 2 ** int(math.log2(max(examples, 1))))
            config.batch_size = math.ceil(batch_size / parts) * parts
        steps_per_epoch = max(examples // config.batch_size, 1)
        if config.epochs == DERIVED:
            config.epochs = math.ceil((config.steps or _MIN_STEPS) / steps_per_epoch)
            config.epochs = config.epochs if config.steps else max(config.epochs, _MIN_EPOCHS)
        total_steps = config.steps or config.epochs * steps_per_epoch
        if config.eval.every == DERIVED:
            config.eval.every = max(int(total_steps / steps_per_epoch / _EVALUATIONS), 1)
        if schedule.get("warmup_epochs") == DERIVED:
            schedule.warmup_epochs = 0.1 * total_steps / steps_per_epoch
        if schedule.get("reference_batch_size") == DERIVED:
            schedule.reference_batch_size = config.batch_size
        if schedule.get("base_lr") == DERIVED:
            peak = max(_PEAK_RATE * min(math.sqrt(_MIN_STEPS / total_steps), 1), _LOWEST_PEAK_RATE)
            schedule.base_lr = peak * schedule.reference_batch_size / config.batch_size
        for name in ("warmup_lr", "min_lr"):
            if schedule.get(name) == DERIVED:
                schedule[name] = schedule.base_lr / 100
    return config


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


def list_length_warnings(config: ConfigDict, *, steps_per_epoch: int, total_steps: int) -> list[str]:
    """Sentences about lengths with which a run cannot work: the number, and what to set."""
    warnings = []
    few = _FEW_FINETUNING_STEPS if config.init_from else _FEW_STEPS
    if total_steps < few:
        unit = "steps" if config.steps else "epochs"
        longer = few if config.steps else math.ceil(few / steps_per_epoch)
        smaller = "" if config.steps else f", or a smaller --config.batch_size than {config.batch_size}"
        warnings.append(
            f"The run has only {total_steps} steps, expected at least {few}. Set --config.{unit}={longer} or more{smaller}."
        )
    longest = total_steps * _LARGEST_PART
    time_constant = 1 / (1 - config.ema_decay)
    if config.ema_decay and not config.ema_warmup and time_constant > longest:
        decay = math.floor((1 - 10 / total_steps) * 1000) / 1000
        better = f"--config.ema_decay={decay} or 0" if decay > 0 else "--config.ema_decay=0"
        warnings.append(
            f"config.ema_decay {config.ema_decay} averages weights over {time_constant:.0f} steps, more than a third of the "
            f"{total_steps} steps of the run, so the evaluated weights stay close to the initial ones. Set {better}."
        )
    schedule = config.schedule
    in_epochs = "warmup_epochs" in schedule
    warmup = round(schedule.warmup_epochs * steps_per_epoch) if in_epochs else schedule.get("warmup_steps", 0)
    if warmup > longest:
        better = (
            f"warmup_epochs={total_steps / steps_per_epoch / 10:.2g}"
            if in_epochs
            else f"warmup_steps={total_steps // 10}"
        )
        warnings.append(
            f"The warm-up takes {warmup} steps, more than a third of the {total_steps} steps of the run. Set "
            f"--config.schedule.{better}."
        )
    return warnings
