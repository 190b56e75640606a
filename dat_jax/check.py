"""Checks a run on the machines that it will use, in minutes: python -m dat_jax.check --config=CONFIG --workdir=DIR

Every part of the run is tried: devices, storage, data, loading of images, compilation, training steps, evaluation, the sum of
the gradient over the devices, saving and restoring a checkpoint, and the fast algorithms against the plain ones. Then it prints
how long the run will take, what limits it and what to change. The status is 1 if a problem was found. Nothing is left behind.

  python -m dat_jax.check --config=configs/quickstart.py --workdir=runs/quickstart
  python -m dat_jax.check --config=configs/quickstart.py --workdir=runs/quickstart --skip=algorithms,communication
  python -m dat_jax.check --config=configs/dat_pp_s.py --workdir=gs://my-bucket/runs/s --config.data.directory=/data/imagenet

On several hosts, run the same command on each, with --distributed=on where the run needs it.
"""

import signal
import sys

from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.cli.process_flags import PROCESS_FLAGS, define_process_flags, read_process_options
from dat_jax.config.files import define_config_flag
from dat_jax.errors import UserError

_FLAGS = {
    "Run": ("config=CONFIG", "workdir=DIR"),
    "Check": ("devices=N", "seconds=SECONDS", "skip=PART,..."),
    "Several processes": PROCESS_FLAGS,
}


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags of this command. Importing the module defines none, as dat_jax.main has some of them."""
    define_config_flag(values)
    flags.DEFINE_string("workdir", None, "Work directory of the run. A run in it is not disturbed.", flag_values=values)
    help_text = "Number of devices of all processes, which is a problem if it differs; by default any number."
    flags.DEFINE_integer("devices", None, help_text, lower_bound=1, flag_values=values)
    help_text = "For how long images are loaded to measure the speed of the input."
    flags.DEFINE_float("seconds", 10.0, help_text, lower_bound=0.0, flag_values=values)
    help_text = (
        "Parts to leave out: devices, storage, data, input, compilation, steps, evaluation, communication, checkpoint, "
        "algorithms. Parts that need them are left out, too."
    )
    flags.DEFINE_list("skip", [], help_text, flag_values=values)
    define_process_flags(values)


def main(arguments: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Check the flags and call ``check``."""
    if len(arguments) > 1:
        fail(f"Unexpected argument {arguments[1]}: expected flags only, --NAME=VALUE.")
    if values.config is None or not values.workdir:
        fail("Expected --config=CONFIG --workdir=DIR, such as --config=quickstart --workdir=runs/quickstart.")
    from dat_jax.parallel import multihost  # imports jax, which takes seconds
    from dat_jax.preflight.command import check

    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what was written is removed
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        multihost.start(**read_process_options(values))
        options = dict(seconds=values.seconds, expected_devices=values.devices, skip=values.skip)
        if check(values.config, values.workdir, **options):
            sys.exit(1)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    run_tool(
        main,
        groups=_FLAGS,
        define_flags=define_flags,
        interrupted="Interrupted. Nothing is left in the work directory.",
    )
