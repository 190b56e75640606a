"""The interface of a task. The trainer, checkpoints, tools and reports know nothing else of it."""

import abc
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict

from dat_jax.data import batching
from dat_jax.data.buckets import Shape
from dat_jax.data.sources import describe_damage, report_damage
from dat_jax.evaluation.results import Evaluation
from dat_jax.storage import check_local
from dat_jax.tasks.objective import Objective

# Random-access data set: len(source), source[index] -> record (a dict of numpy arrays), source.class_names.
Source = Any
Evaluator = Callable[..., Evaluation]  # evaluate(variables, batches, *, classes=None)


def count_steps(config: ConfigDict, *, examples: int) -> int:
    """Number of optimizer steps of a run with this number of training examples."""
    return config.steps or config.epochs * (examples // config.batch_size)


class Task(abc.ABC):
    """Data, model, loss, prediction, evaluation and figures of one task, as a configuration describes them.

    A batch is a dict of arrays whose first axis is the batch. On the host it holds the rows of this process.

    Attributes:
      name: value of ``config.task`` that selects this task.
      metric: evaluation metric that decides which checkpoint is the best one; larger is better.
      published_classes: number of classes of the data set of the published models.
      config: the configuration.
      train_source, eval_source: training and validation data.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    published_classes: ClassVar[int]

    def __init__(self, config: ConfigDict, *, sources: tuple[Source, Source] | None = None):
        """Read the data sets that ``config.data`` names, unless ``sources`` (training, validation) are passed."""
        self.config = config
        if config.data.directory:
            check_local(config.data.directory, key="config.data.directory")
        self.train_source, self.eval_source = sources or self.load_sources()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return tuple(self.train_source.class_names)

    # Data

    @abc.abstractmethod
    def load_sources(self) -> tuple[Source, Source]:
        """Open the training and the validation data.

        Raises:
          UserError: they are missing, damaged or do not fit together.
        """

    def load_extra_eval_sets(self) -> Mapping[str, tuple[Source, Any]]:
        """Further evaluation sets: name -> (source, indices of the classes it has, or None for all)."""
        return {}

    @abc.abstractmethod
    def make_train_batches(self, *, start_step: int, rows: list[int]) -> Iterator[dict]:
        """Endless training batches on the host, each a pure function of the seed and the step.

        Args:
          start_step: number of finished steps.
          rows: indices, within the global batch of ``config.batch_size`` examples, of the examples of this process.
        """

    @abc.abstractmethod
    def make_eval_batches(self, source: Source, *, rows: list[int]) -> Iterator[dict]:
        """Batches on the host that hold every example of a source exactly once, padded and masked.

        Args:
          source: data to evaluate on.
          rows: as in ``make_train_batches``, within ``config.eval.batch_size`` examples.

        Besides the arrays of an example, batches hold "mask", 1 for examples that count, and "damaged_index", see
        ``data.batching.make_eval_batches``.
        """

    def example_indices(self, step: int) -> list[int]:
        """Indices into ``train_source`` of the examples of a step's global batch, in the order of ``make_train_batches``."""
        config = self.config
        return batching.example_indices(
            len(self.train_source), seed=config.seed, step=step, batch_size=config.batch_size
        )

    @staticmethod
    def describe_damage(source: Source, index: int) -> str | None:
        """Return why an example of a source cannot be read, or None if it can."""
        return describe_damage(source, index)

    @staticmethod
    def report_damage(source: Source) -> Source:
        """The source as evaluations read it: a damaged example is an error, and is not replaced by another one."""
        return report_damage(source)

    @abc.abstractmethod
    def example_batch(self, size: int, *, train: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch of ``size`` examples for training, or for prediction."""

    def train_examples(self, size: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """``example_batch`` of a training, for each shape of its images."""
        return [self.example_batch(size)]

    def eval_example(self, size: int, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
        """``example_batch`` of an evaluation, with images in arrays of (height, width), see ``count_eval_arrays``."""
        example = self.example_batch(size, train=False)
        example["image"] = jax.ShapeDtypeStruct((size, *shape, example["image"].shape[-1]), example["image"].dtype)
        if self.eval_buckets is not None:
            example["sizes"] = jax.ShapeDtypeStruct((size, 2), "int32")
        return example

    @property
    def eval_buckets(self) -> Sequence[Shape] | None:
        """Shapes of the arrays that evaluation images are put into; None if each image fills its array. See ``data.buckets``."""
        return None

    def count_eval_arrays(self, buckets: Sequence[Shape] | None) -> Mapping[Shape, int]:
        """Return the number of images for each shape of the arrays that the network gets in an evaluation.

        The network is compiled once for each shape.

        Args:
          buckets: those of the evaluation, or None for an array of the size of each image.
        """
        del buckets
        height, width = self.example_batch(1, train=False)["image"].shape[1:3]
        return {(height, width): len(self.eval_source)}

    @abc.abstractmethod
    def describe_images(self) -> str:
        """Sizes of training and evaluation images in words, for the console."""

    def check_data(self) -> None:  # noqa: B027 (most tasks have nothing to check)
        """Check the data before training, and log as warnings what is unlikely to be meant.

        Raises:
          UserError: there is nothing to learn from.
        """

    def description_files(self) -> Mapping[str, str]:
        """Files that describe the data for the work directory, beside the configuration and the class names: name -> text."""
        return {}

    # Model

    @abc.abstractmethod
    def make_objective(self, **backbone: Any) -> Objective:
        """Make the model with its loss and prediction.

        Args:
          **backbone: attributes of the backbone (``DAT``) that override those of ``config.model``.

        Raises:
          ValueError, TypeError: settings that do not fit together.
        """

    # Evaluation

    @abc.abstractmethod
    def make_evaluator(self, predict: Callable) -> Evaluator:
        """Make ``evaluate(variables, batches, *, classes=None) -> Evaluation`` from an ``Objective.predict``."""

    @abc.abstractmethod
    def save_figures(self, predict: Callable, variables: Any, directory: pathlib.Path) -> None:
        """Save figures of predictions for some validation examples.

        Raises:
          OSError: they cannot be written.
        """
