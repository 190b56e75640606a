"""Object detection and instance segmentation: see ``setups``."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from dat_jax.data import batching
from dat_jax.data.ade20k import make_palette
from dat_jax.data.coco import decode_mask, load_detection_source, to_coco_ground_truth
from dat_jax.data.detection_transforms import (
    BUCKETS,
    make_detection_eval_transform,
    make_detection_train_transform,
    parse_buckets,
)
from dat_jax.data.sources import SPLITS
from dat_jax.errors import UserError, name_some
from dat_jax.evaluation import detection as evaluation
from dat_jax.models.registry import create_detector
from dat_jax.models.retinanet import RetinaNet
from dat_jax.ops.dispatch import compute_dtype
from dat_jax.tasks import Task
from dat_jax.tasks.detection.detector import default_settings, make_detection_task

CLASSES = 80  # of COCO


def load_sources(config: ConfigDict):
    """To train and to evaluate on."""
    sources = [
        load_detection_source(config.data.name, split=split, directory=config.data.directory) for split in SPLITS
    ]
    train, validation = ((source.category_ids, source.class_names) for source in sources)
    if train != validation:
        raise UserError(
            f"The annotations to train on have the categories {_list(train)}, those to validate on {_list(validation)}: "
            "wanted the same ones."
        )
    return tuple(sources)


def load_eval_sets(config: ConfigDict, eval_source):
    """None."""
    del config, eval_source
    return {}


def make_task(config: ConfigDict, *, classes: int, **overrides) -> Task:
    """The task with its model, attributes of whose backbone may be given."""
    model = create_detector(
        **config.head.to_dict(),
        backbone={**config.model.to_dict(), "dtype": compute_dtype(config.model.dtype), **overrides},
        num_classes=classes,
    )
    sampling, judged = config.sampling.to_dict(), config.eval
    chosen = {name: judged[name] for name in ("score_threshold", "iou_threshold", "max_detections")}
    if isinstance(model, RetinaNet):
        chosen["candidates"] = sampling["test_candidates"]
    else:
        chosen |= sampling
    return make_detection_task(model, settings=dataclasses.replace(default_settings(model), **chosen))


def make_evaluate(config: ConfigDict, predict, source):
    """See ``evaluation.detection``."""
    return evaluation.make_evaluator(
        predict,
        load_ground_truth=lambda: to_coco_ground_truth(source),
        category_ids=source.category_ids,
        masks=_with_masks(config) and source.has_masks,
    )


def make_train_batches(config: ConfigDict, source, *, start_step: int, rows: list[int]) -> Iterator[dict]:
    """See ``data.batching``."""
    if _with_masks(config) and not source.has_masks:
        raise UserError(
            f"config.head.name {config.head.name} learns masks, and the annotations have none: wanted a segmentation of "
            "every object, or config.head.name=retinanet."
        )
    return batching.make_detection_train_batches(
        source,
        _train_transform(config),
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        rows=rows,
        workers=config.data.workers,
    )


def example_indices(config: ConfigDict, source, *, step: int) -> list[int]:
    """Which images the batch of a step has."""
    options = dict(seed=config.seed, step=step, batch_size=config.batch_size)
    return batching.detection_example_indices(source, _train_transform(config), **options)


def make_eval_batches(config: ConfigDict, source, *, rows: list[int]) -> Iterator[dict]:
    """Every image once, in batches of one padded shape, this process's rows of every batch."""
    return batching.make_detection_eval_batches(
        source, _eval_transform(config), batch_size=config.eval.batch_size, rows=rows, workers=config.data.workers
    )


def example_batch(config: ConfigDict, size: int, *, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """To train on, or to evaluate; in the largest bucket."""
    height, width = max(_buckets(config), key=np.prod)
    count = config.data.max_boxes
    shapes = {"image": ((height, width, 3), "uint8"), "valid": ((2,), "int32")}
    if train:
        shapes |= {"boxes": ((count, 4), "float32"), "labels": ((count,), "int32"), "box_mask": ((count,), "bool")}
        if _with_masks(config):
            shapes["masks"] = ((count, height, width // 8), "uint8")
    else:
        shapes["scale"] = ((4,), "float32")
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def describe_images(config: ConfigDict) -> str:
    """Their size."""
    data = config.data
    short = f"{min(data.short_sides)} to {max(data.short_sides)}"
    return f"{short} x {data.long_side} to train, {data.test_short_side} x {data.test_long_side} to evaluate"


def save_pictures(config: ConfigDict, predict, variables, source, directory: pathlib.Path) -> None:
    """Of up to eight examples, spread over the data set."""
    transform, masks = _eval_transform(config), _with_masks(config)
    records = []
    for index in np.linspace(0, len(source) - 1, min(8, len(source))).astype(int):
        record = source[int(index)]
        known = record["masks"]
        truth = {
            **record,
            "masks": None if not known else np.stack([decode_mask(mask) for mask in known]).astype(bool),
        }
        records.append((truth, transform(record)))
    evaluation.save_figures(
        predict,
        variables,
        records,
        class_names=source.class_names,
        palette=make_palette(len(source.class_names) + 1)[1:],  # the first one is black
        masks=masks,
        directory=directory,
    )


def _list(categories) -> str:
    return name_some([f"{number} {name}" for number, name in zip(*categories, strict=True)])


def _with_masks(config) -> bool:
    return config.head.name != "retinanet"


def _buckets(config):
    return parse_buckets(config.data.buckets) if config.data.buckets else BUCKETS


def _train_transform(config):
    data, augmentation = config.data, config.augmentation
    return make_detection_train_transform(
        short_sides=data.short_sides,
        long_side=data.long_side,
        flip_probability=augmentation.flip_probability,
        crop_probability=augmentation.crop_probability,
        first_short_sides=augmentation.first_short_sides,
        crop_sides=(augmentation.crop_min, augmentation.crop_max),
        buckets=_buckets(config),
        max_boxes=data.max_boxes,
        masks=_with_masks(config),
    )


def _eval_transform(config):
    scale = (config.data.test_long_side, config.data.test_short_side)
    return make_detection_eval_transform(scale=scale, multiple=config.eval.multiple)
