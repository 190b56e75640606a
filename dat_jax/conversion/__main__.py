"""Convert weights: python -m dat_jax.conversion WEIGHTS OUT [--model=NAME | --yaml=FILE] [--form=FORM] [--weights=auto|ema|raw]

A published classifier, one with its published configuration, a whole published segmentor, and a run of this package:

  python -m dat_jax.conversion dat_pp_tiny.pth weights/dat_pp_t
  python -m dat_jax.conversion dat_pp_base.pth weights/dat_pp_b --yaml=dat_pp_base.yaml
  python -m dat_jax.conversion upernet_dat_s.pth weights/upernet_dat_pp_s
  python -m dat_jax.conversion runs/dat_pp_s dat_pp_s.safetensors

If WEIGHTS is a file with published names, of a classifier or of a whole segmentor or detector, OUT is the folder of a new
export, which dat_jax.load and config.init_from read. The file may be one of torch.save (.pth, .pt, .pth.tar,
.bin, .ckpt, with any suffix) or .safetensors: bare weights or a training checkpoint, also of timm, MMEngine, MMCV,
Lightning or DeepSpeed. It is read without PyTorch, and no code in it is run.

If WEIGHTS is an export or the work directory of a run, OUT is a new .safetensors file with published names.

--yaml takes the published configuration: a YAML file for a classifier, a Python file (.py, which is read and never run) for a
segmentor or detector.
"""

import pathlib
import sys

from absl import flags
from rich.console import Console

from dat_jax.cli.console import make_console, print_table
from dat_jax.cli.flags import fail, run_tool
from dat_jax.errors import UserError

_USAGE = "WEIGHTS OUT [--model=NAME | --yaml=FILE] [--form=FORM] [--weights=auto|ema|raw]"
_FLAGS = {
    "What WEIGHTS are of, where it is not found out": ("model=NAME", "yaml=FILE", "form=cvpr2022|dat_pp"),
    "Which weights to take from a checkpoint": ("weights=auto|ema|raw",),
}


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
    help_text = (
        "The form of deformable attention that the weights were trained with. cvpr2022: DAT v1 as it was released. dat_pp: "
        "the code published with DAT++. Default: that of the model, which for DAT v1 is cvpr2022."
    )
    flags.DEFINE_enum("form", None, ["cvpr2022", "dat_pp"], help_text, flag_values=values)
    help_text = (
        "auto: those in the ordinary place (model, state_dict, ...; student before teacher), averaged ones only if there "
        "are no others. ema: only averaged weights (model_ema, state_dict_ema, ...). raw: only weights that are not averaged."
    )
    flags.DEFINE_enum("weights", "auto", ["auto", "ema", "raw"], help_text, flag_values=values)


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
            rows = command.import_weights(
                weights, out, model=values.model, yaml_file=values.yaml, which=values.weights, form=values.form
            )
        elif values.model is None and values.yaml is None and values.weights == "auto":
            rows = command.export_weights(weights, out, form=values.form)
        else:
            raise UserError(
                f"--model, --yaml and --weights are for a file of weights; the folder {weights} describes its model."
            )
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
