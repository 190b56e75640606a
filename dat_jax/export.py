"""A trained model for other programs: python -m dat_jax.export TRAINED OUT_DIR [--formats=orbax,stablehlo,safetensors] ...

A classifier; one whose images are normalised by who calls it, for a CPU alone; a detector, of images of one size; whether the
files of a folder are as they were written:

  python -m dat_jax.export runs/quickstart exported
  python -m dat_jax.export runs/dat_pp_s exported/dat_pp_s --formats=stablehlo --platforms=cpu --preprocessing=outside
  python -m dat_jax.export runs/mask_rcnn_t exported/mask_rcnn_t --batch=1 --image_size=800,1344
  python -m dat_jax.export --check=exported

TRAINED is an export, or the work directory of a run. OUT_DIR is a new folder, which appears when it is whole:

  manifest.json      model, classes, what is done to an image before, inputs and outputs, and of every file the SHA-256
  model.json params/ what every tool here takes as TRAINED, with the names of the classes and the way to look at images
  model.stablehlo    one program for all platforms, weights inside: jax alone loads it, with flatbuffers, not this package
  model.safetensors  weights with their published names

ONNX is an extra, pip install -e ".[onnx]": --formats=onnx writes model.onnx of a classifier or a segmentor.
"""

import pathlib
import sys

from absl import flags

from dat_jax.cli.console import format_size, make_console, print_table
from dat_jax.cli.flags import fail, run_tool
from dat_jax.errors import UserError
from dat_jax.storage import check_absent

_FLAGS = {
    "What is written": ("formats=FORMAT,...",),
    "The program (stablehlo)": (
        *(
            "platforms=PLATFORM,...",
            "preprocessing=inside|outside",
            "batch=symbolic|N",
            "image_size=SIDE | HEIGHT,WIDTH",
        ),
    ),
    "How images are seen": ("classes=FILE", "resize=PIXELS"),
    "Instead": ("check=DIR",),
}


def define_flags(values: flags.FlagValues) -> None:
    """All of this tool."""
    help_text = "Some of orbax (model.json and params), stablehlo, safetensors and onnx."
    flags.DEFINE_list("formats", ["orbax", "stablehlo", "safetensors"], help_text, flag_values=values)
    help_text = "Some of cpu, tpu, cuda and rocm, none of which has to be here."
    flags.DEFINE_list("platforms", ["cpu", "tpu", "cuda"], help_text, flag_values=values)
    help_text = (
        "Who normalises images: the program, which takes uint8, or its caller, who gives float32. Both resize before."
    )
    flags.DEFINE_enum("preprocessing", "inside", ["inside", "outside"], help_text, flag_values=values)
    help_text = "How many images it takes: symbolic for any number. Of a detector a number; 1 unless given."
    flags.DEFINE_string("batch", None, help_text, flag_values=values)
    help_text = (
        "Of the images that it takes, pixels; unless given that of the run or as published: of a segmentor the short side, a "
        "square, of a detector short and long side, padded."
    )
    flags.DEFINE_list("image_size", None, help_text, flag_values=values)
    flags.DEFINE_string("classes", None, "A file with the names of the classes, one a line.", flag_values=values)
    help_text = "Classifiers: side that images are resized to, of which the centre is seen."
    flags.DEFINE_integer("resize", None, help_text, flag_values=values)
    flags.DEFINE_string("check", None, "Compares the files of such a folder with its manifest.", flag_values=values)


def parse_batch(text: str | None) -> int | None:
    """Of --batch; None for any number."""
    if text is None or text == "symbolic":
        return None
    if not text.isdecimal():
        raise UserError(f"--batch wants symbolic or a number of at least 1, got {text}.")
    return int(text)


def parse_image_size(parts: list[str] | None) -> tuple[int, int] | None:
    """Of --image_size: (height, width), equal where one is given; None where none is."""
    if parts is None:
        return None
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"--image_size wants SIDE or HEIGHT,WIDTH in pixels, got {','.join(parts)}.")
    return int(parts[0]), int(parts[-1])


def export(trained: str, out: str, values: flags.FlagValues) -> dict:
    """What the flags say of ``write_exported``; gives its manifest."""
    from dat_jax import inference
    from dat_jax.exporting import write_exported

    check_absent(out)  # said before anything is loaded
    shape, batch = parse_image_size(values.image_size), parse_batch(values.batch)
    looker = inference.load(trained, classes=values.classes, resize=values.resize)
    if isinstance(looker, inference.Classifier) and shape and shape[0] == shape[1]:
        looker = inference.load(trained, classes=values.classes, resize=values.resize, image_size=shape[0])
    if isinstance(looker, inference.ObjectDetector) and values.batch is None:
        batch = 1
    return write_exported(
        out,
        looker,
        formats=values.formats,
        image_shape=shape,
        platforms=values.platforms,
        preprocessing=values.preprocessing,
        batch=batch,
    )


def format_rows(manifest: dict) -> dict[str, str]:
    """What the table says of an export."""
    program, sizes = manifest["program"], {}
    for name, record in manifest["files"].items():
        top = f"{name.partition('/')[0]}/" if "/" in name else name
        sizes[top] = sizes.get(top, 0) + record["bytes"]
    rows = {"task": manifest["task"], "classes": str(len(manifest["classes"]))}
    if program:
        rows["platforms"] = ", ".join(program["platforms"])
        for kind in ("inputs", "outputs"):
            rows[kind] = ", ".join(_format_array(array) for array in program[kind])
    return rows | {name: format_size(size) for name, size in sizes.items()}


def _format_array(array):
    return f"{array['name']} {array['dtype']} ({', '.join(map(str, array['shape']))})"


def format_loading(directory: str, manifest: dict) -> str:
    """The lines of a program that loads model.stablehlo, or the way to load the weights where there is none."""
    program = manifest["program"]
    if program is None:
        return (
            f"import dat_jax\n\nmodel, variables = dat_jax.load({directory!r})"
            if "model.json" in manifest["files"]
            else ""
        )
    image_batch, *others = program["inputs"]
    count, height, width, _ = shape = tuple(1 if isinstance(side, str) else side for side in image_batch["shape"])
    given = f"images = numpy.zeros({shape}, numpy.{image_batch['dtype']})"
    given += f"; sizes = numpy.array([[{height}, {width}]] * {count}, numpy.int32)" if others else ""
    outputs = "logits" if len(program["outputs"]) == 1 else "detections"
    return "\n".join(
        [
            "import jax, jax.export, numpy, pathlib",
            f"data = pathlib.Path({str(pathlib.Path(directory) / program['file'])!r}).read_bytes()",
            "program = jax.jit(jax.export.deserialize(bytearray(data)).call)",
            f"{given}  # as manifest.json says",
            f"{outputs} = program({', '.join(array['name'] for array in program['inputs'])})",
        ]
    )


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """One call, and its mistakes as one sentence."""
    wrong = len(argv) != 1 if values.check else len(argv) != 3
    if wrong:
        fail(f"Wanted: TRAINED OUT_DIR [--formats=FORMAT,...], or --check=DIR, got {' '.join(argv[1:]) or 'nothing'}.")
    console = make_console()
    try:
        if values.check:
            from dat_jax.exporting import check_files

            count = len(check_files(values.check)["files"])
            console.print(f"{values.check}: all {count} files are as they were written.")
            return
        manifest = export(argv[1], argv[2], values)
    except UserError as error:
        fail(str(error))
    print_table(console, f"Exported to {argv[2]}", format_rows(manifest))
    lines = format_loading(argv[2], manifest)
    if lines:
        console.print(f"To load it:\n\n{lines}")


if __name__ == "__main__":
    # Where arrays cannot be read, the reader leaves an event loop behind, and a traceback that says no more.
    sys.unraisablehook = lambda _: None
    run_tool(main, groups=_FLAGS, define_flags=define_flags, interrupted="Interrupted: nothing was written.")
