"""Choice of the implementations of ops for a run, on the devices that it uses."""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping

import jax

from dat_jax.ops.calls import OpCall
from dat_jax.ops.dispatch import interprets_kernels, target_platform
from dat_jax.parallel import multihost
from dat_jax.storage import Path
from dat_jax.training.trainer import Trainer
from dat_jax.tuning.choices import Choices, get_names, read_stored_choices, store_choices
from dat_jax.tuning.tune import tune

logger = logging.getLogger(__name__)


def choose_implementations(trainer: Trainer, step: str, *, cache: Path | None) -> str:
    """Set ``trainer.choices``. All processes must call it; the first one decides, on one of its devices.

    Calls whose choices are stored for this kind of device and these versions are not measured again. On CPUs nothing is done:
    the defaults were measured there.

    Args:
      trainer: the run, before its first step.
      step: the step whose calls are measured, "train" or "eval". Stored choices are used in both.
      cache: folder of compiled programs, where choices are stored, or None.

    Returns:
      How often each implementation is used in the step by choice, or which are used without a choice, in words.
    """
    if not is_tuned(trainer):
        implementation = trainer.config.model.get("implementation", "auto")
        if implementation != "auto":
            return f"{implementation}, the value of config.model.implementation"
        return f"the defaults for {target_platform()}"
    names, described = {}, "the defaults"
    if jax.process_index() == 0:
        try:
            calls = trainer.list_op_calls(step)
            choices = _choose(calls, cache)
            names, described = get_names(choices), _describe(choices, calls)
        except Exception as error:  # the defaults are always there, and the other processes wait for an answer
            logger.warning("Implementations of ops could not be compared, so the defaults are used: %s", error)
    trainer.choices, described = json.loads(multihost.gather_texts(json.dumps([names, described]))[0])
    logger.info("Implementations of ops: %s.", described)
    return described


def is_tuned(trainer: Trainer) -> bool:
    """Whether the run compares implementations: see ``config.tune``."""
    config = trainer.config
    has_choices = target_platform() != "cpu" or interprets_kernels()
    return config.tune and has_choices and config.model.get("implementation", "auto") == "auto"


def _choose(calls: Mapping[str, OpCall], cache: Path | None) -> Choices:
    """The stored choices of this device, and those of the calls that had none."""
    device = jax.local_devices()[0].device_kind
    start, known = time.monotonic(), read_stored_choices(cache, device)
    found = tune(calls, known=known)
    if found:
        seconds, file = time.monotonic() - start, store_choices(cache, found, device_kind=device)
        where = "not kept" if file is None else f"kept in {file}"
        logger.info("Compared the implementations of %d calls of ops in %.0f s; %s.", len(found), seconds, where)
    return {**known, **found}


def _describe(choices: Choices, calls: Mapping[str, OpCall]) -> str:
    counts = Counter(f"{call.op} {choices[key].chosen}" for key, call in calls.items() if key in choices)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "the defaults"
