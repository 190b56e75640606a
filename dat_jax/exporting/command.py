"""The command ``python -m dat_jax.export``: export a trained model, check or push an exported folder, and print the result."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dat_jax import inference
from dat_jax.cli.console import format_size, make_console, print_table
from dat_jax.data.buckets import parse_buckets
from dat_jax.errors import UserError
from dat_jax.exporting.files import check_files, load_program, write_exported
from dat_jax.exporting.hub import push_exported
from dat_jax.exporting.manifest import get_image_shape, list_programs
from dat_jax.exporting.model_card import read_training
from dat_jax.exporting.programs import SYMBOLIC
from dat_jax.storage import as_path, check_absent, check_hub_address, is_in_bucket


def export(
    trained: str,
    out: str,
    *,
    formats: Sequence[str],
    platforms: Sequence[str],
    preprocessing: str,
    batch: str | None,
    image_size: Sequence[str] | None,
    classes: str | None,
    resize: int | None,
    ema_decay: float | None = None,
    buckets: str | None = None,
    features: Sequence[str] | None = None,
    push_to: str | None = None,
    license_id: str = "unknown",
    private: bool = False,
) -> None:
    """Export a trained model, push it to the Hugging Face Hub if requested, and print what was written.

    Args:
      trained: work directory of a run, or a folder of weights.
      out: folder to create.
      formats: see ``write_exported``.
      platforms: see ``make_program``.
      preprocessing: see ``make_program``.
      batch: "symbolic", a number, or None for the default: 1 for the detections of a detector, symbolic otherwise.
      image_size: one or two numbers as text, SIDE or HEIGHT and WIDTH in pixels; None for that of the model.
      classes: text file with the class names, or None for those of the model.
      resize: side in pixels that a classifier resizes images to, or None for that of the model.
      ema_decay: see ``load_pretrained``.
      buckets: heights and widths such as "608x832,832x608", or None for a program for images of one size.
      features: indices of stages as text, or None for predictions, see ``write_exported``.
      push_to: address of a repository on the Hub, or None.
      license_id: see ``push_exported``.
      private: see ``push_exported``.

    Raises:
      UserError: an impossible value, ``out`` exists, or ``trained`` cannot be loaded. Nothing is written then. If the push fails,
        the exported folder is complete.
    """
    check_absent(out)  # before the model is loaded, which takes long
    if push_to:
        check_hub_address(push_to)
        if "orbax" not in formats:
            raise UserError(
                f"--push needs the format orbax, which dat_jax.load reads; got --formats={','.join(formats)}."
            )
    image_shape, batch_size = parse_image_size(image_size), parse_batch(batch)
    stages = parse_features(features)
    bucket_list = None if buckets is None else parse_buckets(buckets, key="--buckets")
    options: dict[str, Any] = dict(classes=classes, resize=resize, ema_decay=ema_decay)
    predictor = inference.load(trained, **options)
    if isinstance(predictor, inference.Classifier) and image_shape and image_shape[0] == image_shape[1]:
        predictor = inference.load(trained, **options, image_size=image_shape[0])
    if isinstance(predictor, inference.ObjectDetector) and batch is None and stages is None:
        batch_size = 1
    manifest = write_exported(
        out,
        predictor,
        formats=formats,
        image_shape=image_shape,
        platforms=platforms,
        preprocessing=preprocessing,
        batch=batch_size,
        buckets=bucket_list,
        features=stages,
        training=read_training(trained, ema_decay=ema_decay),
    )
    console = make_console()
    print_table(console, f"Exported to {out}", describe_manifest(manifest))
    if code := format_loading_code(out, manifest):
        console.print(f"To load it:\n\n{code}")
    if push_to:
        try:
            push(out, push_to, license_id=license_id, private=private)
        except UserError as error:
            retry = ["python", "-m", "dat_jax.export", out, f"--push={push_to}", f"--license={license_id}"]
            retry += ["--private"] if private else []
            raise UserError(
                f"{error} The exported folder is complete. To push it again: {shlex.join(retry)}"
            ) from error


def check(directory: str) -> None:
    """Compare the files of an exported folder with its manifest, read its program, and print the result.

    Raises:
      UserError: see ``check_files`` and ``load_program``.
    """
    manifest = check_files(directory)
    for program in list_programs(manifest):
        load_program(directory, get_image_shape(program))
    count = len(manifest["files"])
    make_console().print(f"{directory}: all {count} files are as they were written.")


def push(directory: str, address: str, *, license_id: str, private: bool) -> None:
    """Push an exported folder to the Hugging Face Hub, and print where it is. See ``push_exported``."""
    url = push_exported(directory, address, license_id=license_id, private=private)
    make_console().print(f'Pushed to {url}\nTo load it: dat_jax.load("{address}")', soft_wrap=True)


def parse_batch(text: str | None) -> int | None:
    """Batch size of the flag --batch; None for a symbolic one."""
    if text is None or text == SYMBOLIC:
        return None
    if not text.isdecimal():
        raise UserError(f"--batch must be {SYMBOLIC} or a number of at least 1, got {text}.")
    return int(text)


def parse_image_size(sides: Sequence[str] | None) -> tuple[int, int] | None:
    """(height, width) of the flag --image_size, equal for a single SIDE; None if the flag is not set."""
    if sides is None:
        return None
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--image_size must be SIDE or HEIGHT,WIDTH in pixels, got {','.join(sides)}.")
    return int(sides[0]), int(sides[-1])


def parse_features(indices: Sequence[str] | None) -> list[int] | None:
    """Indices of stages of the flag --features; None if the flag is not set."""
    if indices is None:
        return None
    if not all(index.isdecimal() for index in indices):
        raise UserError(f"--features must be indices of stages, such as 0,1,2,3, got {','.join(indices)}.")
    return [int(index) for index in indices]


def describe_manifest(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Table rows for an exported folder: task, classes, program, and the size of every file or folder in it."""
    programs = list_programs(manifest)
    sizes: dict[str, int] = {}
    for path, record in manifest["files"].items():
        name = f"{path.partition('/')[0]}/" if "/" in path else path
        sizes[name] = sizes.get(name, 0) + record["bytes"]
    rows = {"task": manifest["task"], "classes": str(len(manifest["classes"]))}
    if programs:
        rows["written by"] = f"jax {manifest['jax']}"
        rows["platforms"] = ", ".join(programs[0]["platforms"])
    for program in programs:
        of_bucket = " of {}x{}".format(*program["bucket"]) if "bucket" in program else ""
        for kind in ("inputs", "outputs"):
            rows[kind + of_bucket] = ", ".join(_format_array(array) for array in program[kind])
    return rows | {name: format_size(size) for name, size in sizes.items()}


def _format_array(array: Mapping[str, Any]) -> str:
    return f"{array['name']} {array['dtype']} ({', '.join(map(str, array['shape']))})"


def format_loading_code(directory: str, manifest: Mapping[str, Any]) -> str:
    """Python code that loads and runs the program; of several buckets, the one that holds an image.

    Without a program it loads the weights, and without model.json the code is empty.
    """
    programs = list_programs(manifest)
    if not programs:
        has_weights = "model.json" in manifest["files"]
        return f"import dat_jax\n\nmodel, variables = dat_jax.load({directory!r})" if has_weights else ""
    image_batch, *others = programs[0]["inputs"]
    count, height, width, channels = (1 if isinstance(side, str) else side for side in image_batch["shape"])
    outputs = {"detection": "detections", "features": "features"}.get(manifest["task"], "logits")
    choice = [
        'programs = json.loads((folder / "manifest.json").read_text())["programs"]  # the smallest bucket first',
        "chosen = next(p for p in programs if height <= p['bucket'][0] and width <= p['bucket'][1])",
        "file, bucket = folder / chosen['file'], chosen['bucket']",
    ]
    single = [f"file, bucket = folder / {programs[0]['file']!r}, ({height}, {width})"]
    remote = is_in_bucket(directory)
    sizes = f"sizes = numpy.array([[height, width]] * {count}, numpy.int32)"
    return "\n".join(
        [
            f"import jax, jax.export, json, numpy, {'etils.epath' if remote else 'pathlib'}",
            f"folder = {'etils.epath' if remote else 'pathlib'}.Path({str(as_path(directory))!r})",
            f"height, width = {height}, {width}  # of the image, preprocessed as described in manifest.json",
            *(choice if "bucket" in programs[0] else single),
            "program = jax.jit(jax.export.deserialize(bytearray(file.read_bytes())).call)",
            f"images = numpy.zeros(({count}, *bucket, {channels}), numpy.{image_batch['dtype']})  # the image at the top left",
            *([sizes] if others else []),
            f"{outputs} = program({', '.join(array['name'] for array in programs[0]['inputs'])})",
        ]
    )
