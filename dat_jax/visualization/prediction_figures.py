"""Figures of what a trained model predicts, samples and attends to in one image, for each kind of model."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from dat_jax.errors import UserError
from dat_jax.inference import Classifier, ObjectDetector, Segmenter
from dat_jax.inference.attention import NO_ATTENTION, block_names, find_input_point, make_attention_reader
from dat_jax.storage import atomic_path
from dat_jax.visualization import charts
from dat_jax.visualization.attention_figure import save_attention
from dat_jax.visualization.attention_page import make_page

_PANEL_WIDTH = 4.0  # inches


def save_segmentation(
    path: pathlib.Path, image: np.ndarray, *, segmenter: Segmenter, annotation: np.ndarray | None = None
) -> None:
    """Save image, annotation (if there is one), most likely classes and their probabilities side by side.

    Args:
      path: PNG file to write.
      image: uint8 (H, W, 3), RGB.
      segmenter: model from ``inference.load``.
      annotation: annotated classes, uint8 (H, W), where 255 means no class.

    Raises:
      UserError: the image is too small, or the file cannot be written.
    """
    labels, probabilities = segmenter(image)
    title = f"probability, mean {probabilities.mean():.2f}\nblue 0 to yellow 1"  # as narrow as a small panel
    row = {
        "image": (image, None),
        **({} if annotation is None else {"labels": (image, annotation)}),
        "prediction": (image, labels),
        title: (charts.apply_colormap(probabilities), None),
    }
    with atomic_path(path, overwrite=True) as temporary:
        charts.save_segmentations(
            temporary,
            [row],
            class_names=segmenter.class_names,
            palette=segmenter.palette,
            panel_width=_PANEL_WIDTH,
        )


def save_detection(path: pathlib.Path, image: np.ndarray, *, detector: ObjectDetector) -> None:
    """Save image, detections, and the points that each deformable block samples in the input of the network.

    Args:
      path: PNG file to write.
      image: uint8 (H, W, 3), RGB.
      detector: model from ``inference.load``.

    Raises:
      UserError: the file cannot be written.
    """
    detections, sampled = detector.filter_by_score(detector(image)), detector.sample(image)
    with atomic_path(path, overwrite=True) as temporary:
        charts.save_detections_and_points(
            temporary,
            image,
            detections,
            network_input=sampled["image"],
            positions=sampled["positions"],
            map_shapes=sampled["map_shapes"],
            class_names=detector.class_names,
            palette=detector.palette,
            panel_width=_PANEL_WIDTH,
        )


def choose_blocks(classifier: Classifier, names: Sequence[str] = ()) -> list[str]:
    """Blocks whose keys are drawn: ``names``, or by default the last D block of each stage.

    A model without D blocks has the last N block of each stage by default.

    Raises:
      UserError: a name is not a D or N block of the model, or the model has none.
    """
    known = block_names(classifier.model, "DN")
    if not known:
        raise UserError(NO_ATTENTION)
    for name in names:
        if name not in known:
            raise UserError(f"--blocks must be D or N blocks of the model ({', '.join(known)}), got {name!r}.")
    defaults = block_names(classifier.model, "D") or known
    last_of_stage = {name.split("/")[0]: name for name in defaults}
    return list(dict.fromkeys(names)) or list(last_of_stage.values())


def make_attention_saver(
    classifier: Classifier,
    *,
    query: tuple[float, float] | None = None,
    blocks: Sequence[str] = (),
    max_keys: int = 16,
    page: bool = False,
) -> Callable[[pathlib.Path, np.ndarray], None]:
    """Make a function ``save(path, image)`` that writes a figure of the attention of a classifier as PNG.

    Args:
      classifier: model from ``inference.load``.
      query: (y, x) in pixels of the image; by default the center of the network's input.
      blocks: see ``choose_blocks``.
      max_keys: number of keys to draw for the query.
      page: whether the function also writes an interactive page with the same name and the suffix .html.

    Returns:
      A function of the PNG file and an image (H, W, C) of ``classifier.image_format``. It raises a UserError if the query lies
      outside the image or a file cannot be written.

    Raises:
      UserError: the model or the blocks are impossible.
    """
    blocks = choose_blocks(classifier, blocks)
    read_attention = make_attention_reader(classifier)

    def save(path, image):
        point = find_input_point(classifier, image.shape[:2], query)
        attention = read_attention(image)
        if page:
            text = make_page(attention, title=path.stem, query=point, block=blocks[-1], max_keys=max_keys)
            with atomic_path(path.with_suffix(".html"), overwrite=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
        with atomic_path(path, overwrite=True) as temporary:
            save_attention(temporary, attention, query=point, blocks=blocks, max_keys=max_keys)

    return save
