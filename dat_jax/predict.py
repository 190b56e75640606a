"""Segments images: python -m dat_jax.predict TRAINED IMAGE... [--output=DIR] [--json=FILE] [--ratios=0.5,1.0] [--flip]

TRAINED is an export, or the work directory of a run, of a segmentor; an IMAGE is a file, a folder of them, or - for names on
stdin, one a line. A line says which classes are in an image; DIR/<stem>.png holds the class index of every pixel.
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from PIL import Image
from rich.console import Console
from rich.markup import escape

from dat_jax.command_line import check_outputs, fail, name_outputs, parse_flags, process, replacing
from dat_jax.data import ade20k
from dat_jax.data.archives import is_image
from dat_jax.data.images import decode_image
from dat_jax.data.segmentation_transforms import SegmentationEvalTransform, make_segmentation_eval_transform
from dat_jax.errors import UserError
from dat_jax.evaluation.segmentation import make_segmenter, segment_record
from dat_jax.models.dat import DAT, MIN_IMAGE_SIDE
from dat_jax.models.segmentation import Segmentor
from dat_jax.tasks.segmentation import make_segmentation_task
from dat_jax.training.metrics import print_table
from dat_jax.training.pretrained import load_pretrained, read_class_names, read_names

_DEFAULTS = dict(long_side=2048, short_side=512, ratios=(1.0,), flip=False, window=0, stride=0)
_MOST_CLASSES = 255  # 255 itself is no class


@dataclasses.dataclass(frozen=True, eq=False)
class Segmenter:
    """A trained segmentor and how it looks at images; it compiles once for each size of an image.

    Attributes:
      class_names: of the K classes.
      palette: their colours, uint8 (K, 3) RGB.
      transform: from an image to the views that the network sees.
      segment: of ``make_segmenter``.
      variables: of the model.
    """

    class_names: tuple[str, ...]
    palette: np.ndarray
    transform: SegmentationEvalTransform
    segment: Callable
    variables: Mapping[str, Any]

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (H, W, 3) RGB -> the likeliest classes uint8 (H, W), and their probabilities float32 (H, W).

        Raises:
          UserError: a view of it has a side below 32 pixels.
        """
        (height, width), smallest = image.shape[:2], min(self.transform.view_shapes(*image.shape[:2]), key=min)
        if min(smallest) < MIN_IMAGE_SIDE:
            seen = "{} x {}".format(*smallest)
            raise UserError(
                f"{height} x {width} pixels become {seen}: wanted sides of at least {MIN_IMAGE_SIDE} there."
            )
        record = self.transform({"image": image, "label": np.zeros((height, width), np.uint8)})
        labels, probabilities = segment_record(self.segment, self.variables, record)
        return labels.astype(np.uint8), probabilities.astype(np.float32)


def load_segmenter(path: str | os.PathLike, *, classes: str | os.PathLike | None = None, **options) -> Segmenter:
    """A trained segmentor as a function of images.

    Args:
      path: see ``load_pretrained``.
      classes: a file with the names of the classes, one a line. None takes those of the work directory, else ADE20K's where
        there are 150, else numbers.
      **options: long_side, short_side, pixels, and ratios, of the views (``make_segmentation_eval_transform``); flip, window
        and stride (``make_segmenter``). One that is None or not given is what the run of a work directory evaluates with,
        else 2048, 512, (1.0,), False, 0 and 0.

    Raises:
      UserError: as ``load_pretrained``; not a segmentor; another number of names; impossible options.
    """
    path = pathlib.Path(path)
    options = _read_defaults(path) | {name: value for name, value in options.items() if value is not None}
    _check_options(options)
    model, variables = load_pretrained(path)
    if not isinstance(model, Segmentor):
        kind = "classifier" if isinstance(model, DAT) else "detector"
        raise UserError(f"{path} has the weights of a {kind}; only segmentors are supported so far.")
    if model.num_classes > _MOST_CLASSES:
        raise UserError(
            f"{path} has {model.num_classes} classes: {_MOST_CLASSES} at most fit into label maps of 8 bits."
        )
    return Segmenter(
        class_names=_find_names(path, classes, model.num_classes),
        palette=ade20k.make_palette_for(model.num_classes),
        transform=make_segmentation_eval_transform(
            scale=(options["long_side"], options["short_side"]), ratios=options["ratios"]
        ),
        segment=make_segmenter(
            make_segmentation_task(model, auxiliary_weight=0.0).predict,
            **{name: options[name] for name in ("flip", "window", "stride")},
        ),
        variables=variables,
    )


def _read_defaults(path):
    if (path / "model.json").is_file():
        return _DEFAULTS
    try:
        config = json.loads((path / "config.json").read_text())
        return {name: {**config["data"], **config["eval"]}.get(name, value) for name, value in _DEFAULTS.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return _DEFAULTS  # what is wrong is said where the weights are read


def _check_options(options):
    unknown = set(options) - set(_DEFAULTS)
    if unknown:
        raise UserError(f"Unknown option {min(unknown)!r}: wanted some of {', '.join(_DEFAULTS)}.")
    ratios = options["ratios"]
    if min(options["long_side"], options["short_side"]) < 1:
        raise UserError("long_side and short_side want numbers of at least 1.")
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise UserError(f"ratios wants at least one number, all above 0, got {tuple(ratios)}.")


def _find_names(path, file, count):
    if file is not None:
        return read_names(file, count=count)
    names = read_class_names(path, count=count)
    return names or (ade20k.CLASS_NAMES if count == len(ade20k.CLASS_NAMES) else tuple(map(str, range(count))))


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


def save_labels(path: pathlib.Path, labels: np.ndarray, *, palette: np.ndarray) -> None:
    """A palette PNG: uint8 (H, W) as its indices, uint8 (K, 3) as their colours. UserError where it cannot be written."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.tobytes())
    with replacing(path) as unfinished:
        picture.save(unfinished)


def measure_shares(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Class name -> part of the pixels, from 0 to 1, of those that are in a label map uint8 (H, W), the largest first."""
    shares = dict.fromkeys(class_names, 0.0)
    for name, count in zip(class_names, np.bincount(labels.ravel(), minlength=len(class_names)), strict=True):
        shares[name] += float(count / labels.size)  # of classes of one name together
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share}


def predict(
    segmenter: Segmenter,
    images: Sequence[pathlib.Path],
    *,
    outputs: Sequence[pathlib.Path] | None = None,
    json_file: str | os.PathLike | None = None,
    console: Console,
) -> bool:
    """Segments files, says which classes are in them and writes label maps. Returns whether nothing failed.

    Args:
      segmenter: of ``load_segmenter``.
      images: files to read.
      outputs: a PNG to write for each, or None.
      json_file: where {"image", "classes": {name: share}, "labels": PNG or None} of each image goes; those that failed are
        left out.
      console: a table an image on a terminal, else a line.
    """
    found = []

    def handle(index):
        labels, _ = segmenter(read_image(images[index]))
        shares = measure_shares(labels, segmenter.class_names)
        if outputs is not None:
            save_labels(outputs[index], labels, palette=segmenter.palette)
        name, written = str(images[index]), None if outputs is None else str(outputs[index])
        found.append({"image": name, "classes": shares, "labels": written})
        said = {key: f"{share:.1%}" if share >= 0.001 else "<0.1%" for key, share in shares.items()}
        if console.is_terminal:
            print(name, file=console.file)  # as a title it would be broken to the width of the table
            print_table(console, "", {escape(key): value for key, value in said.items()})
        else:
            print(f"{name}: {', '.join(' '.join(item) for item in said.items())}", file=console.file, flush=True)

    done = process(images, handle)
    if json_file is not None:
        with replacing(pathlib.Path(json_file)) as unfinished:
            unfinished.write_text(json.dumps(found, indent=2) + "\n")
    return done


def define_flags(values: flags.FlagValues) -> None:
    """Those that every tool for a segmentor has."""
    flags.DEFINE_string("output", None, "The folder to write to, a PNG an image.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replaces files that exist.", flag_values=values)
    flags.DEFINE_list("ratios", None, "Of the views, such as 0.5,1.0; probabilities are averaged.", flag_values=values)
    flags.DEFINE_bool("flip", None, "Also looks at mirrored images.", flag_values=values)
    flags.DEFINE_integer("long_side", None, "Pixels that images are resized to fit into.", flag_values=values)
    flags.DEFINE_integer("short_side", None, "Likewise.", flag_values=values)
    flags.DEFINE_string("classes", None, "A file with the names of the classes, one a line.", flag_values=values)


def load_from_flags(path: str, values: flags.FlagValues) -> Segmenter:
    """``load_segmenter`` with the flags of ``define_flags``."""
    names = ("flip", "long_side", "short_side", "classes")
    try:
        ratios = None if values.ratios is None else tuple(map(float, values.ratios))
    except ValueError as error:
        raise UserError(f"--ratios wants numbers with commas between them, got {','.join(values.ratios)}.") from error
    return load_segmenter(path, ratios=ratios, **{name: values[name].value for name in names})


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """One call, and its mistakes as one sentence."""
    if len(argv) < 3:
        fail(f"Wanted: TRAINED IMAGE... [--output=DIR] [--json=FILE], got {' '.join(argv[1:]) or 'nothing'}.")
    try:
        images = find_images(argv[2:])
        outputs = name_outputs(images, values.output) if values.output else None
        written = [*(outputs or ()), *([pathlib.Path(values.json)] if values.json else ())]
        check_outputs(written, inputs=images, overwrite=values.overwrite)
        segmenter = load_from_flags(argv[1], values)
        console = Console(highlight=False)
        done = predict(segmenter, images, outputs=outputs, json_file=values.json or None, console=console)
    except UserError as error:
        fail(str(error))
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.set_verbosity(logging.ERROR)
    define_flags(flags.FLAGS)
    flags.DEFINE_string("json", None, "Where the classes of every image are written.")
    app.run(main, flags_parser=parse_flags)
