"""The command ``python -m dat_jax.predict``: predictions for image files, printed and written as PNG, JSON and CSV."""

import contextlib
import csv
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from dat_jax import inference
from dat_jax.cli.console import make_console, print_table
from dat_jax.cli.files import check_outputs, name_outputs, process_files
from dat_jax.data.coco_ids import find_image_ids, match_categories
from dat_jax.data.image_files import DamagedFile
from dat_jax.data.images import read_size
from dat_jax.errors import UserError, name_some
from dat_jax.inference import Classifier, ObjectDetector, Predictor
from dat_jax.inference.image_files import find_images, number_images, numbers_are_names, read_image
from dat_jax.storage import as_path, atomic_path, name_original


def predict_files(
    trained: str,
    names: Sequence[str],
    *,
    output: str | None = None,
    json_file: str | None = None,
    csv_file: str | None = None,
    annotations: str | None = None,
    overwrite: bool = False,
    recursive: bool = False,
    quiet: bool = False,
    options: Mapping[str, Any],
) -> bool:
    """Load a trained model and report its predictions for image files.

    Args:
      trained: work directory of a run, or export.
      names: see ``find_images``.
      output: folder for one PNG per image, or None. Not supported for classifiers.
      json_file: see ``report_predictions``.
      csv_file: see ``report_predictions``.
      annotations: COCO file with the image ids of a detector's results, see ``find_image_ids``. Its category ids are used if
        it has all classes of the detector. None: see ``number_images``.
      overwrite: whether existing files are replaced.
      recursive: see ``find_images``.
      quiet: print errors only.
      options: see ``inference.load``.

    Returns:
      True if every image succeeded.

    Raises:
      UserError: an image, output, model or option is impossible. Nothing is written then.
    """
    images = find_images(names, recursive=recursive)
    outputs = name_outputs(images, output) if output else None
    tables = [as_path(file) for file in (json_file, csv_file) if file]
    check_outputs([*(outputs or ()), *tables], inputs=images, overwrite=overwrite)
    predictor = inference.load(trained, **options)
    if outputs and isinstance(predictor, Classifier):
        raise UserError(
            f"{trained} is a classifier, which draws nothing; omit --output, and use --json or --csv to write files."
        )
    if annotations and not (isinstance(predictor, ObjectDetector) and json_file):
        raise UserError(
            "--annotations sets the image ids of a detector's --json; omit it for other models and outputs."
        )
    predictor = plan_for_files(predictor, images)
    predictor, numbers, note = _choose_ids(predictor, images, annotations)
    console = make_console(quiet=quiet)
    files: dict[str, Any] = dict(outputs=outputs, json_file=json_file, csv_file=csv_file)
    succeeded = report_predictions(predictor, images, numbers=numbers, **files, console=console)
    if json_file and isinstance(predictor, ObjectDetector):
        console.print(f"{json_file}: {note}")
    return succeeded


def plan_for_files(predictor: Predictor, images: Sequence[pathlib.Path]) -> Predictor:
    """Return a segmentor or detector prepared for the sizes of image files, which are read from their headers."""
    if isinstance(predictor, Classifier):
        return predictor
    sizes = []
    for path in images:
        with contextlib.suppress(DamagedFile):  # reported when the image is read
            sizes.append(read_size(str(path)))
    return predictor.plan(sizes)


def _choose_ids(
    predictor: Predictor, images: Sequence[pathlib.Path], annotations: str | None
) -> tuple[Predictor, list[int], str]:
    """Return the predictor with the category ids of its results, the image ids, and a sentence about both."""
    numbers = number_images(images)
    if annotations is None or not isinstance(predictor, ObjectDetector):
        kind = (
            "the numbers in the file names"
            if numbers_are_names(images)
            else f"1 to {len(images)}, in the order of the images"
        )
        return predictor, numbers, f"image ids are {kind}; --annotations=FILE takes those of a COCO file."
    numbers, categories = find_image_ids(annotations, images)
    category_ids = match_categories(categories, predictor.class_names)
    if category_ids is None:
        unlisted = [name for name in predictor.class_names if name not in categories.values()]
        reason = f"it has no {name_some(unlisted)}" if unlisted else "its names are not unique"
        return predictor, numbers, f"image ids are those of {annotations}, category ids those of the model ({reason})."
    predictor = dataclasses.replace(predictor, category_ids=category_ids)
    return predictor, numbers, f"image and category ids are those of {annotations}."


def report_predictions(
    predictor: Predictor,
    images: Sequence[pathlib.Path],
    *,
    numbers: Sequence[int] | None = None,
    outputs: Sequence[pathlib.Path] | None = None,
    json_file: str | os.PathLike | None = None,
    csv_file: str | os.PathLike | None = None,
    console: Console,
) -> bool:
    """Print the predictions for image files, and write them to files.

    Args:
      predictor: model from ``inference.load``.
      images: files to read.
      numbers: image ids of a detector's results; None for ``number_images``.
      outputs: PNG file to write for each image, or None.
      json_file: file for a list of entries, or None. Images that failed have no entry.
        Classifier: one entry per image, {"image", "classes": {name: probability}}.
        Segmentor: one entry per image, {"image", "classes": {name: share of the pixels}, "labels": PNG file or None}.
        Detector: one entry per detection, {"image", "image_id" (of ``numbers``), "category", "category_id", "bbox": x,
          y, width and height in pixels, "score"}, with masks also "segmentation", a compressed RLE.
      csv_file: file for a table with the header ``columns`` and the rows ``to_rows`` of the predictor, or None.
      console: on a terminal, each image is printed as a table, elsewhere as one line.

    Returns:
      True if every image succeeded.
    """
    entries, rows = [], []
    numbers = number_images(images) if numbers is None else numbers
    predictions = iterate_predictions(predictor, images)

    def process(index):
        image, prediction = next(predictions)
        if isinstance(prediction, UserError):
            raise prediction
        assert not isinstance(image, UserError)  # its prediction would be one, too
        name, output = name_original(images[index]), None if outputs is None else outputs[index]
        if output is not None:
            predictor.save(output, image, prediction)
        output_name = None if output is None else str(output)
        entries.extend(predictor.to_entries(prediction, image=name, number=numbers[index], output=output_name))
        rows.extend(predictor.to_rows(prediction, image=name))
        _print_prediction(console, name, predictor.describe(prediction) or {"nothing": ""})

    succeeded = process_files(images, process)
    if csv_file is not None:
        with (
            atomic_path(csv_file, overwrite=True) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([predictor.columns, *rows])
    if json_file is not None:
        with atomic_path(json_file, overwrite=True) as temporary:
            lines = ",\n".join(map(json.dumps, entries))
            temporary.write_text(f"[\n{lines}\n]\n")
    return succeeded


def _print_prediction(console, name, description):
    if console.is_terminal:
        # As the title of the table, a long name would be wrapped to the table's width.
        console.print(name, soft_wrap=True, markup=False, highlight=False)
        print_table(console, "", description)
    elif not console.quiet:
        text = ", ".join(" ".join(item).rstrip() for item in description.items())
        print(f"{name}: {text}", file=console.file, flush=True)


def iterate_predictions(
    predictor: Predictor, images: Sequence[pathlib.Path]
) -> Iterator[tuple[np.ndarray | UserError, Any]]:
    """Pixels and prediction of each image file in turn; both are a UserError if the file cannot be read.

    If only the prediction fails, only that is a UserError. A classifier predicts in batches of ``batch_size`` images, or of
    the number of images if that is smaller; the last batch is padded to the same size.
    """
    in_batches = isinstance(predictor, Classifier)
    size = min(predictor.options["batch_size"], len(images)) if in_batches else 1
    read = functools.partial(read_image, image_format=predictor.image_format)
    for start in range(0, len(images), size):
        pixels = [_try(read, path) for path in images[start : start + size]]
        readable = [image for image in pixels if not isinstance(image, UserError)]
        if in_batches and readable:
            predictions = iter(predictor.classify(readable, pad_to=size))
        else:
            predictions = (_try(predictor, image) for image in readable)
        for image in pixels:
            yield image, image if isinstance(image, UserError) else next(predictions)


def _try(function, argument):
    """``function(argument)``, or the UserError that it raises."""
    try:
        return function(argument)
    except UserError as error:
        return error
