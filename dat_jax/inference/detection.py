"""A trained detector as a function of images; ``inference`` documents the interface."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from dat_jax.data import coco_names
from dat_jax.data.ade20k import make_palette
from dat_jax.data.coco_ids import CATEGORIES, read_category_ids
from dat_jax.data.detection_transforms import DetectionEvalTransform, make_detection_eval_transform
from dat_jax.data.image_format import RGB, ImageFormat
from dat_jax.errors import UserError
from dat_jax.evaluation.detection import detect_record, make_detections
from dat_jax.inference.image_files import check_image
from dat_jax.inference.settings import check_at_least_1, choose_options, find_names
from dat_jax.inference.shapes import ArrayShapes
from dat_jax.models.key_positions import crop_positions
from dat_jax.models.rcnn import RCNN
from dat_jax.models.registry import Detector
from dat_jax.storage import atomic_path
from dat_jax.tasks.detection.objective import default_settings, find_positions, make_detection_objective
from dat_jax.tasks.detection.rcnn import RCNNSettings
from dat_jax.tasks.detection.retinanet import RetinaNetSettings
from dat_jax.visualization import charts

OPTIONS = {  # default values
    "long_side": 1333,
    "short_side": 800,
    "multiple": 32,
    "min_score": 0.3,
    "score_threshold": 0.05,
    "iou_threshold": 0.5,
    "max_detections": 100,
    "candidates": 1000,
    "proposals": 1000,
    "category_ids": None,
    "buckets": "auto",
}


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectDetector:
    """A trained detector with its preprocessing. Every shape of arrays is compiled once, see ``arrays``.

    A prediction is a dict with the arrays of ``evaluation.detection.to_original``.

    Attributes:
      class_names: names of the K classes.
      category_ids: category ids of the classes in COCO's format of results.
      palette: colors of the classes, uint8 (K, 3), RGB.
      transform: preprocessing of an image to the input of the network.
      predict: jitted ``predict`` of ``make_detection_objective``.
      find_positions: jitted ``tasks.detection.objective.find_positions``, a function of variables and a batch.
      model: the network.
      variables: weights of the network.
      options: value of every option.
      settings: settings of the postprocessing, according to ``options``.
      has_masks: whether detections have masks in addition to boxes.
      min_score: lowest score of the detections that are drawn and described.
      arrays: shapes of the arrays of images.
      columns: column names of ``to_rows``.
      image_format: channels and dtype of images.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "class", "score", "x", "y", "width", "height")
    image_format: ClassVar[ImageFormat] = RGB

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
    arrays: ArrayShapes = dataclasses.field(default_factory=ArrayShapes)

    def plan(self, sizes: Iterable[tuple[int, int]]) -> "ObjectDetector":
        """Return this detector prepared for images of these (height, width): it compiles few programs for them.

        Raises:
          UserError: see ``buckets.check_sizes``.
        """
        return dataclasses.replace(self, arrays=self.arrays.plan(self.transform, sizes))

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Detections in an image, uint8 (H, W, 3), RGB.

        Returns:
          {"boxes", "scores", "labels", "masks"}, see ``evaluation.detection.to_original``.
        """
        image = check_image(image)
        record = self.arrays.pad(self.transform({"image": image}), self.transform, (image.shape[0], image.shape[1]))
        return detect_record(self.predict, self.variables, record, masks=self.has_masks)

    def describe(self, prediction: Mapping[str, np.ndarray]) -> dict[str, str]:
        """{class name: scores} of the detections that are drawn, ordered by the best score of each class."""
        scores: dict[str, list[str]] = {}
        drawn = self.filter_by_score(prediction)
        for label, score in zip(drawn["labels"], drawn["scores"], strict=True):
            scores.setdefault(self.class_names[label], []).append(f"{score:.2f}")
        return {name: " ".join(values) for name, values in scores.items()}

    def save(self, path: pathlib.Path, image: np.ndarray, prediction: Mapping[str, np.ndarray]) -> None:
        """Write a PNG of the image with the boxes, masks, class names and scores of its detections."""
        with atomic_path(path, overwrite=True) as temporary:
            charts.save_drawn_image(
                temporary,
                image,
                self.filter_by_score(prediction),
                class_names=self.class_names,
                palette=self.palette,
            )

    def to_entries(
        self, prediction: Mapping[str, np.ndarray], *, image: str, number: int, output: str | None
    ) -> list[dict[str, Any]]:
        """One entry per detection in COCO's format of results: "image", "category" and the keys of ``make_detections``."""
        del output
        arrays = (prediction[name] for name in ("boxes", "labels", "scores", "masks"))
        names = dict(zip(self.category_ids, self.class_names, strict=True))
        return [
            {"image": image, "category": names[entry["category_id"]], **entry}
            for entry in make_detections(*arrays, image_id=number, category_ids=self.category_ids)
        ]

    def to_rows(self, prediction: Mapping[str, np.ndarray], *, image: str) -> list[tuple]:
        """One row per detection, as in ``to_entries``. x and y are the upper left corner of the box; all are in pixels."""
        arrays = (prediction[name].tolist() for name in ("labels", "scores", "boxes"))
        return [
            (image, self.class_names[label], score, x1, y1, x2 - x1, y2 - y1)
            for label, score, (x1, y1, x2, y2) in zip(*arrays, strict=True)
        ]

    def filter_by_score(self, prediction: Mapping[str, Any]) -> dict[str, Any]:
        """Detections with a score of at least ``min_score``."""
        keep = prediction["scores"] >= self.min_score
        return {name: None if values is None else values[keep] for name, values in prediction.items()}

    def sample(self, image: np.ndarray) -> dict[str, Any]:
        """Positions of the keys that the deformable blocks of the backbone sample.

        Args:
          image: uint8 (H, W, 3), RGB.

        Returns:
          A dict:
            "image": the resized and padded input of the network, uint8 (Hp, Wp, 3).
            "positions": block name -> (G, Hk, Wk, 2), see ``models.key_positions.name_positions``.
            "map_shapes": block name -> (height, width) of its feature map.
        """
        image = check_image(image)
        record = self.transform({"image": image})
        padded = self.arrays.pad(record, self.transform, (image.shape[0], image.shape[1]))
        batch = {name: padded[name][None] for name in ("image", "valid", "sizes") if name in padded}
        positions = jax.device_get(self.find_positions(self.variables, batch)["positions"])
        first = {name: values[0] for name, values in positions.items()}
        return {"image": record["image"], **crop_positions(first, self.model.dat, record["image"].shape[:2])}


def from_trained(
    path: str | os.PathLike,
    model: Detector,
    variables: Mapping[str, Any],
    *,
    classes: str | os.PathLike | None = None,
    **options,
) -> ObjectDetector:
    """Make a detector from a loaded model; ``inference.load`` documents the rest.

    Category ids are those stored in the export or the work directory; otherwise those of COCO if the model has the classes of
    COCO; otherwise label + 1.

    Args:
      path: export or work directory that the model was loaded from.
      model: the network.
      variables: weights of the network.
      classes: text file with the class names. A model of 80 classes has the names of COCO by default.
      **options:
        long_side, short_side, multiple: see ``make_detection_eval_transform``; published are 1333, 800 and 32.
        min_score: lowest score of the detections that are drawn and described, by default 0.3. If it is below
          score_threshold, it replaces that too.
        score_threshold, iou_threshold, max_detections: see ``RetinaNetSettings``; published are 0.05, 0.5 and 100.
        candidates, proposals: numbers of boxes before and after NMS, see ``RCNNSettings``; published are 1000 and 1000.
        category_ids: category id of every class in COCO's format of results.
        buckets: see ``ArrayShapes``, "auto" by default.

    Raises:
      UserError: an option is unknown or impossible, or the class names or category ids cannot be read.
    """
    path, count = pathlib.Path(path), model.num_classes
    options = choose_options(path, options, known=OPTIONS, kind="detector")
    _check(options)
    find = functools.partial(find_names, path, count=count, published=coco_names.CLASS_NAMES)
    options["category_ids"] = _find_category_ids(path, options["category_ids"], find(None))
    scale, settings = (options["long_side"], options["short_side"]), _make_settings(model, options)
    return ObjectDetector(
        class_names=find(classes),
        category_ids=options["category_ids"],
        palette=make_palette(count + 1)[1:],  # without black, the first color
        transform=make_detection_eval_transform(scale=scale, multiple=options["multiple"]),
        predict=jax.jit(make_detection_objective(model, settings=settings).predict),
        find_positions=jax.jit(functools.partial(find_positions, model)),
        model=model,
        variables=variables,
        options=options,
        settings=settings,
        has_masks=isinstance(model, RCNN),
        min_score=options["min_score"],
        arrays=ArrayShapes(options["buckets"]),
    )


def _find_category_ids(path, category_ids, class_names):
    """Category ids of classes, whose names are those stored with the model: passed or stored, COCO's, or label + 1."""
    if category_ids is None:
        category_ids = read_category_ids(path / CATEGORIES, class_names)
    if category_ids is None:
        is_coco = class_names == coco_names.CLASS_NAMES
        return coco_names.CATEGORY_IDS if is_coco else tuple(range(1, len(class_names) + 1))
    if len(set(category_ids)) != len(class_names) or len(category_ids) != len(class_names):
        raise UserError(f"category_ids must be {len(class_names)} different integers, got {category_ids}.")
    return tuple(category_ids)


def _check(options):
    check_at_least_1(options, "long_side", "short_side", "multiple", "max_detections", "candidates", "proposals")
    for name in ("min_score", "score_threshold", "iou_threshold"):
        if not 0 <= options[name] <= 1:
            raise UserError(f"{name} must be from 0 to 1, got {options[name]}.")


def _make_settings(model, options):
    changes = {name: options[name] for name in ("iou_threshold", "max_detections")}
    changes["score_threshold"] = min(options["score_threshold"], options["min_score"])
    if isinstance(model, RCNN):
        changes |= {"test_candidates": options["candidates"], "test_proposals": options["proposals"]}
    else:
        changes["candidates"] = options["candidates"]
    return dataclasses.replace(default_settings(model), **changes)
