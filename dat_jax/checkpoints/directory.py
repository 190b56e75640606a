"""The directory of a run's checkpoints: one folder for each step, and set_aside/ for folders that cannot be used.

A complete checkpoint has state/ (arrays), meta/ (metadata and fingerprints), metrics/ if it was evaluated, and a manifest.
"""

import itertools
import json
import logging
import os
import pathlib
from typing import Any

import jax

from dat_jax.checkpoints.hub import resolve_address
from dat_jax.checkpoints.integrity import MANIFEST
from dat_jax.errors import UserError
from dat_jax.parallel import multihost
from dat_jax.storage import Path, as_path, exists, fetch, is_in_bucket, move, os_errors

logger = logging.getLogger(__name__)

SET_ASIDE = "set_aside"


def find_complete_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint, in ascending order."""
    items = ("state", "meta", MANIFEST)
    with os_errors(directory):
        paths = [path for path in _list_folder(directory) if path.name.isdigit()]
        complete = [path for path in paths if all((path / item).exists() for item in items)]
    return sorted(int(path.name) for path in complete if read_metrics(path) is not None)


def find_best_step(directory: Path, metric: str | None = None) -> int | None:
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


def read_metrics(path: Path) -> dict[str, float] | None:
    """Metrics of a checkpoint: {} if it was not evaluated, None if they are damaged."""
    try:
        with os_errors(path):
            if not (path / "metrics").exists():
                return {}
            metrics = json.loads((path / "metrics" / "metrics").read_text())
    except (OSError, ValueError):
        return None
    valid = isinstance(metrics, dict) and all(isinstance(value, int | float) for value in metrics.values())
    return metrics if valid else None


def read_meta(path: Path) -> dict[str, Any]:
    """Read what is stored with the state of a checkpoint: "metadata", "digests" (fingerprints), "metrics", and a "checksum".

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not JSON.
    """
    with os_errors(path):
        return json.loads((path / "meta" / "metadata").read_text())


def set_aside(path: Path) -> Path:
    """Move the folder of a checkpoint to ``SET_ASIDE``, without replacing what is there.

    All processes of a run must call it; the first one moves the folder.

    Returns:
      The new path.
    """
    directory = path.parent / SET_ASIDE
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    with os_errors(directory):
        target = next(directory / name for name in names if not (directory / name).exists())
    multihost.wait(f"target of {path.name}")
    if jax.process_index() == 0:
        with os_errors(directory):
            directory.mkdir(exist_ok=True)
        move(path, target)
    multihost.wait(f"{path.name} set aside")
    return target


def set_aside_incomplete(directory: Path) -> None:
    """Set aside interrupted saves, and folders of steps without a complete checkpoint, which Orbax would count as one.

    Each is logged as a warning. All processes of a run must call it.
    """
    complete = {str(step) for step in find_complete_steps(directory)}
    with os_errors(directory):
        paths = sorted(_list_folder(directory))
    for path in paths:
        step, _, suffix = path.name.partition(".")
        if step.isdigit() and (suffix or step not in complete):
            reason = "is an unfinished save" if suffix else "is not a complete checkpoint"
            logger.warning("%s %s and was moved to %s.", path, reason, set_aside(path))
    multihost.wait("checkpoints set aside")


def _list_folder(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def fetch_weights(path: str | os.PathLike) -> pathlib.Path:
    """Local path of trained weights: the path itself, or a copy of what is in a bucket or on the Hugging Face Hub.

    Of a work directory in a bucket, the best checkpoint and the files beside the checkpoints are copied, and of a repository on
    the Hub model.json, the manifest and the weights.

    Raises:
      UserError: there is nothing, it cannot be read, or the copy of a repository is damaged.
    """
    path = resolve_address(path)
    if not is_in_bucket(path):
        return pathlib.Path(path)
    directory = as_path(path)
    try:
        step = None if exists(directory / "model.json") else find_best_step(directory / "checkpoints")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if step is None:
        return fetch(path)
    return fetch(path, wanted=lambda name: "/" not in name or name.startswith(f"checkpoints/{step}/"))
