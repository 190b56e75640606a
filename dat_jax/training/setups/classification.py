"""Image classification: see ``setups``."""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from dat_jax.data import batching
from dat_jax.data.eval_sets import load_eval_sets as load_sets
from dat_jax.data.sources import SPLITS, load_source
from dat_jax.data.transforms import make_eval_transform, make_train_transform
from dat_jax.evaluation import classification as evaluation
from dat_jax.models.registry import create_model
from dat_jax.ops.dispatch import compute_dtype
from dat_jax.tasks import Task
from dat_jax.tasks.classification import make_classification_task

CLASSES = 1000  # of ImageNet-1k


def load_sources(config: ConfigDict):
    """To train and to evaluate on."""
    return tuple(load_source(config.data.name, directory=config.data.directory, split=split) for split in SPLITS)


def load_eval_sets(config: ConfigDict, eval_source):
    """name -> (source, indices of its classes or None for all)."""
    return load_sets(config.eval.sets.to_dict(), eval_source)


def make_task(config: ConfigDict, *, classes: int, **overrides) -> Task:
    """The task with its model, attributes of which may be given."""
    settings = config.model.to_dict() | overrides
    dtype = compute_dtype(settings.pop("dtype"))
    augmentation = config.augmentation.to_dict()
    return make_classification_task(
        create_model(settings.pop("name"), dtype=dtype, num_classes=classes, **settings),
        label_smoothing=config.loss.label_smoothing,
        **{name: augmentation[name] for name in ("erasing_probability", "mixup_alpha", "cutmix_alpha")},
    )


def make_evaluate(config: ConfigDict, predict, source):
    """See ``evaluation.classification``."""
    del config, source
    return evaluation.make_evaluator(predict)


def make_train_batches(config: ConfigDict, source, *, start_step: int, rows: list[int]) -> Iterator[dict]:
    """See ``data.batching``."""
    augmentation = config.augmentation
    transform = make_train_transform(
        image_size=config.data.image_size,
        min_crop_area=augmentation.min_crop_area,
        max_crop_aspect=augmentation.max_crop_aspect,
        flip_probability=augmentation.flip_probability,
        rand_augment_count=augmentation.rand_augment_count,
        rand_augment_magnitude=augmentation.rand_augment_magnitude,
        rand_augment_std=augmentation.rand_augment_std,
    )
    return batching.make_train_batches(
        source,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        rows=rows,
        workers=config.data.workers,
    )


def example_indices(config: ConfigDict, source, *, step: int) -> list[int]:
    """Which images the batch of a step has."""
    return batching.example_indices(len(source), seed=config.seed, step=step, batch_size=config.batch_size)


def make_eval_batches(config: ConfigDict, source, *, rows: list[int]) -> Iterator[dict]:
    """Every example once, this process's rows of every batch."""
    del rows  # a batch is any examples
    return batching.make_eval_batches(
        source,
        _eval_transform(config),
        batch_size=config.eval.batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
    )


def example_batch(config: ConfigDict, size: int, *, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """To train on, or to evaluate."""
    del train
    side = config.data.image_size
    return {
        "image": jax.ShapeDtypeStruct((size, side, side, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((size,), "int32"),
    }


def describe_images(config: ConfigDict) -> str:
    """Their size."""
    return f"{config.data.image_size} x {config.data.image_size}"


def save_pictures(config: ConfigDict, predict, variables, source, directory: pathlib.Path) -> None:
    """Of 32 examples, spread over the data set."""
    count = min(32, len(source))
    spread = np.linspace(0, len(source) - 1, count).astype(int)  # over all classes, where they are sorted
    transform = _eval_transform(config)
    records = [transform(source[int(index)]) for index in np.random.default_rng(0).permutation(spread)]
    evaluation.save_figures(
        predict,
        variables,
        {key: np.stack([record[key] for record in records]) for key in records[0]},
        class_names=source.class_names,
        directory=directory,
    )


def _eval_transform(config):
    return make_eval_transform(resize=config.data.eval_resize, image_size=config.data.image_size)
