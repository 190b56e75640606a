"""Export a trained model for other programs: python -m dat_jax.export TRAINED OUT_DIR [--formats=FORMAT,...] ...

  python -m dat_jax.export runs/quickstart exported
  python -m dat_jax.export runs/dat_pp_s exported/dat_pp_s --formats=stablehlo --platforms=cpu --preprocessing=outside
  python -m dat_jax.export runs/mask_rcnn_t exported/mask_rcnn_t --batch=1 --image_size=800,1344
  python -m dat_jax.export runs/upernet_t exported/upernet_t --buckets=512x768,768x512
  python -m dat_jax.export runs/dat_pp_s exported/dat_pp_s_features --features=0,1,2,3
  python -m dat_jax.export --check=exported
  python -m dat_jax.export exported --push=hf://USER/REPOSITORY

The first command exports a classifier. The second exports only its program, for a CPU and for images that the caller
normalizes. The third exports a detector for images padded to 800 x 1344. The fourth exports a segmentor as two programs, each
for images of any size that fits into its bucket. The fifth exports a program that returns the feature maps of the backbone. The
sixth checks the files of an exported folder. The last one pushes them to the Hugging Face Hub.

TRAINED is the work directory of a run, or a folder of weights that dat_jax.conversion or dat_jax.export wrote. OUT_DIR is a
new folder, which is written atomically:

  manifest.json       model, classes, preprocessing, inputs and outputs, and size and SHA-256 digest of every file
  model.json params/  weights, class names and inference options; every tool here accepts the folder as TRAINED
  model.stablehlo     one program with its weights for all platforms; loading it takes jax and flatbuffers, not this package
                      (model_HxW.stablehlo for each bucket, with --buckets)
  model.safetensors   weights with their published names

With --push=hf://USER/REPOSITORY[@BRANCH] the folder is also pushed to a repository of the Hub, as one commit, with a model card.
Without OUT_DIR, TRAINED is an exported folder, which is pushed as it is. It is an optional extra: pip install "dat-jax[hub]".

ONNX is an optional extra: pip install -e ".[onnx]". --formats=onnx then writes model.onnx for a classifier or a segmentor.
"""

import sys

from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.errors import UserError

_FLAGS = {
    "Weights": ("ema_decay=DECAY",),
    "Files to write": ("formats=FORMAT,...",),
    "Program (stablehlo and onnx)": (
        "platforms=PLATFORM,...",
        "preprocessing=inside|outside",
        "batch=symbolic|N",
        "image_size=SIDE | HEIGHT,WIDTH",
        "buckets=HxW,...",
        "features=STAGE,...",
    ),
    "Classes and preprocessing": ("classes=FILE", "resize=PIXELS"),
    "Hugging Face Hub": ("push=hf://USER/REPOSITORY[@BRANCH]", "license=ID", "private"),
    "Check instead of export": ("check=DIR",),
}
_EXPORT_GROUPS = ("Weights", "Files to write", "Program (stablehlo and onnx)", "Classes and preprocessing")


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags of the tool."""
    help_text = "Export the average of the weights with this decay, one of config.ema_decays of the run."
    flags.DEFINE_float("ema_decay", None, help_text, flag_values=values)
    help_text = "One or more of orbax (model.json and params), stablehlo, safetensors and onnx."
    flags.DEFINE_list("formats", ["orbax", "stablehlo", "safetensors"], help_text, flag_values=values)
    help_text = "One or more of cpu, tpu, cuda and rocm. The platforms need not be attached. ONNX ignores them."
    flags.DEFINE_list("platforms", ["cpu", "tpu", "cuda"], help_text, flag_values=values)
    help_text = (
        "inside: the program takes images of the trained dtype, by default uint8, and normalizes them. outside: it takes "
        "normalized float32 images. The caller resizes images in both cases."
    )
    flags.DEFINE_enum("preprocessing", "inside", ["inside", "outside"], help_text, flag_values=values)
    help_text = (
        "Batch size of the program; symbolic accepts any batch size. A detector requires a number, 1 by default; other models "
        "are symbolic by default."
    )
    flags.DEFINE_string("batch", None, help_text, flag_values=values)
    help_text = (
        "Image size of the program in pixels. Default: that of the run, or the published one: for a segmentor a square of its "
        "short side, for a detector its short and long side, padded."
    )
    flags.DEFINE_list("image_size", None, help_text, flag_values=values)
    help_text = (
        "Comma-separated buckets, HEIGHTxWIDTH in pixels. Writes one program per bucket, which takes images of any size that "
        "fits into the bucket, and their sizes. Cannot be combined with --image_size."
    )
    flags.DEFINE_string("buckets", None, help_text, flag_values=values)
    help_text = (
        "Comma-separated stages, from 0. The program returns their feature maps instead of predictions, for another head: with "
        "their output norms from a segmentor or detector, without norms from a classifier. StableHLO only."
    )
    flags.DEFINE_list("features", None, help_text, flag_values=values)
    flags.DEFINE_string("classes", None, "Text file with the class names, one per line.", flag_values=values)
    help_text = "Classifiers: side in pixels that images are resized to before their center is cropped."
    flags.DEFINE_integer("resize", None, help_text, flag_values=values)
    help_text = "Push the exported folder to this repository of the Hugging Face Hub. A missing repository or branch is created."
    flags.DEFINE_string("push", None, help_text, flag_values=values)
    help_text = "License of the weights for the model card, an identifier of the Hub such as apache-2.0."
    flags.DEFINE_string("license", "unknown", help_text, flag_values=values)
    flags.DEFINE_bool("private", False, "Create the repository as a private one.", flag_values=values)
    help_text = "Compare the files of an exported folder with its manifest instead of exporting."
    flags.DEFINE_string("check", None, help_text, flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Export a model, or check or push an exported folder; a ``UserError`` ends the program with one sentence."""
    _check_combinations(argv, values)
    push_only = bool(values.push) and len(argv) == 2
    if not push_only and len(argv) != (1 if values.check else 3):
        fail(
            "Expected TRAINED OUT_DIR [--formats=FORMAT,...], EXPORTED --push=hf://USER/REPOSITORY or --check=DIR, got "
            f"{' '.join(argv[1:]) or 'nothing'}."
        )
    from dat_jax.exporting import command  # takes seconds, so --help and mistakes in the flags come first

    try:
        if values.check:
            command.check(values.check)
        elif push_only:
            command.push(argv[1], values.push, license_id=values.license, private=values.private)
        else:
            command.export(
                *argv[1:],
                formats=values.formats,
                platforms=values.platforms,
                preprocessing=values.preprocessing,
                batch=values.batch,
                image_size=values.image_size,
                classes=values.classes,
                resize=values.resize,
                ema_decay=values.ema_decay,
                buckets=values.buckets,
                features=values.features,
                push_to=values.push,
                license_id=values.license,
                private=values.private,
            )
    except UserError as error:
        fail(str(error))


def _check_combinations(argv: list[str], values: flags.FlagValues) -> None:
    """End the program if a flag would have no effect."""
    if values.push and values.check:
        fail("--check and --push cannot be combined: --push checks the folder, too.")
    if not values.push and (values["license"].present or values.private):
        fail("--license and --private are for --push=hf://USER/REPOSITORY.")
    of_export = [form.partition("=")[0] for title in _EXPORT_GROUPS for form in _FLAGS[title]]
    used = [f"--{name}" for name in of_export if values[name].present]
    if values.push and len(argv) == 2 and used:
        fail(f"{', '.join(used)}: an exported folder is pushed as it is; export it again with OUT_DIR to change it.")


if __name__ == "__main__":
    # A failed read leaves an event loop open in TensorStore's reader. At exit this would print a second, useless traceback.
    sys.unraisablehook = lambda _: None
    run_tool(main, groups=_FLAGS, define_flags=define_flags)
