"""The tasks by name."""

from typing import Any

from ml_collections import ConfigDict

from dat_jax.tasks.classification.task import ClassificationTask
from dat_jax.tasks.detection.task import DetectionTask
from dat_jax.tasks.segmentation.task import SegmentationTask
from dat_jax.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (ClassificationTask, SegmentationTask, DetectionTask)}


def make_task(config: ConfigDict, *, sources: tuple[Any, Any] | None = None) -> Task:
    """Make the task that ``config.task`` names.

    Args:
      config: a validated configuration.
      sources: training and validation data; by default those that ``config.data`` names.

    Raises:
      UserError: the data cannot be read.
    """
    return TASKS[config.task](config, sources=sources)
