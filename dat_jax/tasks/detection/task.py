"""Object detection and instance segmentation as a task."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dat_jax.data import batching, sized_batching
from dat_jax.data.ade20k import make_palette
from dat_jax.data.buckets import Shape, parse_buckets
from dat_jax.data.coco import (
    CocoSource,
    decode_mask,
    format_skipped,
    load_detection_source,
    to_coco_ground_truth,
)
from dat_jax.data.coco_ids import CATEGORIES, format_categories
from dat_jax.data.detection_transforms import (
    BUCKETS,
    make_detection_eval_transform,
    make_detection_train_transform,
)
from dat_jax.data.sources import SPLITS, read_spread_examples, spread_indices, warn_if_turned
from dat_jax.errors import UserError, name_some
from dat_jax.evaluation import detection as evaluation
from dat_jax.models.registry import create_detector, find_other_attributes
from dat_jax.models.retinanet import RetinaNet
from dat_jax.ops.dispatch import compute_dtype
from dat_jax.tasks.detection.anchor_check import AnchorSettings, check_anchors
from dat_jax.tasks.detection.objective import default_settings, make_detection_objective
from dat_jax.tasks.detection.rcnn import RCNNSettings
from dat_jax.tasks.detection.retinanet import retinanet_anchor_settings
from dat_jax.tasks.detection.rpn import rpn_anchor_settings
from dat_jax.tasks.objective import Objective
from dat_jax.tasks.task import Evaluator, Source, Task

logger = logging.getLogger(__name__)
_FIGURE_EXAMPLES = 8
_CHECKED_OBJECTS, _CHECKED_IMAGES = 2000, 500


class DetectionTask(Task):
    """Boxes, classes and, except for RetinaNet, masks of objects. Batches are those of ``tasks.detection.objective``."""

    name = "detection"
    metric = evaluation.METRIC
    published_classes = 80  # COCO

    def __init__(self, config: ConfigDict, *, sources: tuple[Source, Source] | None = None):
        """See ``Task``. Attributes of another detector are dropped from ``config.head``."""
        super().__init__(_drop_other_attributes(config), sources=sources)

    def load_sources(self) -> tuple[Source, Source]:
        """See ``Task``."""
        data = self.config.data
        train, validation = (
            load_detection_source(
                data.name, split=split, directory=data.directory, apply_orientation=data.apply_orientation
            )
            for split in SPLITS
        )
        train_categories, validation_categories = (
            (source.category_ids, source.class_names) for source in (train, validation)
        )
        if train_categories != validation_categories:
            raise UserError(
                "Expected the same categories in the training and the validation annotations, got "
                f"{_format_categories(train_categories)} and {_format_categories(validation_categories)}."
            )
        return train, validation

    def check_data(self) -> None:
        """See ``Task``: objects to train on, anchors that match them, and buckets that hold the validation images.

        Objects are counted in COCO files only.
        """
        source = self.train_source
        self.count_eval_arrays(self.eval_buckets)  # an error if no bucket holds an image
        if isinstance(source, CocoSource):
            _check_objects(source)
            indices = spread_indices(len(source), _CHECKED_IMAGES)
            warn_if_turned(source, indices, split="training", annotations="boxes and masks")
        self._check_masks()
        if hasattr(source, "sample_boxes"):
            boxes, sizes = source.sample_boxes(_CHECKED_OBJECTS)
            check_anchors(boxes, sizes, self._anchor_settings(), resize=self._train_transform().usual_sizes)

    def description_files(self) -> Mapping[str, str]:
        """See ``Task``: the category ids, see ``data.coco_ids``."""
        source = self.train_source
        return {CATEGORIES: format_categories(source.category_ids, source.class_names)}

    def make_train_batches(self, *, start_step: int, rows: list[int]) -> Iterator[dict]:
        """See ``Task``."""
        config = self.config
        self._check_masks()
        return batching.make_detection_train_batches(
            self.train_source,
            self._train_transform(),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            rows=rows,
            workers=config.data.workers,
        )

    def make_eval_batches(self, source: Source, *, rows: list[int]) -> Iterator[dict]:
        """See ``Task``. The images of a batch are in arrays of the same shape."""
        config = self.config
        return sized_batching.make_detection_eval_batches(
            source,
            self._eval_transform(),
            batch_size=config.eval.batch_size,
            rows=rows,
            workers=config.data.workers,
            buckets=self.eval_buckets,
        )

    @functools.cached_property
    def eval_buckets(self) -> list[Shape] | None:
        """See ``Task``."""
        return sized_batching.choose_eval_buckets(self.eval_source, self._eval_transform(), self.config.eval.buckets)

    def count_eval_arrays(self, buckets) -> Mapping[Shape, int]:
        """See ``Task``."""
        return sized_batching.count_arrays(self.eval_source, self._eval_transform(), buckets)

    def example_indices(self, step: int) -> list[int]:
        """See ``Task``. Batches hold images of one orientation, so their order differs from that of other tasks."""
        options = dict(seed=self.config.seed, step=step, batch_size=self.config.batch_size)
        return batching.detection_example_indices(self.train_source, self._train_transform(), **options)

    def example_batch(self, size: int, *, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
        """See ``Task``. The shape is that of the largest bucket."""
        return self._make_example(size, max(self._buckets(), key=np.prod), train=train)

    def train_examples(self, size: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """See ``Task``. There is a shape for each bucket."""
        return [self._make_example(size, bucket, train=True) for bucket in self._buckets()]

    def _make_example(self, size: int, bucket: Shape, *, train: bool) -> dict[str, jax.ShapeDtypeStruct]:
        height, width = bucket
        count = self.config.data.max_boxes
        shapes = {"image": ((height, width, 3), "uint8"), "valid": ((2,), "int32")}
        if train:
            shapes |= {"boxes": ((count, 4), "float32"), "labels": ((count,), "int32"), "box_mask": ((count,), "bool")}
            if self._has_masks:
                shapes["masks"] = ((count, height, width // 8), "uint8")
        else:
            shapes["scale"] = ((4,), "float32")
        return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def describe_images(self) -> str:
        """See ``Task``."""
        data = self.config.data
        short = f"{min(data.short_sides)} to {max(data.short_sides)}"
        return f"{short} x {data.long_side} to train, {data.test_short_side} x {data.test_long_side} to evaluate"

    def make_objective(self, **backbone: Any) -> Objective:
        """See ``Task``."""
        config, model = self.config, self._make_model(**backbone)
        sampling = config.sampling.to_dict()
        settings = {name: config.eval[name] for name in ("score_threshold", "iou_threshold", "max_detections")}
        if isinstance(model, RetinaNet):
            settings["candidates"] = sampling["test_candidates"]
        else:
            settings |= sampling
        return make_detection_objective(model, settings=dataclasses.replace(default_settings(model), **settings))

    def make_evaluator(self, predict: Callable) -> Evaluator:
        """See ``Task`` and ``evaluation.detection``."""
        source = self.eval_source
        return evaluation.make_evaluator(
            predict,
            load_ground_truth=lambda: to_coco_ground_truth(source),
            category_ids=source.category_ids,
            masks=self._has_masks and source.has_masks,
        )

    def save_figures(self, predict: Callable, variables: Any, directory: pathlib.Path) -> None:
        """See ``Task``."""
        source, transform = self.eval_source, self._eval_transform()
        examples = []
        for record in read_spread_examples(source, _FIGURE_EXAMPLES):
            masks = np.stack([decode_mask(mask) for mask in record["masks"]]).astype(bool) if record["masks"] else None
            examples.append(({**record, "masks": masks}, transform(record)))
        evaluation.save_figures(
            predict,
            variables,
            examples,
            class_names=source.class_names,
            palette=make_palette(len(source.class_names) + 1)[1:],  # the first color is black
            masks=self._has_masks,
            directory=directory,
        )

    def _check_masks(self) -> None:
        if self._has_masks and not self.train_source.has_masks:
            raise UserError(
                f"config.head.name {self.config.head.name} learns masks, but the annotations have none: expected a segmentation "
                "of every object. Boxes alone train config.head.name=retinanet."
            )

    def _make_model(self, **backbone):
        config = self.config
        return create_detector(
            **config.head.to_dict(),
            backbone={**config.model.to_dict(), "dtype": compute_dtype(config.model.dtype), **backbone},
            num_classes=len(self.class_names),
        )

    def _anchor_settings(self) -> AnchorSettings:
        model = self._make_model()
        options = dict(scales=tuple(model.anchor_scales), ratios=tuple(model.anchor_ratios))
        settings = default_settings(model)
        if isinstance(settings, RCNNSettings):
            return rpn_anchor_settings(inside_only=settings.rpn_inside_only, **options)
        return retinanet_anchor_settings(**options)

    @property
    def _has_masks(self) -> bool:
        return self.config.head.name != "retinanet"

    def _buckets(self):
        text = self.config.data.buckets
        return tuple(parse_buckets(text, key="config.data.buckets")) if text else BUCKETS

    def _train_transform(self):
        data, augmentation = self.config.data, self.config.augmentation
        return make_detection_train_transform(
            short_sides=data.short_sides,
            long_side=data.long_side,
            flip_probability=augmentation.flip_probability,
            crop_probability=augmentation.crop_probability,
            first_short_sides=augmentation.first_short_sides,
            crop_sides=(augmentation.crop_min, augmentation.crop_max),
            buckets=self._buckets(),
            max_boxes=data.max_boxes,
            masks=self._has_masks,
        )

    def _eval_transform(self):
        scale = (self.config.data.test_long_side, self.config.data.test_short_side)
        return make_detection_eval_transform(scale=scale, multiple=self.config.eval.multiple)


def _check_objects(source: CocoSource) -> None:
    """Raise a UserError if there is no object to train on, and log classes without an object as a warning."""
    counts = source.count_objects()
    if not counts.any():
        raise UserError(
            f"The annotations {source.annotations} have no object to train on.{format_skipped(source.skipped)}"
        )
    missing = [name for name, count in zip(source.class_names, counts, strict=True) if not count]
    if missing:
        logger.warning(
            "%d of %d classes have no object to train on in %s: %s.",
            *(len(missing), len(counts), source.annotations, name_some(missing)),
        )


def _format_categories(categories) -> str:
    return name_some([f"{number} {name}" for number, name in zip(*categories, strict=True)])


TASK = DetectionTask


def _drop_other_attributes(config: ConfigDict) -> ConfigDict:
    """Drop attributes of another detector, which remain in ``config.head`` if only ``head.name`` is changed."""
    dropped = find_other_attributes(config.head.name, config.head)
    if not dropped:
        return config
    logger.warning(
        "config.head.name %s has no %s: dropped what the configuration sets for another detector.",
        *(config.head.name, ", ".join(f"{key} ({config.head[key]})" for key in dropped)),
    )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for key in dropped:
            del config.head[key]
    return config
