"""summary.md: what a run was, what came of it, and how to go on, as Markdown in the work directory."""

import math
import pathlib
import platform
import shlex
import statistics
from collections.abc import Mapping

import flax
import jax

from dat_jax.storage import atomic_write_text

SUMMARY = "summary.md"
_PICTURES = ("curves.png", "predictions.png", "segmentations.png", "detections.png", "sampled_points.png")
_MEMORY = {"train/device_memory_gib": "of a device", "train/host_memory_gib": "of a process"}

Series = Mapping[str, Mapping[int, float]]


def list_commands(task: str, workdir: str, *, command_flags: str) -> dict[str, str]:
    """What is done with a run next: purpose -> command.

    Args:
      task: ``config.task``.
      workdir: of the run.
      command_flags: the flags that say the configuration.
    """
    directory = shlex.quote(str(workdir))
    run = f"python -m dat_jax.main {command_flags} --workdir={directory}"
    commands = {"To go on where it ended": run, "To evaluate it": f"{run} --mode=eval"}
    drawn = "" if task == "classification" else " --output=DIR"
    commands["To look at images"] = f"python -m dat_jax.predict {directory} IMAGE...{drawn}"
    commands["To see what it sees"] = f"python -m dat_jax.visualize {directory} IMAGE... --output=DIR"
    commands["With published names"] = f"python -m dat_jax.conversion {directory} OUT.safetensors"
    return commands


def measure(series: Series, *, seconds: float | None) -> dict[str, str]:
    """Rows: time, rate and memory, as far as they are known.

    Args:
      series: of ``metrics.read_metrics``.
      seconds: that the last call took, or None.
    """
    rows = {}
    if seconds is not None:
        minutes, rest = divmod(round(seconds), 60)
        rows["wall time of the last call"] = f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    if rates := series.get("train/images_per_second"):
        rows["images/s, median"] = f"{statistics.median(rates.values()):,.1f}"
    for name, whose in _MEMORY.items():
        if values := series.get(name):
            rows[f"peak memory {whose}"] = f"{max(values.values()):.2f} GiB"
    return rows


def list_results(series: Series, *, metric: str) -> list[tuple[str, str, str]]:
    """(metric, value at the best evaluation, value at the last), each with its step; the best one is by ``metric``.

    Training's values have no best evaluation: theirs is "".
    """
    scores = {step: value for step, value in series.get(f"eval/{metric}", {}).items() if math.isfinite(value)}
    best = max(scores, key=lambda step: (scores[step], step), default=None)
    rows = []
    for name, values in series.items():
        if name.startswith("eval/") or name in ("train/loss", "train/learning_rate"):
            last = max(values)
            chosen = _show(values[best], best) if name.startswith("eval/") and best in values else ""
            rows.append((name, chosen, _show(values[last], last)))
    return sorted(rows, key=lambda row: (row[0] != f"eval/{metric}", row[0]))


def format_summary(
    *,
    name: str,
    described: Mapping[str, str],
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    ended: str | None,
    series: Series,
    metric: str,
    seconds: float | None,
    pictures: list[str],
    commands: Mapping[str, str],
) -> str:
    """The Markdown.

    Args:
      name: of the run.
      described: rows of ``run.describe`` and others.
      step, total_steps, steps_per_epoch: how far it is.
      ended: what ended it before its last step, or None.
      series, metric, seconds: see ``measure`` and ``list_results``.
      pictures: files beside the summary.
      commands: of ``list_commands``.
    """
    whole = f"All {total_steps} steps are done."
    state = f"Unfinished: ended by {ended} at step {step} of {total_steps}." if ended else whole
    epochs = (
        f"{step} of {total_steps} steps, {step / steps_per_epoch:.4g} of {total_steps / steps_per_epoch:.4g} epochs"
    )
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
    rows = {**described, "done": epochs, **measure(series, seconds=seconds), "versions": versions}
    lines = [f"# {name}", "", state, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_escape(value)} |" for key, value in rows.items()]
    lines += ["", "## Metrics", "", f"| | best {metric} (step) | last (step) |", "|---|---|---|"]
    lines += [f"| {key} | {best} | {last} |" for key, best, last in list_results(series, metric=metric)]
    if pictures:
        lines += ["", "## Pictures", "", *(f"![{pathlib.Path(file).stem}]({file})" for file in pictures)]
    lines += ["", "## How to go on", ""]
    for purpose, command in commands.items():
        lines += [f"{purpose}:", "", f"    {command}", ""]
    return "\n".join(lines).rstrip() + "\n"


def write_summary(directory: pathlib.Path, text: str) -> pathlib.Path:
    """Write summary.md atomically and return its path. Raises an OSError if it cannot be written."""
    path = directory / SUMMARY
    atomic_write_text(path, text)
    return path


def find_pictures(directory: pathlib.Path) -> list[str]:
    """Those of a run that are there, by name."""
    return [name for name in _PICTURES if (directory / name).is_file()]


def _show(value: float, step: int) -> str:
    return f"{value:,} ({step})" if isinstance(value, int) else f"{value:.4g} ({step})"


def _escape(value: str) -> str:
    return value.replace("|", "\\|")
