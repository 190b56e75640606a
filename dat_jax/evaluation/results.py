"""The result of an evaluation, and its files: metrics of each class, and a confusion matrix."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dat_jax.storage import atomic_write_text
from dat_jax.visualization import charts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: metrics over the data set, metrics of each class, and a confusion matrix.

    Attributes:
      metrics: name -> value, over the whole data set.
      per_class: name -> values of the K classes, (K,); NaN where a metric is undefined, such as the accuracy of a class without
        examples.
      confusion: number of examples of each class (rows) that were predicted as each class (columns), int (K, K); None for tasks
        without one.
    """

    metrics: dict[str, float]
    per_class: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    confusion: np.ndarray | None = None


def save_class_results(
    evaluation: Evaluation, *, class_names: Sequence[str], directory: pathlib.Path, name: str = ""
) -> list[pathlib.Path]:
    """Save per_class.csv and, if there is a confusion matrix, confusion.csv and confusion.png.

    Args:
      evaluation: the result. Without metrics of classes nothing is written.
      class_names: names of the K classes.
      directory: folder of the files; made if missing.
      name: name of the data set, which is added to the names of the files ("per_class_NAME.csv"); "" for the validation data.

    Returns:
      The files.

    Raises:
      OSError: they cannot be written.
    """
    suffix = f"_{name}" if name else ""
    files = []
    if evaluation.per_class:
        files.append(directory / f"per_class{suffix}.csv")
        columns = [values.tolist() for values in evaluation.per_class.values()]
        rows = ([class_name, *map(_format, values)] for class_name, *values in zip(class_names, *columns, strict=True))
        _write_csv(files[-1], [["class", *evaluation.per_class], *rows])
    if evaluation.confusion is not None:
        files += [directory / f"confusion{suffix}.csv", directory / f"confusion{suffix}.png"]
        rows = ([class_name, *row] for class_name, row in zip(class_names, evaluation.confusion.tolist(), strict=True))
        _write_csv(files[-2], [["label / prediction", *class_names], *rows])
        charts.save_confusion(files[-1], evaluation.confusion, class_names=class_names)
    return files


def describe_worst_classes(evaluation: Evaluation, *, class_names: Sequence[str], count: int = 3) -> str:
    """Describe the classes with the lowest values of the first metric, as "dog (61.2), cat (70.4)"; "" if all are equal.

    Args:
      evaluation: the result.
      class_names: names of the K classes.
      count: number of classes.
    """
    values = next(iter(evaluation.per_class.values()), np.zeros(0))
    worst = [index for index in np.argsort(values, kind="stable") if np.isfinite(values[index])]
    if not worst or values[worst[0]] == values[worst[-1]]:
        return ""
    return ", ".join(f"{class_names[index]} ({values[index]:.4g})" for index in worst[:count])


def _format(value: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.0f}" if value == round(value) else f"{value:.4f}"


def _write_csv(path: pathlib.Path, rows) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text.getvalue())
