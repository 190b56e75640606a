"""Trains or evaluates: python -m dat_jax.main --config=FILE --workdir=DIR [--mode=eval] [--config.KEY=VALUE ...]"""

import warnings

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dat_jax.command_line import fail, parse_flags
from dat_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run, a file of configs/.", lock_config=True)
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


def main(_):
    """One call, and its mistakes as one sentence."""
    if not _WORKDIR.value or _CONFIG.value is None:
        fail("Wanted: --config=FILE --workdir=DIR, such as --config=configs/quickstart.py --workdir=runs/quickstart.")
    if not isinstance(_CONFIG.value, ConfigDict):
        fail(f"There is no configuration at {flags.FLAGS['config'].config_filename}.")
    from dat_jax.training import distributed, loop  # late, so that a mistake in the flags is said at once

    try:
        distributed.start(
            mode=_DISTRIBUTED.value,
            coordinator_address=_COORDINATOR.value,
            num_processes=_PROCESSES.value,
            process_id=_PROCESS.value,
        )
        run = loop.train if _MODE.value == "train" else loop.evaluate
        run(_CONFIG.value, _WORKDIR.value)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.set_verbosity(logging.ERROR)
    app.run(main, flags_parser=parse_flags)
