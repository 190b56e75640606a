"""Semantic segmentation: see ``setups``."""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from dat_jax.data import batching
from dat_jax.data.ade20k import make_palette_for
from dat_jax.data.segmentation_sources import load_segmentation_source
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform, make_segmentation_train_transform
from dat_jax.data.sources import SPLITS
from dat_jax.evaluation import segmentation as evaluation
from dat_jax.models.registry import create_segmentor
from dat_jax.ops.dispatch import compute_dtype
from dat_jax.tasks import Task
from dat_jax.tasks.segmentation import make_segmentation_task

CLASSES = 150  # of ADE20K


def load_sources(config: ConfigDict):
    """To train and to evaluate on."""
    data = config.data
    options = dict(directory=data.directory, zero_is_ignored=data.zero_is_ignored)
    return tuple(load_segmentation_source(data.name, split=split, **options) for split in SPLITS)


def load_eval_sets(config: ConfigDict, eval_source):
    """None."""
    del config, eval_source
    return {}


def make_task(config: ConfigDict, *, classes: int, **overrides) -> Task:
    """The task with its model, attributes of whose backbone may be given."""
    return make_segmentation_task(
        create_segmentor(
            **config.head.to_dict(),
            backbone={**config.model.to_dict(), "dtype": compute_dtype(config.model.dtype), **overrides},
            num_classes=classes,
        ),
        auxiliary_weight=config.loss.auxiliary_weight,
    )


def make_evaluate(config: ConfigDict, predict, source):
    """See ``evaluation.segmentation``."""
    del source
    return evaluation.make_evaluator(predict, **_test_options(config))


def make_train_batches(config: ConfigDict, source, *, start_step: int, rows: list[int]) -> Iterator[dict]:
    """See ``data.batching``."""
    data, augmentation = config.data, config.augmentation
    transform = make_segmentation_train_transform(
        scale=(data.long_side, data.short_side),
        min_ratio=augmentation.min_ratio,
        max_ratio=augmentation.max_ratio,
        crop_size=data.crop_size,
        max_class_ratio=augmentation.max_class_ratio,
        flip_probability=augmentation.flip_probability,
        distort=augmentation.distort,
    )
    return batching.make_train_batches(
        source,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        rows=rows,
        workers=data.workers,
    )


def example_indices(config: ConfigDict, source, *, step: int) -> list[int]:
    """Which images the batch of a step has."""
    return batching.example_indices(len(source), seed=config.seed, step=step, batch_size=config.batch_size)


def make_eval_batches(config: ConfigDict, source, *, rows: list[int]) -> Iterator[dict]:
    """Every example once, in batches of images of one size, this process's rows of every batch."""
    return batching.make_sized_eval_batches(
        source, _eval_transform(config), batch_size=config.eval.batch_size, rows=rows, workers=config.data.workers
    )


def example_batch(config: ConfigDict, size: int, *, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """To train on, or to evaluate."""
    del train
    side = config.data.crop_size
    return {
        "image": jax.ShapeDtypeStruct((size, side, side, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((size, side, side), "uint8"),
        "valid": jax.ShapeDtypeStruct((size, 2), "int32"),
    }


def describe_images(config: ConfigDict) -> str:
    """Their size."""
    side = config.data.crop_size
    return f"crops of {side} x {side}, whole images into {config.data.long_side} x {config.data.short_side}"


def save_pictures(config: ConfigDict, predict, variables, source, directory: pathlib.Path) -> None:
    """Of up to eight examples, spread over the data set, each of its own size."""
    segment = evaluation.make_segmenter(predict, **_test_options(config))
    transform = _eval_transform(config)
    spread = np.linspace(0, len(source) - 1, min(8, len(source))).astype(int)
    evaluation.save_figures(
        segment,
        variables,
        [transform(source[int(index)]) | {"image": source[int(index)]["image"]} for index in spread],
        class_names=source.class_names,
        palette=make_palette_for(len(source.class_names)),
        directory=directory,
    )


def _eval_transform(config):
    return make_segmentation_eval_transform(
        scale=(config.data.long_side, config.data.short_side), ratios=tuple(config.eval.ratios)
    )


def _test_options(config):
    return dict(flip=config.eval.flip, window=config.eval.window, stride=config.eval.stride)
