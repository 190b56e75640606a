"""What is in images: python -m dat_jax.predict TRAINED IMAGE... [--output=DIR] [--json=FILE] [--csv=FILE] [--top=5] ...

The likeliest classes of a folder's images, as a table too; a photograph; every image of a folder, with pictures; names from
another program, and all that was found as JSON:

  python -m dat_jax.predict runs/quickstart photos/ --top=3 --csv=found.csv
  python -m dat_jax.predict runs/quickstart_segmentation photo.jpg
  python -m dat_jax.predict runs/quickstart_detection photos/ --output=drawn --min_score=0.5
  find photos -name '*.png' | python -m dat_jax.predict runs/quickstart_detection - --json=found.json --quiet

TRAINED is an export, or the work directory of a run; an IMAGE is a file, a folder of them, or - for names on stdin, one a
line.

Of a classifier, a line has the likeliest classes of an image with their probabilities; there are no pictures. Of a segmentor,
a line says which classes are in an image; DIR/<stem>.png holds the class index of every pixel. Of a detector, a line has the
scores of the objects of each class; DIR/<stem>.png is the image with them drawn; the files have all detections, also those
with lower scores, as JSON in COCO's format of results.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from PIL import Image
from rich.console import Console

from dat_jax.cli.console import make_console, print_table
from dat_jax.cli.flags import check_outputs, fail, name_outputs, process, replacing, run_tool
from dat_jax.data.image_files import is_image
from dat_jax.data.images import decode_image
from dat_jax.errors import UserError

if TYPE_CHECKING:  # it takes long to import, so that is done where it is called
    from dat_jax.inference import Looker


def find_images(names: Sequence[str]) -> list[pathlib.Path]:
    """Files, and the images in folders in the order of their names; "-" stands for such names on stdin, one a line.

    Raises:
      UserError: no such file, or no image in a folder or on stdin.
    """
    found = []
    for name in names:
        path = pathlib.Path(name)
        if name == "-":
            inside = find_images([line for line in sys.stdin.read().splitlines() if line not in ("", "-")])
        elif path.is_dir():
            inside = sorted(file for file in path.iterdir() if is_image(file.name) and file.is_file())
        elif path.is_file():
            inside = [path]
        else:
            raise UserError(f"There is no image or folder {path}.")
        if not inside:
            raise UserError(f"There is no image in {'stdin' if name == '-' else path}.")
        found += inside
    return found


def read_image(path: pathlib.Path) -> np.ndarray:
    """A file -> uint8 (H, W, 3) RGB, orientation tags not applied; UserError where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The image {path} cannot be read: {error.strerror}.") from error
    image = decode_image(data, name=str(path))
    with Image.open(io.BytesIO(data)) as opened:
        if opened.mode.startswith(("I", "F")):  # values that decoding clips
            raise UserError(f"The image {path} has more than 8 bits a value: wanted an image of 8 bits.")
    return image


def number_images(images: Sequence[pathlib.Path]) -> list[int]:
    """The numbers that the files are called by, as COCO's are, where these are all different; else 1, 2, 3, ..."""
    stems = [path.stem for path in images]
    numbers = [int(stem) for stem in stems if stem.isdecimal()]
    return numbers if len(set(numbers)) == len(stems) else list(range(1, len(stems) + 1))


def look(looker: Looker, images: Sequence[pathlib.Path]) -> Iterator[tuple[np.ndarray | UserError, Any]]:
    """The pixels and what is found of each file in turn; a UserError instead where it cannot be read or looked at.

    A classifier looks at ``batch_size`` images at a time, or at all where these are fewer; the last ones are padded to as many.
    """
    classifies = hasattr(looker, "classify")
    size = min(looker.options["batch_size"], len(images)) if classifies else 1
    for start in range(0, len(images), size):
        pixels = [_attempt(read_image, path) for path in images[start : start + size]]
        whole = [image for image in pixels if not isinstance(image, UserError)]
        if classifies and whole:
            found = iter(looker.classify(whole, pad_to=size))
        else:
            found = (_attempt(looker, image) for image in whole)
        for image in pixels:
            yield image, image if isinstance(image, UserError) else next(found)


def _attempt(function, argument):
    try:
        return function(argument)
    except UserError as error:
        return error


def predict(
    looker: Looker,
    images: Sequence[pathlib.Path],
    *,
    outputs: Sequence[pathlib.Path] | None = None,
    json_file: str | os.PathLike | None = None,
    csv_file: str | os.PathLike | None = None,
    console: Console,
) -> bool:
    """Looks at files, says what is in them and writes pictures. Returns whether nothing failed.

    Args:
      looker: of ``inference.load``.
      images: files to read.
      outputs: a PNG to write for each, or None.
      json_file: where a list of the entries of all images goes, or None. Of a classifier an image has one, {"image",
        "classes": {name: probability}}; of a segmentor too, {"image", "classes": {name: share}, "labels": PNG or None}; of a
        detector each detection, {"image", "image_id" (``number_images``), "category", "category_id", "bbox": x, y, width,
        height, "score", and with masks "segmentation", a compressed RLE}. Images that failed are left out.
      csv_file: where a table goes, or None: a line with the names of the looker's ``columns``, then its ``to_rows``.
      console: a table an image on a terminal, else a line.
    """
    entries, rows, numbers, seen = [], [], number_images(images), look(looker, images)

    def handle(index):
        image, found = next(seen)
        if isinstance(found, UserError):
            raise found
        if outputs is not None:
            looker.save(outputs[index], image, found)
        name, picture = str(images[index]), None if outputs is None else str(outputs[index])
        entries.extend(looker.to_entries(found, image=name, number=numbers[index], picture=picture))
        rows.extend(looker.to_rows(found, image=name))
        said = looker.describe(found) or {"nothing": ""}
        if console.is_terminal:
            # As a title it would be broken to the width of the table.
            console.print(name, soft_wrap=True, markup=False, highlight=False)
            print_table(console, "", said)
        elif not console.quiet:
            words = ", ".join(" ".join(item).rstrip() for item in said.items())
            print(f"{name}: {words}", file=console.file, flush=True)

    done = process(images, handle)
    if csv_file is not None:
        with (
            replacing(pathlib.Path(csv_file)) as unfinished,
            unfinished.open("w", encoding="utf-8", newline="") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([looker.columns, *rows])
    if json_file is not None:
        with replacing(pathlib.Path(json_file)) as unfinished:
            lines = ",\n".join(map(json.dumps, entries))
            unfinished.write_text(f"[\n{lines}\n]\n")
    return done


def define_flags(values: flags.FlagValues) -> None:
    """Those that every tool for images has."""
    flags.DEFINE_string("output", None, "The folder to write to, a PNG an image.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replaces files that exist.", flag_values=values)
    flags.DEFINE_integer("long_side", None, "Pixels that images are resized to fit into.", flag_values=values)
    flags.DEFINE_integer("short_side", None, "Likewise.", flag_values=values)
    flags.DEFINE_string("classes", None, "A file with the names of the classes, one a line.", flag_values=values)
    flags.DEFINE_integer("image_size", None, "Classifiers: side of what is seen, pixels.", flag_values=values)
    help_text = "Classifiers: side that images are resized to, of which the centre is seen."
    flags.DEFINE_integer("resize", None, help_text, flag_values=values)
    flags.DEFINE_integer("top", None, "Classifiers: how many classes are said; 5 unless given.", flag_values=values)
    help_text = "Segmentors: of the views, such as 0.5,1.0; probabilities are averaged."
    flags.DEFINE_list("ratios", None, help_text, flag_values=values)
    flags.DEFINE_bool("flip", None, "Segmentors: also looks at mirrored images.", flag_values=values)
    help_text = "Detectors: the score from which on objects are drawn and counted; 0.3 unless given."
    flags.DEFINE_float("min_score", None, help_text, flag_values=values)
    flags.DEFINE_integer("max_detections", None, "Detectors: the most of an image.", flag_values=values)


def load_from_flags(path: str, values: flags.FlagValues) -> Looker:
    """``inference.load`` with the flags of ``define_flags``, and of what a tool adds the batch size."""
    from dat_jax import inference

    names = (
        *("image_size", "resize", "top", "batch_size", "flip", "long_side", "short_side", "classes"),
        *("min_score", "max_detections"),
    )
    try:
        ratios = None if values.ratios is None else tuple(map(float, values.ratios))
    except ValueError as error:
        raise UserError(f"--ratios wants numbers with commas between them, got {','.join(values.ratios)}.") from error
    return inference.load(path, ratios=ratios, **{name: values[name].value for name in names if name in values})


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """One call, and its mistakes as one sentence."""
    if len(argv) < 3:
        fail(
            f"Wanted: TRAINED IMAGE... [--output=DIR] [--json=FILE] [--csv=FILE], got {' '.join(argv[1:]) or 'nothing'}."
        )
    try:
        images = find_images(argv[2:])
        outputs = name_outputs(images, values.output) if values.output else None
        files = {f"{name}_file": values[name].value or None for name in ("json", "csv")}
        written = [*(outputs or ()), *(pathlib.Path(file) for file in files.values() if file)]
        check_outputs(written, inputs=images, overwrite=values.overwrite)
        looker = load_from_flags(argv[1], values)
        if outputs and hasattr(looker, "classify"):
            raise UserError(
                f"{argv[1]} is a classifier, which draws nothing: leave --output out; --json or --csv may be given."
            )
        console = make_console(quiet=values.quiet)
        done = predict(looker, images, outputs=outputs, **files, console=console)
    except UserError as error:
        fail(str(error))
    if not done:
        sys.exit(1)


def define_own_flags(values: flags.FlagValues) -> None:
    """All of this tool."""
    define_flags(values)
    flags.DEFINE_string("json", None, "The file that what is found in all images is written to.", flag_values=values)
    help_text = "The file that it is written to as a table, with commas."
    flags.DEFINE_string("csv", None, help_text, flag_values=values)
    help_text = "Classifiers: images that are computed at once; 8 unless given."
    flags.DEFINE_integer("batch_size", None, help_text, flag_values=values)
    help_text = "Says errors only: what is found is in the files."
    flags.DEFINE_bool("quiet", False, help_text, short_name="q", flag_values=values)


# Flags that every tool for images has, by title.
IMAGE_FLAGS = {
    "How images are seen": ("classes=FILE",),
    "Classifiers": ("image_size=PIXELS", "resize=PIXELS", "top=N"),
    "Segmentors and detectors": ("long_side=PIXELS", "short_side=PIXELS"),
    "Segmentors": ("ratios=RATIO,...", "flip"),
    "Detectors": ("min_score=SCORE", "max_detections=N"),
}
_FLAGS = {"What is written": ("output=DIR", "json=FILE", "csv=FILE", "overwrite", "quiet"), **IMAGE_FLAGS}
_FLAGS["Classifiers"] += ("batch_size=N",)

if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_own_flags)
