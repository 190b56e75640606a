"""Converts weights: python -m dat_jax.conversion WEIGHTS OUT [--model=NAME | --yaml=FILE]

A published classifier; one whose configuration is published too; a published segmentor, whole; a run of ours to others:

  python -m dat_jax.conversion dat_pp_tiny.pth weights/dat_pp_t
  python -m dat_jax.conversion dat_pp_base.pth weights/dat_pp_b --yaml=dat_pp_base.yaml
  python -m dat_jax.conversion upernet_dat_s.pth weights/upernet_dat_pp_s
  python -m dat_jax.conversion runs/dat_pp_s dat_pp_s.safetensors

WEIGHTS with published names (.pth, .pt, .safetensors), of a classifier or of a whole segmentor or detector, become an export,
the folder OUT, which dat_jax.load_pretrained reads and config.init_from takes. An export or the work directory of a run
becomes OUT.safetensors with published names.

--yaml takes the published configuration: a YAML file for a classifier, a Python file (.py, which is read and never run) for a
segmentor or detector.
"""

import pathlib
import sys

from absl import flags
from rich.console import Console

from dat_jax.command_line import fail, run_tool
from dat_jax.console import make_console, print_table
from dat_jax.errors import UserError

_USAGE = "WEIGHTS OUT [--model=NAME | --yaml=FILE]"
_FLAGS = {"What WEIGHTS are of, where it is not found out": ("model=NAME", "yaml=FILE")}


def define_flags(values: flags.FlagValues) -> None:
    """All of this tool."""
    help_text = "What the weights are of, one of dat_jax.list_models(); of a segmentor or detector its backbone."
    flags.DEFINE_string("model", None, help_text, flag_values=values)
    flags.DEFINE_string(
        "yaml",
        None,
        "Published configuration of the weights: YAML of a classifier, .py of a segmentor or detector.",
        flag_values=values,
    )


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """One call, and its mistakes as one sentence."""
    if len(argv) != 3 or (values.model is not None and values.yaml is not None):
        fail(f"Wanted: {_USAGE}, got {' '.join(argv[1:]) or 'nothing'}.")
    _, weights, out = argv
    import jax  # late, as it takes long

    from dat_jax.conversion import command

    jax.config.update("jax_platforms", "cpu")  # another program may have the accelerator
    try:
        if not pathlib.Path(weights).is_dir():
            rows = command.import_weights(weights, out, model=values.model, yaml_file=values.yaml)
        elif values.model is None and values.yaml is None:
            rows = command.export_weights(weights, out)
        else:
            raise UserError(f"--model and --yaml are for a file of weights; the folder {weights} says what it is of.")
    except UserError as error:
        fail(str(error))
    console = make_console()
    if console.is_terminal:
        width = max(map(len, rows.values())) + 20  # a path or checksum that is broken cannot be copied
        console = Console(highlight=False, width=width)
    print_table(console, "Converted", rows)


if __name__ == "__main__":
    # Where arrays cannot be read, the reader leaves an event loop behind, and a traceback that says no more.
    sys.unraisablehook = lambda _: None
    run_tool(main, groups=_FLAGS, define_flags=define_flags, interrupted="Interrupted: nothing was written.")
