"""The command ``python -m dat_jax.visualize``: a figure for every image file."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dat_jax import inference
from dat_jax.cli.files import check_outputs, name_outputs, process_files
from dat_jax.errors import UserError
from dat_jax.inference import Classifier, Predictor, Segmenter
from dat_jax.inference.command import plan_for_files
from dat_jax.inference.image_files import find_images, read_image
from dat_jax.storage import fetch, name_original
from dat_jax.visualization.label_files import find_label_files, read_labels
from dat_jax.visualization.prediction_figures import make_attention_saver, save_detection, save_segmentation


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options of the attention figures of a classifier. Models of other kinds accept only the defaults.

    Attributes:
      query: "Y,X" in pixels of the image.
      keys: number of keys to draw for the query.
      blocks: names of blocks, see ``choose_blocks``.
      html: whether to write an interactive page for every image.
    """

    query: str | None = None
    keys: int | None = None
    blocks: Sequence[str] | None = None
    html: bool = False


def visualize_files(
    trained: str,
    names: Sequence[str],
    *,
    output: str,
    overwrite: bool = False,
    recursive: bool = False,
    labels: str | None = None,
    zero_is_ignored: bool = False,
    attention: AttentionOptions,
    options: Mapping[str, Any],
) -> bool:
    """Load a trained model, write one figure for each image file, and print the names of the files.

    Args:
      trained: work directory of a run, or export.
      names: see ``find_images``.
      output: folder for the figures.
      overwrite: whether existing files are replaced.
      recursive: see ``find_images``.
      labels: for segmentors, folder of annotated label maps, or the file for a single image.
      zero_is_ignored: see ``read_labels``.
      attention: for classifiers.
      options: see ``inference.load``.

    Returns:
      True if every image succeeded.

    Raises:
      UserError: an image, output, model or option is impossible. Nothing is written then.
    """
    images = find_images(names, recursive=recursive)
    outputs = name_outputs(images, output)
    pages = [path.with_suffix(".html") for path in outputs] if attention.html else []
    label_files = find_label_files(images, fetch(labels)) if labels else []
    check_outputs([*outputs, *pages], inputs=[*images, *label_files], overwrite=overwrite)
    query = parse_query(attention.query)
    max_keys = 16 if attention.keys is None else attention.keys
    if max_keys < 1:
        raise UserError(f"--keys must be at least 1, got {max_keys}.")
    predictor = plan_for_files(inference.load(trained, **options), images)
    _check_kind(predictor, trained, attention=attention, labels=labels)
    if isinstance(predictor, Classifier):
        save_attention = make_attention_saver(
            predictor, query=query, blocks=attention.blocks or (), max_keys=max_keys, page=attention.html
        )
    read_label_file = functools.partial(
        read_labels, classes=len(predictor.class_names), zero_is_ignored=zero_is_ignored
    )

    def process(index):
        image = read_image(images[index], predictor.image_format)
        if isinstance(predictor, Classifier):
            save_attention(outputs[index], image)
        elif isinstance(predictor, Segmenter):
            annotation = None
            if label_files:
                annotation = read_label_file(label_files[index], shape=image.shape[:2])
            save_segmentation(outputs[index], image, segmenter=predictor, annotation=annotation)
        else:
            save_detection(outputs[index], image, detector=predictor)
        written = [outputs[index], *pages[index : index + 1]]
        print(f"{name_original(images[index])}: {', '.join(map(str, written))}", flush=True)

    return process_files(images, process)


def _check_kind(predictor: Predictor, trained: str, *, attention: AttentionOptions, labels: str | None) -> None:
    """Raise a UserError for an option that this kind of model does not support."""
    kind = {Classifier: "classifier", Segmenter: "segmentor"}.get(type(predictor), "detector")
    if labels and kind != "segmentor":
        raise UserError(f"--labels requires a segmentor, but {trained} is a {kind}.")
    for field in dataclasses.fields(attention):
        if getattr(attention, field.name) != field.default and kind != "classifier":
            raise UserError(f"--{field.name} requires a classifier, but {trained} is a {kind}.")


def parse_query(text: str | None) -> tuple[float, float] | None:
    """Parse "Y,X" into (y, x); None remains None.

    Raises:
      UserError: the text is anything else.
    """
    if text is None:
        return None
    try:
        query = tuple(float(part) for part in text.split(","))
    except ValueError:
        query = ()
    if len(query) != 2 or not all(map(math.isfinite, query)):
        raise UserError(f"--query must be Y,X in pixels of the image, such as 120,200, got {text}.")
    return query
