"""Compares the implementations of each op of a run on this device: python -m dat_jax.tune --config=CONFIG

A training run does the same before its first step on a TPU or GPU, unless --config.tune=False. This command prints the table of
what was measured: for each call of an op, whether each implementation agrees with the plain one, and how long it takes.

  python -m dat_jax.tune --config=configs/dat_pp_s.py --output=choices.json

For a device that is not attached, its compiler counts the bytes in device memory instead, and nothing is executed. The compile
report can use the choices:

  python -m dat_jax.tune --config=configs/dat_pp_t.py --topology=v5e:1x1 --config.batch_size=64 --output=choices.json
  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:1x1 --steps=train --config.batch_size=64 \\
      --choices=choices.json
"""

from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.config.files import define_config_flag
from dat_jax.errors import UserError

_FLAGS = {"Run": ("config=CONFIG", "steps=train,eval"), "Device": ("topology=NAME",), "Output": ("output=FILE",)}


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags of this command. Importing the module defines none, as dat_jax.main also has the flag ``config``."""
    define_config_flag(values)
    flags.DEFINE_list("steps", ["train"], "Steps whose ops are compared: train, eval or both.", flag_values=values)
    help_text = "A device that is not attached, such as v5e:1x1 or h100; by default the attached one."
    flags.DEFINE_string("topology", None, help_text, flag_values=values)
    flags.DEFINE_string("output", None, "JSON file for the choices.", flag_values=values)


def main(arguments: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Check the flags and call ``tune_run``."""
    if len(arguments) > 1:
        fail(f"Unexpected argument {arguments[1]}: expected flags only, --NAME=VALUE.")
    if values.config is None:
        fail("Expected --config=CONFIG, such as --config=dat_pp_t.")
    from dat_jax.tuning.command import tune_run  # imports jax, which takes seconds

    try:
        tune_run(values.config, steps=values.steps, topology=values.topology, output=values.output)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_flags)
