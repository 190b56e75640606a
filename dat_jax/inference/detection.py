"""A trained detector as a function of images; see ``inference``."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from dat_jax.cli.flags import replacing
from dat_jax.data import coco_names
from dat_jax.data.ade20k import make_palette
from dat_jax.data.detection_transforms import DetectionEvalTransform, make_detection_eval_transform
from dat_jax.errors import UserError
from dat_jax.evaluation.detection import detect_record, make_detections
from dat_jax.inference.settings import check_sides, choose_options, find_names
from dat_jax.models.rcnn import RCNN
from dat_jax.models.registry import Detector
from dat_jax.tasks.detection.objective import default_settings, find_positions, make_detection_objective
from dat_jax.tasks.detection.rcnn import RCNNSettings
from dat_jax.tasks.detection.retinanet import RetinaNetSettings
from dat_jax.visualization import charts as plots

OPTIONS = {  # see ``choose_options``
    "long_side": ("data.test_long_side", 1333),
    "short_side": ("data.test_short_side", 800),
    "multiple": ("eval.multiple", 32),
    "min_score": ("", 0.3),
    "score_threshold": ("eval.score_threshold", 0.05),
    "iou_threshold": ("eval.iou_threshold", 0.5),
    "max_detections": ("eval.max_detections", 100),
    "candidates": ("sampling.test_candidates", 1000),
    "proposals": ("sampling.test_proposals", 1000),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectDetector:
    """A trained detector and how it looks at images; it compiles once for each size that these are padded to.

    Attributes:
      class_names, category_ids: of the K classes.
      palette: their colours, uint8 (K, 3) RGB.
      transform: from an image to what the network sees.
      predict: jitted, of ``make_detection_objective``.
      find_positions: jitted, of ``tasks.detection.detector``, of variables and a batch.
      model, variables: what it is made of.
      options: every option's value.
      settings: of its detections, by ``options``.
      has_masks: whether there are masks beside boxes.
      min_score: from which on a detection is drawn and described.
      columns: of ``to_rows``.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "class", "score", "x", "y", "width", "height")

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    palette: np.ndarray
    transform: DetectionEvalTransform
    predict: Callable
    find_positions: Callable
    model: Detector
    variables: Mapping[str, Any]
    options: Mapping[str, Any]
    settings: RetinaNetSettings | RCNNSettings
    has_masks: bool
    min_score: float

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (H, W, 3) RGB -> {"boxes", "scores", "labels", "masks"}, see ``evaluation.detection.to_original``."""
        return detect_record(self.predict, self.variables, self.transform({"image": image}), masks=self.has_masks)

    def describe(self, found: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Class name -> scores of what is drawn, by the best one."""
        scores: dict[str, list[str]] = {}
        shown = self.choose_shown(found)
        for label, score in zip(shown["labels"], shown["scores"], strict=True):
            scores.setdefault(self.class_names[label], []).append(f"{score:.2f}")
        return {name: " ".join(values) for name, values in scores.items()}

    def save(self, path: pathlib.Path, image: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
        """A PNG of the image with the boxes, masks, names and scores that are drawn."""
        names = dict(class_names=self.class_names, palette=self.palette)
        with replacing(path) as unfinished:
            plots.save_drawn_image(unfinished, image, self.choose_shown(found), **names)

    def to_entries(
        self, found: Mapping[str, np.ndarray], *, image: str, number: int, picture: str | None
    ) -> list[dict[str, Any]]:
        """Of every detection {"image", "category", and what ``make_detections`` gives}: COCO's format of results."""
        del picture
        arrays = (found[name] for name in ("boxes", "labels", "scores", "masks"))
        names = dict(zip(self.category_ids, self.class_names, strict=True))
        return [
            {"image": image, "category": names[entry["category_id"]], **entry}
            for entry in make_detections(*arrays, image_id=number, category_ids=self.category_ids)
        ]

    def to_rows(self, found: Mapping[str, np.ndarray], *, image: str) -> list[tuple]:
        """Of ``columns``: a row a detection, as in ``to_entries``; x, y is the upper left corner, all in pixels."""
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [
            (image, self.class_names[label], score, x1, y1, x2 - x1, y2 - y1) for label, score, (x1, y1, x2, y2) in rows
        ]

    def choose_shown(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those with a score of ``min_score`` or more."""
        shown = found["scores"] >= self.min_score
        return {name: None if values is None else values[shown] for name, values in found.items()}

    def sample(self, image: np.ndarray) -> dict[str, Any]:
        """Where the deformable blocks of the backbone look.

        Args:
          image: uint8 (H, W, 3) RGB.

        Returns:
          {"image": uint8 (Hp, Wp, 3), resized and padded as the network sees it; "positions": block -> (G, Hk, Wk, 2);
          "map_shapes": block -> (height, width), see ``models.key_positions.name_positions``}.
        """
        record = self.transform({"image": image})
        batch = {name: record[name][None] for name in ("image", "valid")}
        sampled = jax.device_get(self.find_positions(self.variables, batch))
        positions = {name: values[0] for name, values in sampled["positions"].items()}
        return {**sampled, "image": record["image"], "positions": positions}


def from_trained(
    path: str | os.PathLike,
    model: Detector,
    variables: Mapping[str, Any],
    *,
    classes: str | os.PathLike | None = None,
    **options,
) -> ObjectDetector:
    """See ``inference.load``.

    Category ids are COCO's where the model's classes are COCO's, else the labels counted from 1.

    Args:
      path: where the model was loaded from.
      model: the detector.
      variables: of it.
      classes: a file with names of its classes.
      **options: long_side, short_side and multiple (``make_detection_eval_transform``; published 1333, 800 and 32); min_score,
        from which on a detection is drawn and described (0.3); score_threshold, iou_threshold and max_detections (0.05, 0.5
        and 100), and the numbers of candidates and proposals (1000 each), see ``default_settings``. A min_score below
        score_threshold is taken for both.
    """
    path, count = pathlib.Path(path), model.num_classes
    options = choose_options(path, options, known=OPTIONS, kind="detector")
    _check(options)
    published = dict(count=count, published=coco_names.CLASS_NAMES)
    of_coco = find_names(path, None, **published) == coco_names.CLASS_NAMES
    scale, settings = (options["long_side"], options["short_side"]), _make_settings(model, options)
    return ObjectDetector(
        class_names=find_names(path, classes, **published),
        category_ids=coco_names.CATEGORY_IDS if of_coco else tuple(range(1, count + 1)),
        palette=make_palette(count + 1)[1:],  # the first one is black
        transform=make_detection_eval_transform(scale=scale, multiple=options["multiple"]),
        predict=jax.jit(make_detection_objective(model, settings=settings).predict),
        find_positions=jax.jit(functools.partial(find_positions, model)),
        model=model,
        variables=variables,
        options=options,
        settings=settings,
        has_masks=isinstance(model, RCNN),
        min_score=options["min_score"],
    )


def _check(options):
    check_sides(options)
    for name in ("multiple", "max_detections", "candidates", "proposals"):
        if options[name] < 1:
            raise UserError(f"{name} wants a number of at least 1, got {options[name]}.")
    for name in ("min_score", "score_threshold", "iou_threshold"):
        if not 0 <= options[name] <= 1:
            raise UserError(f"{name} wants a number from 0 to 1, got {options[name]}.")


def _make_settings(model, options):
    settings = default_settings(model)
    chosen = {name: options[name] for name in ("iou_threshold", "max_detections")}
    chosen["score_threshold"] = min(options["score_threshold"], options["min_score"])
    if isinstance(model, RCNN):
        chosen |= {"test_candidates": options["candidates"], "test_proposals": options["proposals"]}
    else:
        chosen["candidates"] = options["candidates"]
    return dataclasses.replace(settings, **chosen)
