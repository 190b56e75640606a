"""Trains or evaluates: python -m dat_jax.main --config=CONFIG --workdir=DIR [--mode=eval] [--config.KEY=VALUE ...]

CONFIG is a name, such as dat_pp_s or upernet:dat_pp_s, or a file. Examples: a small DAT++ on embedded digits, the same run
with more epochs, its evaluation, and a configuration with all its values:

  python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/quickstart --config.epochs=10
  python -m dat_jax.main --workdir=runs/quickstart --mode=eval
  python -m dat_jax.main --config=configs/dat_pp_s.py --config.data.directory=/data/imagenet --print_config

DIR receives checkpoints, metrics, figures and a summary. Repeat the command to resume an interrupted run. Without --config, the
evaluation has the configuration of the run in DIR, from its config.json; --config.KEY=VALUE overrides it.
"""

import shlex
import sys
import time

import yaml
from absl import flags
from ml_collections import ConfigDict, config_flags

from dat_jax.cli.flags import HELP_FLAGS, expand_home, fail, run_tool
from dat_jax.cli.process_flags import PROCESS_FLAGS, define_process_flags, read_process_options
from dat_jax.config import validate
from dat_jax.config.files import add_recorded_config, define_config_flag
from dat_jax.errors import UserError

_STARTED = time.monotonic()  # before jax is loaded, which takes seconds
_CONFIG = define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of checkpoints, metrics and figures. A run in it is resumed."
)
define_process_flags(flags.FLAGS)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "knn"],
    "Train, or evaluate a checkpoint of the work directory: its predictions, or its features by nearest neighbors.",
)
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Check the configuration, print it as YAML and exit.")
_QUIET = flags.DEFINE_bool("quiet", False, "Print only warnings, errors and the result.", short_name="q")
_FLAGS = {
    "Run": ("config=CONFIG", "workdir=DIR", "mode=train|eval|knn"),
    "Output": ("quiet", "print_config"),
    "Several processes": PROCESS_FLAGS,
}
_PRINT_FORMS = ("--config.print", "-config.print", "--config.print=True", "--config.print=true")


def format_config(config: ConfigDict) -> str:
    """A configuration as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False, width=120)


def format_command_flags(config_name: str, overrides: dict) -> str:
    """--config=CONFIG --config.KEY=VALUE ..., quoted for a shell."""
    words = [f"--config={config_name}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    return " ".join(map(shlex.quote, words))


def main(arguments):
    """Parses flags and makes one call; a UserError is printed as one sentence."""
    if len(arguments) > 1:
        fail(
            f"Unexpected argument {arguments[1]}: expected flags only, --NAME=VALUE. A value with spaces must be quoted."
        )
    workdir = _WORKDIR.value
    if _CONFIG.value is None or not (workdir or _PRINT_CONFIG.value):
        fail("Expected --config=CONFIG --workdir=DIR, such as --config=quickstart --workdir=runs/quickstart.")
    try:
        if _PRINT_CONFIG.value:
            validate(_CONFIG.value)
            print(format_config(_CONFIG.value), end="")
        elif workdir:
            _run(_CONFIG.value, workdir)
    except UserError as error:
        fail(str(error))


def _run(config: ConfigDict, workdir: str) -> None:
    # Imported here, so that --help and errors in the flags do not wait for jax.
    from dat_jax.parallel import multihost
    from dat_jax.training import loop

    multihost.start(**read_process_options(flags.FLAGS))
    if _MODE.value == "eval":
        loop.evaluate(config, workdir, quiet=_QUIET.value)
        return
    if _MODE.value == "knn":
        loop.evaluate_neighbors(config, workdir, quiet=_QUIET.value)
        return
    flag = flags.FLAGS["config"]
    file = flag.config_filename  # pyright: ignore[reportAttributeAccessIssue] (a flag of config_flags)
    command_flags = format_command_flags(file, config_flags.get_override_values(flag))
    loop.train(config, workdir, quiet=_QUIET.value, command_flags=command_flags, started=_STARTED)


if __name__ == "__main__":
    sys.argv[:] = ["--print_config" if argument in _PRINT_FORMS else argument for argument in sys.argv]
    if not {*HELP_FLAGS, "--version"} & set(sys.argv):
        try:
            sys.argv[:] = add_recorded_config(expand_home(sys.argv))
        except UserError as error:
            fail(str(error))
    run_tool(main, groups=_FLAGS, interrupted="Interrupted. Repeat the command to resume from the last checkpoint.")
