"""Trains or evaluates: python -m dat_jax.main --config=FILE --workdir=DIR [--mode=eval] [--config.KEY=VALUE ...]

A small DAT++ on embedded digits; more epochs of the same run; its evaluation; what a configuration comes to:

  python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/quickstart --config.epochs=10
  python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/quickstart --mode=eval
  python -m dat_jax.main --config=configs/dat_pp_s.py --config.data.directory=/data/imagenet --print_config

DIR gets checkpoints, metrics, pictures and a summary. The same command goes on where an interrupted run ended.
"""

import shlex
import sys

import yaml
from absl import flags
from ml_collections import ConfigDict, config_flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.config.validation import validate
from dat_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run, a file of configs/; --config.KEY=VALUE sets a key of it.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go; a run in it goes on.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether this is one process of several: on lets jax find the others, as on a TPU pod; auto where variables say so.",
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, where nothing else says it.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has, likewise.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, likewise.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate a checkpoint of the work directory.")
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Prints the configuration, checked, and ends.")
_QUIET = flags.DEFINE_bool("quiet", False, "Says warnings, errors and the result only.", short_name="q")
_FLAGS = {
    "The run": ("config=FILE", "workdir=DIR", "mode=train|eval"),
    "What is said": ("quiet", "print_config"),
    "Several processes": (
        *("distributed=auto|on|off", "coordinator_address=HOST:PORT", "num_processes=N", "process_id=N"),
    ),
}
_PRINT_FORMS = ("--config.print", "-config.print", "--config.print=True", "--config.print=true")


def format_config(config: ConfigDict) -> str:
    """A configuration as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False, width=120)


def describe_flags(config_file: str, overrides: dict) -> str:
    """--config=FILE --config.KEY=VALUE ..., as a shell takes it."""
    given = [f"--config={config_file}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    return " ".join(map(shlex.quote, given))


def main(_):
    """One call, and its mistakes as one sentence."""
    if _CONFIG.value is None or not (_WORKDIR.value or _PRINT_CONFIG.value):
        fail("Wanted: --config=FILE --workdir=DIR, such as --config=configs/quickstart.py --workdir=runs/quickstart.")
    if not isinstance(_CONFIG.value, ConfigDict):
        fail(f"There is no configuration at {flags.FLAGS['config'].config_filename}.")
    if _PRINT_CONFIG.value:
        try:
            validate(_CONFIG.value)
        except UserError as error:
            fail(str(error))
        print(format_config(_CONFIG.value), end="")
        return
    from dat_jax.parallel import multihost as distributed
    from dat_jax.training import loop  # late, so that a mistake in the flags is said at once

    try:
        distributed.start(
            mode=_DISTRIBUTED.value,
            coordinator_address=_COORDINATOR.value,
            num_processes=_PROCESSES.value,
            process_id=_PROCESS.value,
        )
        if _MODE.value == "eval":
            loop.evaluate(_CONFIG.value, _WORKDIR.value, quiet=_QUIET.value)
            return
        flag = flags.FLAGS["config"]
        how = describe_flags(flag.config_filename, config_flags.get_override_values(flag))
        loop.train(_CONFIG.value, _WORKDIR.value, quiet=_QUIET.value, command_flags=how)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    sys.argv[:] = ["--print_config" if argument in _PRINT_FORMS else argument for argument in sys.argv]
    run_tool(main, groups=_FLAGS, interrupted="Interrupted: the same command goes on from the last checkpoint.")
