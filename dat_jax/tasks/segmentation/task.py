"""Semantic segmentation as a task."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from dat_jax.data import batching, buckets, sized_batching
from dat_jax.data.ade20k import make_palette_for
from dat_jax.data.segmentation_sources import load_segmentation_source
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform, make_segmentation_train_transform
from dat_jax.data.sources import SPLITS, read_spread_examples
from dat_jax.evaluation import segmentation as evaluation
from dat_jax.models.dat import MIN_IMAGE_SIDE
from dat_jax.models.registry import create_segmentor
from dat_jax.ops.dispatch import compute_dtype
from dat_jax.tasks.objective import Objective
from dat_jax.tasks.segmentation.label_check import check_labels
from dat_jax.tasks.segmentation.objective import make_segmentation_objective
from dat_jax.tasks.task import Evaluator, Source, Task

_FIGURE_EXAMPLES = 8


class SegmentationTask(Task):
    """A class per pixel. Batches are those of ``make_segmentation_objective``."""

    name = "segmentation"
    metric = evaluation.METRIC
    published_classes = 150  # ADE20K

    def load_sources(self) -> tuple[Source, Source]:
        """See ``Task``."""
        data = self.config.data
        options = {name: data[name] for name in ("directory", "zero_is_ignored", "label_values", "apply_orientation")}
        train, validation = (load_segmentation_source(data.name, split=split, **options) for split in SPLITS)
        return train, validation

    def check_data(self) -> None:
        """See ``Task``, ``check_labels``, ``sized_batching.check_view_sizes`` and ``buckets.find_bucket``."""
        check_labels(self.train_source, split="training")
        check_labels(self.eval_source, split="validation")
        transform = self._eval_transform()
        sizes = sized_batching.check_view_sizes(self.eval_source, transform, min_side=MIN_IMAGE_SIDE)
        if self.config.eval.buckets != "auto":  # those that are chosen from the sizes hold them
            buckets.plan_shapes({size: transform.view_shapes(*size) for size in set(sizes)}, self.eval_buckets)

    def make_train_batches(self, *, start_step: int, rows: list[int]) -> Iterator[dict]:
        """See ``Task``."""
        config, data, augmentation = self.config, self.config.data, self.config.augmentation
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
            self.train_source,
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            rows=rows,
            workers=data.workers,
        )

    def make_eval_batches(self, source: Source, *, rows: list[int]) -> Iterator[dict]:
        """See ``Task``. The images of a batch are in arrays of the same shape."""
        config = self.config
        return sized_batching.make_sized_eval_batches(
            source,
            self._eval_transform(),
            batch_size=config.eval.batch_size,
            rows=rows,
            workers=config.data.workers,
            min_side=MIN_IMAGE_SIDE,
            buckets=self.eval_buckets,
        )

    def count_eval_arrays(self, buckets) -> Mapping[buckets.Shape, int]:
        """See ``Task``. Of several views of an image each counts."""
        return sized_batching.count_arrays(
            self.eval_source, self._eval_transform(), buckets, window=self.config.eval.window
        )

    def example_batch(self, size: int, *, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
        """See ``Task``."""
        del train
        side = self.config.data.crop_size
        return {
            "image": jax.ShapeDtypeStruct((size, side, side, 3), "uint8"),
            "label": jax.ShapeDtypeStruct((size, side, side), "uint8"),
            "valid": jax.ShapeDtypeStruct((size, 2), "int32"),
        }

    def describe_images(self) -> str:
        """See ``Task``."""
        data = self.config.data
        return f"crops of {data.crop_size} x {data.crop_size}, whole images into {data.long_side} x {data.short_side}"

    def make_objective(self, **backbone: Any) -> Objective:
        """See ``Task``."""
        config = self.config
        return make_segmentation_objective(
            create_segmentor(
                **config.head.to_dict(),
                backbone={**config.model.to_dict(), "dtype": compute_dtype(config.model.dtype), **backbone},
                num_classes=len(self.class_names),
            ),
            auxiliary_weight=config.loss.auxiliary_weight,
        )

    def make_evaluator(self, predict: Callable) -> Evaluator:
        """See ``Task`` and ``evaluation.segmentation``."""
        return evaluation.make_evaluator(predict, exact=self.eval_buckets is None, **self._inference_options())

    def save_figures(self, predict: Callable, variables: Any, directory: pathlib.Path) -> None:
        """See ``Task``. Each example has its own size."""
        source, transform, chosen = self.eval_source, self._eval_transform(), self.eval_buckets
        records = read_spread_examples(source, _FIGURE_EXAMPLES)
        shapes = buckets.plan_shapes(
            {size: transform.view_shapes(*size) for size in {record["label"].shape for record in records}}, chosen
        )

        def prepare(record):
            views = transform(record)
            return views if chosen is None else buckets.pad_views(views, shapes[record["label"].shape])

        evaluation.save_figures(
            evaluation.make_segmenter(predict, **self._inference_options()),
            variables,
            [prepare(record) | {"image": record["image"]} for record in records],
            class_names=source.class_names,
            palette=make_palette_for(len(source.class_names)),
            directory=directory,
        )

    @functools.cached_property
    def eval_buckets(self) -> list[buckets.Shape] | None:
        """See ``Task``."""
        return sized_batching.choose_eval_buckets(self.eval_source, self._eval_transform(), self.config.eval.buckets)

    def _eval_transform(self):
        data = self.config.data
        return make_segmentation_eval_transform(
            scale=(data.long_side, data.short_side), ratios=tuple(self.config.eval.ratios)
        )

    def _inference_options(self):
        evaluation_config = self.config.eval
        return dict(flip=evaluation_config.flip, window=evaluation_config.window, stride=evaluation_config.stride)


TASK = SegmentationTask
