"""Tasks by name."""

import importlib
from typing import Any

from ml_collections import ConfigDict

from dat_jax.tasks.task import Task


def get_task_class(name: str) -> type[Task]:
    """Return the class of a task: ``TASK`` of the module dat_jax.tasks.<name>.task.

    Only this task is imported, since tasks need different packages.

    Args:
      name: a value of ``config.task``, see ``dat_jax.config.TASKS``.
    """
    return importlib.import_module(f"dat_jax.tasks.{name}.task").TASK


def make_task(config: ConfigDict, *, sources: tuple[Any, Any] | None = None) -> Task:
    """Make the task that ``config.task`` names.

    Args:
      config: a validated configuration.
      sources: training and validation data; by default those that ``config.data`` names.

    Raises:
      UserError: the data cannot be read.
    """
    return get_task_class(config.task)(config, sources=sources)
