"""Settings that follow from the size of the training set, and warnings about lengths with which a run cannot work."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dat_jax.errors import UserError
from dat_jax.models.registry import create_model

DERIVED = -1  # value of a key that is derived

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


def resolve_image_size(config: ConfigDict) -> ConfigDict:
    """Replace ``data.image_size`` and ``data.eval_resize`` of -1.

    The image size becomes that of the run or export ``config.init_from``, and if it records none that of the named model.
    ``eval_resize`` becomes the recorded one, or 8/7 of the image size as published.

    Raises:
      UserError: unknown model.
    """
    data = config.data
    if DERIVED not in (data.get("image_size"), data.get("eval_resize")):
        return config
    config = config.copy_and_resolve_references()
    size, resize = _read_image_size(config.init_from)
    with config.unlocked():
        if config.data.image_size == DERIVED:
            config.data.image_size = size or _model_image_size(config.model.name)
        if config.data.eval_resize == DERIVED:
            recorded = resize if size == config.data.image_size else None
            config.data.eval_resize = recorded or round(config.data.image_size * 8 / 7)
    return config


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


def list_length_warnings(config: ConfigDict, *, steps_per_epoch: int, total_steps: int) -> list[str]:
    """Sentences about lengths with which a run cannot work: the number, and what to set."""
    warnings = []
    few = _FEW_FINETUNING_STEPS if config.init_from else _FEW_STEPS
    if total_steps < few:
        unit = "steps" if config.steps else "epochs"
        longer = few if config.steps else math.ceil(few / steps_per_epoch)
        warnings.append(
            f"The run has only {total_steps} steps, expected at least {few}. Set --config.{unit}={longer} or more, or a "
            f"smaller --config.batch_size than {config.batch_size}."
        )
    longest = total_steps * _LARGEST_PART
    time_constant = 1 / (1 - config.ema_decay)
    if config.ema_decay and time_constant > longest:
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


def _model_image_size(name: str) -> int:
    try:
        size = create_model(name).image_size
    except ValueError as error:
        raise UserError(f"config.model cannot be built: {error}") from error
    return size if isinstance(size, int) else max(size)


def _read_image_size(init_from: str) -> tuple[int | None, int | None]:
    """(image size, resize) that a run or an export records; None for what it does not record."""
    path = pathlib.Path(init_from or ".")
    stored: Any = {}
    for file, group, resize in (("model.json", "options", "resize"), ("config.json", "data", "eval_resize")):
        if init_from and not stored:
            stored = _read_group(path / file, group)
            stored = {"image_size": stored.get("image_size"), "resize": stored.get(resize)} if stored else {}
    values = (stored.get("image_size"), stored.get("resize"))
    size, resize = (value if isinstance(value, int) and value > 0 else None for value in values)
    return size, resize


def _read_group(path: pathlib.Path, name: str) -> Mapping[str, Any]:
    try:
        group = json.loads(path.read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return group if isinstance(group, dict) else {}
