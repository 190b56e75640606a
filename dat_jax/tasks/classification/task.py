"""Image classification as a task."""

import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dat_jax.data import batching
from dat_jax.data.eval_sets import load_eval_sets
from dat_jax.data.image_format import RGB, ImageFormat
from dat_jax.data.sources import SPLITS, load_source, read_spread_examples
from dat_jax.data.transforms import make_eval_transform, make_train_transform
from dat_jax.errors import name_some
from dat_jax.evaluation import classification as evaluation
from dat_jax.models.registry import create_model
from dat_jax.ops.dispatch import compute_dtype
from dat_jax.tasks.classification.objective import make_classification_objective
from dat_jax.tasks.objective import Objective
from dat_jax.tasks.task import Evaluator, Source, Task, count_steps

logger = logging.getLogger(__name__)
_FIGURE_EXAMPLES = 32


class ClassificationTask(Task):
    """A label per image. Batches hold "image", (B, S, S, C) of the dtype of the images, and "label", (B,) int32."""

    name = "classification"
    metric = evaluation.METRIC
    published_classes = 1000  # ImageNet-1k

    def load_sources(self) -> tuple[Source, Source]:
        """See ``Task``."""
        data = self.config.data
        options: dict[str, Any] = dict(
            directory=data.directory,
            apply_orientation=data.apply_orientation,
            image_format=ImageFormat(data.channels, data.dtype),
        )
        train, validation = (load_source(data.name, split=split, **options) for split in SPLITS)
        return train, validation

    def check_data(self) -> None:
        """See ``Task``. Classes without examples are named, and a single class too."""
        names = self.train_source.class_names
        if len(names) == 1:
            logger.warning("There is only one class, %s: expected at least two, since any model is right.", names[0])
        for split, source in (("training", self.train_source), ("validation", self.eval_source)):
            if isinstance(labels := getattr(source, "labels", None), np.ndarray):
                counts = np.bincount(labels, minlength=len(names))
                missing = [name for name, count in zip(names, counts, strict=False) if not count]
                if missing:
                    logger.warning(
                        "%d of %d classes have no %s images: %s.", len(missing), len(names), split, name_some(missing)
                    )

    def load_extra_eval_sets(self) -> Mapping[str, tuple[Source, Any]]:
        """See ``Task``."""
        return load_eval_sets(self.config.eval.sets.to_dict(), self.eval_source)

    def make_train_batches(self, *, start_step: int, rows: list[int]) -> Iterator[dict]:
        """See ``Task``."""
        config, augmentation = self.config, self.config.augmentation
        make_transform = functools.partial(
            make_train_transform,
            min_crop_area=augmentation.min_crop_area,
            max_crop_aspect=augmentation.max_crop_aspect,
            flip_probability=augmentation.flip_probability,
            rand_augment_count=augmentation.rand_augment_count,
            rand_augment_magnitude=augmentation.rand_augment_magnitude,
            rand_augment_std=augmentation.rand_augment_std,
            three_augment=augmentation.three_augment,
            color_jitter=augmentation.color_jitter,
        )
        transforms = [(step, make_transform(image_size=size)) for step, size in self._train_sizes]
        return batching.make_train_batches(
            self.train_source,
            transforms[0][1],
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            rows=rows,
            workers=config.data.workers,
            repeats=augmentation.repeats,
            later_transforms=transforms[1:],
        )

    @property
    def _train_sizes(self) -> list[tuple[int, int]]:
        """(first step, from 0, side in pixels) of each part of the run."""
        config, sizes = self.config, self.config.data.train_sizes or (self.config.data.image_size,)
        steps = count_steps(config, examples=len(self.train_source))
        return [(steps * part // len(sizes), size) for part, size in enumerate(sizes)]

    def example_indices(self, step: int) -> list[int]:
        """See ``Task``."""
        config = self.config
        order = dict(seed=config.seed, batch_size=config.batch_size, repeats=config.augmentation.repeats)
        return batching.example_indices(len(self.train_source), step=step, **order)

    def make_eval_batches(self, source: Source, *, rows: list[int]) -> Iterator[dict]:
        """See ``Task``. Any examples can share a batch, so each process takes its own part of the source."""
        del rows
        return batching.make_eval_batches(
            source,
            self._eval_transform(),
            batch_size=self.config.eval.batch_size // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.data.workers,
        )

    def example_batch(self, size: int, *, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
        """See ``Task``. For training, with the largest images."""
        data = self.config.data
        return self._example_batch(size, max(data.train_sizes, default=data.image_size) if train else data.image_size)

    def train_examples(self, size: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """See ``Task``."""
        return [self._example_batch(size, side) for side in sorted({side for _, side in self._train_sizes})]

    def _example_batch(self, size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
        data = self.config.data
        return {
            "image": jax.ShapeDtypeStruct((size, side, side, data.channels), data.dtype),
            "label": jax.ShapeDtypeStruct((size,), "int32"),
        }

    def describe_images(self) -> str:
        """See ``Task``."""
        data = self.config.data
        image_format = ImageFormat(data.channels, data.dtype)
        described = "" if image_format == RGB else f", {image_format}"
        crops = f"crops of {data.image_size} x {data.image_size} pixels{described}"
        if not data.train_sizes:
            return crops
        sizes = ", ".join(f"{side} x {side} from step {step + 1}" for step, side in self._train_sizes)
        return f"{crops}, in training {sizes}"

    def make_objective(self, **backbone: Any) -> Objective:
        """See ``Task``."""
        settings = self.config.model.to_dict() | backbone
        dtype = compute_dtype(settings.pop("dtype"))
        augmentation, data = self.config.augmentation, self.config.data
        derived: dict[str, Any] = dict(num_classes=len(self.class_names), in_channels=data.channels)
        return make_classification_objective(
            create_model(settings.pop("name"), dtype=dtype, **derived, **settings),
            label_smoothing=self.config.loss.label_smoothing,
            loss_kind=self.config.loss.kind,
            erasing_probability=augmentation.erasing_probability,
            mixup_alpha=augmentation.mixup_alpha,
            cutmix_alpha=augmentation.cutmix_alpha,
            distillation=self.config.distillation.to_dict(),
            mesa=self.config.mesa.to_dict(),
            mean=data.mean,
            std=data.std,
        )

    def make_evaluator(self, predict: Callable) -> Evaluator:
        """See ``Task`` and ``evaluation.classification``."""
        return evaluation.make_evaluator(predict)

    def save_figures(self, predict: Callable, variables: Any, directory: pathlib.Path) -> None:
        """See ``Task``. The examples are spread over the source, since some sources are sorted by class."""
        source, transform = self.eval_source, self._eval_transform()
        records = [transform(record) for record in read_spread_examples(source, _FIGURE_EXAMPLES)]
        order = np.random.default_rng(0).permutation(len(records))
        batch = {key: np.stack([records[index][key] for index in order]) for key in ("image", "label")}
        evaluation.save_figures(predict, variables, batch, class_names=source.class_names, directory=directory)

    def _eval_transform(self):
        return make_eval_transform(resize=self.config.data.eval_resize, image_size=self.config.data.image_size)


TASK = ClassificationTask
