"""The directory of a run's checkpoints: one folder for each step, and set_aside/ for folders that cannot be used.

A complete checkpoint has state/ (arrays), meta/ (metadata and fingerprints), metrics/ if it was evaluated, and a manifest.
"""

import itertools
import json
import logging
import pathlib
from typing import Any

import jax

from dat_jax.checkpoints.integrity import MANIFEST
from dat_jax.parallel import multihost

logger = logging.getLogger(__name__)

SET_ASIDE = "set_aside"


def find_complete_steps(directory: pathlib.Path) -> list[int]:
    """Steps with a complete checkpoint, in ascending order."""
    items = ("state", "meta", MANIFEST)
    paths = [path for path in directory.glob("*") if path.name.isdigit()]
    complete = [path for path in paths if all((path / item).exists() for item in items)]
    return sorted(int(path.name) for path in complete if read_metrics(path) is not None)


def find_best_step(directory: pathlib.Path, metric: str | None = None) -> int | None:
    """Complete step with the best metric, the latest one of equals. If none was evaluated, it is the latest step.

    Args:
      directory: the directory of the checkpoints.
      metric: name of the metric; larger is better. By default the one that the checkpoints record, since a run records the
        metric of its task only.

    Returns:
      The step, or None if there is no complete checkpoint.
    """
    scores = {}
    steps = find_complete_steps(directory)
    for step in steps:
        metrics = read_metrics(directory / str(step)) or {}
        score = metrics.get(metric) if metric else next(iter(metrics.values()), None)
        if score is not None:
            scores[step] = score
    return max(scores, key=lambda step: (scores[step], step)) if scores else max(steps, default=None)


def read_metrics(path: pathlib.Path) -> dict[str, float] | None:
    """Metrics of a checkpoint: {} if it was not evaluated, None if they are damaged."""
    try:
        if not (path / "metrics").exists():
            return {}
        metrics = json.loads((path / "metrics" / "metrics").read_text())
    except (OSError, ValueError):
        return None
    valid = isinstance(metrics, dict) and all(isinstance(value, int | float) for value in metrics.values())
    return metrics if valid else None


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """Read what is stored with the state of a checkpoint: "metadata", "digests" (fingerprints), "metrics", and a "checksum".

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not JSON.
    """
    return json.loads((path / "meta" / "metadata").read_text())


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Move the folder of a checkpoint to ``SET_ASIDE``, without replacing what is there.

    All processes of a run must call it; the first one moves the folder.

    Returns:
      The new path.
    """
    directory = path.parent / SET_ASIDE
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    target = next(directory / name for name in names if not (directory / name).exists())
    multihost.wait(f"target of {path.name}")
    if jax.process_index() == 0:
        directory.mkdir(exist_ok=True)
        path.rename(target)
    multihost.wait(f"{path.name} set aside")
    return target


def set_aside_incomplete(directory: pathlib.Path) -> None:
    """Set aside interrupted saves, and folders of steps without a complete checkpoint, which Orbax would count as one.

    Each is logged as a warning. All processes of a run must call it.
    """
    complete = {str(step) for step in find_complete_steps(directory)}
    for path in sorted(directory.glob("*")):
        step, _, suffix = path.name.partition(".")
        if step.isdigit() and (suffix or step not in complete):
            reason = "is an unfinished save" if suffix else "is not a complete checkpoint"
            logger.warning("%s %s and was moved to %s.", path, reason, set_aside(path))
    multihost.wait("checkpoints set aside")
