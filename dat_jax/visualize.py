"""Pictures of what a model sees: python -m dat_jax.visualize TRAINED IMAGE... --output=DIR [--labels=FILE_OR_DIR] [--html]

A photograph; every image of a folder; a validation set beside its annotated classes:

  python -m dat_jax.visualize runs/quickstart_detection photo.jpg --output=seen
  python -m dat_jax.visualize runs/quickstart_segmentation photos/ --output=seen --overwrite
  python -m dat_jax.visualize runs/upernet images/validation --output=seen --labels=annotations/validation --zero_is_ignored

What a classifier attends to, with a page to click through:

  python -m dat_jax.visualize weights/dat_pp_t photo.jpg --output=seen --query=120,200 --html

TRAINED and IMAGE are as of dat_jax.predict. Of a segmentor, DIR/<stem>.png shows the image, the classes over it, and the
probability of the likeliest class; with --labels also the annotated classes. Of a detector it shows the image, what is found
in it, and where every deformable block of the backbone samples it. Of a classifier it shows the sampled points of every
deformable (D) block, sized by the attention that they get; the keys that one query attends to most, beside the window of
neighborhood (N) blocks; and the offsets. DIR/<stem>.html, of --html, shows this for any query, block and group of heads: one
file that needs no network.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from dat_jax.cli.flags import check_outputs, fail, name_outputs, process, replacing, run_tool
from dat_jax.errors import UserError
from dat_jax.predict import IMAGE_FLAGS, define_flags, find_images, load_from_flags, read_image

if TYPE_CHECKING:  # they take long to import, so that is done where they are called
    from dat_jax.inference import Classifier, ObjectDetector, Segmenter

_PANEL_WIDTH = 4.0  # inches
_ATTENTION_FLAGS = ("html", "query", "keys", "blocks")


def find_labels(images: Sequence[pathlib.Path], place: pathlib.Path) -> list[pathlib.Path]:
    """The label file of every image: the file itself of a single one, else <stem>.png in a folder.

    Raises:
      UserError: one that is not there, or one file for several images.
    """
    if place.is_file() and len(images) > 1:
        raise UserError(f"--labels wants a folder where there are several images, got the file {place}.")
    files = [place / f"{image.stem}.png" for image in images] if place.is_dir() else [place]
    for file in files:
        if not file.is_file():
            raise UserError(f"There is no label file {file}.")
    return files


def read_labels(
    path: pathlib.Path, *, shape: tuple[int, int], classes: int, zero_is_ignored: bool = False
) -> np.ndarray:
    """A PNG of class indices -> uint8 (H, W), 255 for no class.

    Args:
      path: of the file.
      shape: (H, W) of the image, which it must have.
      classes: how many there are.
      zero_is_ignored: 0 in the file is no class and k + 1 is class k.

    Raises:
      UserError: a file that cannot be read, is of another kind or size, or holds a value that is no class.
    """
    from dat_jax.data.segmentation_sources import decode_label
    from dat_jax.evaluation.segmentation import IGNORED

    try:
        values = decode_label(path.read_bytes(), path=str(path))
    except OSError as error:
        raise UserError(f"The label file {path} cannot be read: {error.strerror}.") from error
    if values.shape != shape:
        sizes = "{} x {} pixels: wanted {} x {}".format(*values.shape, *shape)
        raise UserError(f"The label file {path} has {sizes}.")
    labels = np.where(values == IGNORED, values, values - np.uint8(1)) if zero_is_ignored else values
    wrong = values[(labels >= classes) & (labels != IGNORED)]
    if wrong.size:
        raise UserError(f"The label file {path} has the value {wrong.min()}, which is none of {classes} classes.")
    return labels


def save_segmentation(
    path: pathlib.Path, image: np.ndarray, *, segmenter: Segmenter, annotated: np.ndarray | None = None
) -> None:
    """Image, annotated classes where they are given, likeliest classes and their probabilities, side by side.

    Args:
      path: of the PNG file.
      image: uint8 (H, W, 3).
      segmenter: of ``inference.load``.
      annotated: uint8 (H, W), 255 for no class.

    Raises:
      UserError: the image is too small, or the file cannot be written.
    """
    from dat_jax.visualization import charts as plots

    labels, probabilities = segmenter(image)
    title = f"probability, blue 0 to yellow 1, mean {probabilities.mean():.2f}"
    row = {
        "image": (image, None),
        **({} if annotated is None else {"labels": (image, annotated)}),
        "prediction": (image, labels),
        title: (plots.shade(probabilities), None),
    }
    with replacing(path) as unfinished:
        plots.save_segmentations(
            unfinished,
            [row],
            class_names=segmenter.class_names,
            palette=segmenter.palette,
            panel_width=_PANEL_WIDTH,
        )


def save_detection(path: pathlib.Path, image: np.ndarray, *, detector: ObjectDetector) -> None:
    """Image, detections, and the points that each deformable block samples, over the image as the network sees it.

    Args:
      path: of the PNG file.
      image: uint8 (H, W, 3).
      detector: of ``inference.load``.

    Raises:
      UserError: the file cannot be written.
    """
    from dat_jax.visualization import charts as plots

    found, sampled = detector.choose_shown(detector(image)), detector.sample(image)
    with replacing(path) as unfinished:
        plots.save_detections_and_points(
            unfinished,
            image,
            found,
            seen=sampled["image"],
            positions=sampled["positions"],
            map_shapes=sampled["map_shapes"],
            class_names=detector.class_names,
            palette=detector.palette,
            panel_width=_PANEL_WIDTH,
        )


def choose_blocks(classifier: Classifier, names: Sequence[str] = ()) -> list[str]:
    """Those whose keys of one query are shown: as given, else the last D block of every stage, else the last N block.

    Raises:
      UserError: one that the model does not have, or that is of another kind.
    """
    from dat_jax.inference.attention import block_names

    known = block_names(classifier.model, "DN")
    if not known:
        raise UserError("The model has no deformable (D) or neighborhood (N) block whose attention could be shown.")
    for name in names:
        if name not in known:
            raise UserError(f"--blocks has {name!r}, which is no D or N block: wanted some of {', '.join(known)}.")
    deformable = block_names(classifier.model, "D") or known
    last = {name.split("/")[0]: name for name in deformable}
    return list(dict.fromkeys(names)) or list(last.values())


def parse_query(text: str | None) -> tuple[float, float] | None:
    """ "Y,X" -> (y, x); UserError where it is anything else."""
    try:
        query = None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        query = ()
    if query is not None and (len(query) != 2 or not all(map(math.isfinite, query))):
        raise UserError(f"--query wants Y,X in pixels of the image, such as 120,200, got {text}.")
    return query


def make_attention_saver(
    classifier: Classifier,
    *,
    query: tuple[float, float] | None = None,
    blocks: Sequence[str] = (),
    max_keys: int = 16,
    page: bool = False,
) -> Callable[[pathlib.Path, np.ndarray], None]:
    """A function of a PNG's path and an image uint8 (H, W, 3) that writes what the classifier attends to.

    Args:
      classifier: of ``inference.load``.
      query: (y, x) in pixels of the image; the centre of what the network sees unless given.
      blocks: see ``choose_blocks``.
      max_keys: of a query.
      page: whether it also writes the page, of the same name and the suffix .html.

    Raises:
      UserError: of the model or the blocks; of the function, a query outside the image or a file that cannot be written.
    """
    from dat_jax.inference.attention import find_seen_point, make_attention_reader
    from dat_jax.visualization.attention_figure import save_attention
    from dat_jax.visualization.attention_page import make_page

    blocks = choose_blocks(classifier, blocks)
    read = make_attention_reader(classifier)

    def save(path, image):
        point = find_seen_point(classifier, image.shape[:2], query)
        attention = read(image)
        if page:
            text = make_page(attention, title=path.stem, query=point, block=blocks[-1], max_keys=max_keys)
            with replacing(path.with_suffix(".html")) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        with replacing(path) as unfinished:
            save_attention(unfinished, attention, query=point, blocks=blocks, max_keys=max_keys)

    return save


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """One call, and its mistakes as one sentence."""
    if len(argv) < 3 or not values.output:
        fail(f"Wanted: TRAINED IMAGE... --output=DIR [--labels=FILE_OR_DIR], got {' '.join(argv[1:]) or 'nothing'}.")
    from dat_jax.inference import Classifier, Segmenter

    try:
        images = find_images(argv[2:])
        outputs = name_outputs(images, values.output)
        pages = [path.with_suffix(".html") for path in outputs] if values.html else []
        label_files = find_labels(images, pathlib.Path(values.labels)) if values.labels else []
        check_outputs([*outputs, *pages], inputs=[*images, *label_files], overwrite=values.overwrite)
        query = parse_query(values.query)
        if values.keys < 1:
            raise UserError(f"--keys wants a number of at least 1, got {values.keys}.")
        looker = load_from_flags(argv[1], values)
        kind = {Classifier: "classifier", Segmenter: "segmentor"}.get(type(looker), "detector")
        if label_files and kind != "segmentor":
            raise UserError(f"--labels wants a segmentor, and {argv[1]} is a {kind}.")
        wrong = [name for name in _ATTENTION_FLAGS if values[name].present]
        if wrong and kind != "classifier":
            raise UserError(f"--{wrong[0]} wants a classifier, and {argv[1]} is a {kind}.")
        if kind == "classifier":
            options = dict(query=query, blocks=values.blocks or (), max_keys=values.keys, page=values.html)
            save_what_attends = make_attention_saver(looker, **options)
    except UserError as error:
        fail(str(error))
    label_options = dict(classes=len(looker.class_names), zero_is_ignored=values.zero_is_ignored)

    def handle(index):
        image, annotated = read_image(images[index]), None
        if kind == "classifier":
            return save_what_attends(outputs[index], image)
        if kind == "detector":
            return save_detection(outputs[index], image, detector=looker)
        if label_files:
            annotated = read_labels(label_files[index], shape=image.shape[:2], **label_options)
        return save_segmentation(outputs[index], image, segmenter=looker, annotated=annotated)

    if not process(images, handle):
        sys.exit(1)


def define_own_flags(values: flags.FlagValues) -> None:
    """All of this tool."""
    define_flags(values)
    flags.DEFINE_string(
        "labels", None, "Segmentors: PNGs of class indices, 255 for none, as the images are called.", flag_values=values
    )
    help_text = "Label files hold 0 for no class and k + 1 for class k, as ADE20K's."
    flags.DEFINE_bool("zero_is_ignored", False, help_text, flag_values=values)
    help_text = "Classifiers: also writes DIR/<stem>.html, a page to look at any query, block and group."
    flags.DEFINE_bool("html", False, help_text, flag_values=values)
    help_text = "Classifiers: the query, in pixels of the image from 0; the centre unless given."
    flags.DEFINE_string("query", None, help_text, flag_values=values)
    help_text = "Classifiers: the most important keys of a query that are shown."
    flags.DEFINE_integer("keys", 16, help_text, flag_values=values)
    help_text = (
        "Classifiers: those whose keys of the query are shown, such as stages_2/blocks_1; the last D block of every "
        "stage unless given. The page begins with the last one."
    )
    flags.DEFINE_list("blocks", None, help_text, flag_values=values)


_FLAGS = {"What is written": ("output=DIR", "overwrite"), **IMAGE_FLAGS}
_FLAGS["Segmentors"] += ("labels=FILE_OR_DIR", "zero_is_ignored")
_FLAGS["Classifiers"] += ("html", "query=Y,X", "keys=N", "blocks=NAME,...")

if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_own_flags)
