"""The command ``python -m dat_jax.tune``: compare the implementations of the ops of a run, print and write the table."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence

import jax
from ml_collections import ConfigDict
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table

from dat_jax.cli.console import configure_logging, make_console
from dat_jax.config.validation import validate
from dat_jax.errors import UserError
from dat_jax.ops.calls import OpCall
from dat_jax.ops.dispatch import compiling_for, target_platform
from dat_jax.profiling.step_report import STEPS, make_sources
from dat_jax.profiling.topologies import find_devices
from dat_jax.storage import atomic_path
from dat_jax.training.compilation import enable_cache
from dat_jax.training.trainer import Trainer
from dat_jax.tuning.choices import Choices, store_choices, write_choices
from dat_jax.tuning.compiled import make_compiled_measure
from dat_jax.tuning.tune import tune

logger = logging.getLogger(__name__)


def tune_run(
    config: ConfigDict,
    *,
    steps: Sequence[str] = ("train",),
    topology: str | None = None,
    output: str | os.PathLike | None = None,
) -> Choices:
    """Compare the implementations of the ops of a run, on the attached device or for one that is not attached.

    No data set is read. On a TPU or GPU the choices are stored where runs find them, see ``config.tune``. Runs on CPUs use the
    defaults, and what a compiler says of a device that is not attached is no reason to change them: both tables are only printed
    and written to ``output``.

    Args:
      config: configuration of the run. The batch of one device follows from its batch sizes and the attached devices; with a
        topology from the devices of that.
      steps: "train", "eval" or both.
      topology: a device that is not attached, see ``find_devices``; its compiler counts bytes, and nothing is executed.
      output: file for the choices, or None.

    Returns:
      The choices.

    Raises:
      UserError: an argument or the configuration is impossible, or the file cannot be written.
    """
    if not steps or not set(steps) <= set(STEPS):
        raise UserError(f"--steps must be one or more of {', '.join(STEPS)}, got {','.join(steps) or 'none'}.")
    validate(config)
    if (implementation := config.model.get("implementation", "auto")) != "auto":
        raise UserError(f"Nothing is compared with config.model.implementation={implementation}; set it to auto.")
    if topology is not None:
        jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    configure_logging()
    # What cannot be written is refused before the comparison.
    with contextlib.nullcontext() if output is None else atomic_path(output, overwrite=True) as file:
        device, calls, choices = (
            _tune_attached(config, steps) if topology is None else _tune_compiled(config, steps, topology)
        )
        print_choices(make_console(), calls, choices, device=device, executed=topology is None)
        if file is not None:
            write_choices(file, choices, device_kind=device)
    return choices


def _tune_attached(config: ConfigDict, steps: Sequence[str]) -> tuple[str, dict[str, OpCall], Choices]:
    """Kind of the attached devices, the calls of the steps, and the choices, which are stored where runs find them."""
    device = jax.local_devices()[0].device_kind
    calls = _list_calls(Trainer(config, sources=_make_sources(config)), steps)
    if target_platform() == "cpu":
        return device, calls, tune(calls)
    cache = enable_cache(config.compilation_cache)  # before the comparison, whose programs are kept too
    choices = tune(calls)
    if file := store_choices(cache, choices, device_kind=device):
        logger.info("The choices for runs are kept in %s.", file)
    else:
        logger.warning(
            "The choices are not kept for runs: set config.compilation_cache to a directory that can be written."
        )
    return device, calls, choices


def _tune_compiled(config: ConfigDict, steps: Sequence[str], topology: str) -> tuple[str, dict[str, OpCall], Choices]:
    """Kind of the devices of a topology, the calls of the steps, and the choices by the bytes that its compiler counts."""
    chip, devices = find_devices(topology)
    with compiling_for(chip.platform):
        calls = _list_calls(Trainer(config, devices=devices, sources=_make_sources(config)), steps)
        choices = tune(calls, measure=make_compiled_measure(devices))
    return devices[0].device_kind, calls, choices


def _make_sources(config: ConfigDict):
    return make_sources(config, classes=None, examples=1000 * config.batch_size)


def _list_calls(trainer: Trainer, steps: Sequence[str]) -> dict[str, OpCall]:
    if "train" in steps:
        trainer.check_train_batch()
    # The sizes of the images of an evaluation are only known from its data, which are not read.
    return {key: call for step in steps for key, call in trainer.list_op_calls(step, every_shape=False).items()}


def print_choices(
    console: Console, calls: Mapping[str, OpCall], choices: Choices, *, device: str, executed: bool
) -> None:
    """Print a table with a row for each implementation of each call.

    Args:
      console: where to print.
      calls: the calls, by their keys.
      choices: their choices.
      device: kind of the device.
      executed: whether the implementations ran on the device.
    """
    title = "time, ms" if executed else "GB in device memory"
    box = HEAVY_HEAD if console.is_terminal else None
    table = Table("op", "first array and options", "implementation", title, "difference", "", box=box)
    for key, call in calls.items():
        shape, dtype = call.main_array
        options = [f"{option}={value}" for option, value in call.options]
        name, array = "gradient of " * call.differentiated + call.op, " ".join([f"{dtype}{list(shape)}", *options])
        choice = choices.get(key)
        if choice is None:
            table.add_row(name, array, "cannot be compared", "-", "-", "")
            continue
        for implementation, measured in choice.measured.items():
            cost = measured.seconds and 1e3 * measured.seconds if executed else measured.bytes and measured.bytes / 1e9
            default = " (default)" if implementation == choice.default else ""
            table.add_row(
                name,
                array,
                implementation + default,
                "-" if cost is None else f"{cost:.4g}",
                "-" if measured.error is None else f"{measured.error:.1e}",
                "has a problem" if measured.problem else "best" if implementation == choice.chosen else "",
            )
            name = array = ""
    how = "measured on" if executed else "bytes by the compiler, without running, for"
    console.print(f"Implementations of {len(calls)} calls of ops, {how} {device}")
    console.print(table, soft_wrap=False)
    changed = sum(choice.chosen != choice.default for choice in choices.values())
    whose = "" if executed and target_platform() != "cpu" else " Runs do not use this table."
    console.print(f"For {changed} of {len(calls)} calls another implementation than the default is the best.{whose}")
