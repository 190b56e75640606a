"""Convert weights: python -m dat_jax.conversion WEIGHTS OUT [--model=NAME | --yaml=FILE] [--form=FORM] [--weights=auto|ema|raw]

  python -m dat_jax.conversion dat_pp_tiny.pth weights/dat_pp_t
  python -m dat_jax.conversion dat_pp_base.pth weights/dat_pp_b --yaml=dat_pp_base.yaml
  python -m dat_jax.conversion upernet_dat_s.pth weights/upernet_dat_pp_s
  python -m dat_jax.conversion runs/dat_pp_s dat_pp_s.safetensors

The commands convert a published classifier, a classifier described by its published configuration, a published segmentor,
and, in the other direction, a run of this package.

If WEIGHTS is a file with published names, of a classifier, segmentor or detector, OUT is a new folder of weights, which
dat_jax.load and config.init_from read. The file may be one of torch.save (.pth, .pt, .pth.tar, .bin, .ckpt or any other
suffix) or .safetensors. It may hold bare weights or a training checkpoint, also of timm, MMEngine, MMCV, Lightning or
DeepSpeed. It is read without PyTorch, and no code in it is run.

If WEIGHTS is a folder of weights or the work directory of a run, OUT is a new .safetensors file with published names.

--yaml takes the published configuration: a YAML file for a classifier, a Python file (.py, which is read and never run) for a
segmentor or detector.
"""

import sys

from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.errors import UserError

_USAGE = "WEIGHTS OUT [--model=NAME | --yaml=FILE] [--form=FORM] [--weights=auto|ema|raw]"
_FLAGS = {
    "Model of WEIGHTS, if it is not recognized": ("model=NAME", "yaml=FILE", "form=cvpr2022|dat_pp"),
    "Weights to take from a checkpoint": ("weights=auto|ema|raw",),
}


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags of the tool."""
    help_text = (
        "Model of the weights, one of dat_jax.list_models(). For a segmentor or detector, the model of its backbone."
    )
    flags.DEFINE_string("model", None, help_text, flag_values=values)
    help_text = "Published configuration of the weights: YAML for a classifier, .py for a segmentor or detector."
    flags.DEFINE_string("yaml", None, help_text, flag_values=values)
    help_text = (
        "Form of deformable attention that the weights were trained with. cvpr2022: DAT v1 as it was released. dat_pp: the "
        "code published with DAT++. Default: that of the model, which is cvpr2022 for DAT v1."
    )
    flags.DEFINE_enum("form", None, ["cvpr2022", "dat_pp"], help_text, flag_values=values)
    help_text = (
        "auto: weights under the usual keys (model, state_dict, ...; student before teacher), averaged ones only if there are "
        "no others. ema: only averaged weights (model_ema, state_dict_ema, ...). raw: only weights that are not averaged."
    )
    flags.DEFINE_enum("weights", "auto", ["auto", "ema", "raw"], help_text, flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Convert weights and print what was written; a ``UserError`` ends the program with one sentence."""
    if len(argv) != 3 or (values.model is not None and values.yaml is not None):
        fail(f"Expected {_USAGE}, got {' '.join(argv[1:]) or 'nothing'}.")
    import jax  # takes seconds, so --help and mistakes in the flags come first

    from dat_jax.conversion import command

    jax.config.update("jax_platforms", "cpu")  # the accelerator may be in use by another program
    try:
        command.run(*argv[1:], model=values.model, yaml_file=values.yaml, which=values.weights, form=values.form)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    # A failed read leaves an event loop open in TensorStore's reader. At exit this would print a second, useless traceback.
    sys.unraisablehook = lambda _: None
    run_tool(main, groups=_FLAGS, define_flags=define_flags, interrupted="Interrupted: nothing was written.")
