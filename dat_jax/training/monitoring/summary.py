"""summary.md: settings, results and next commands of a run, as Markdown in the work directory."""

import math
import pathlib
import platform
import shlex
import statistics
from collections.abc import Mapping

import flax
import jax

from dat_jax.storage import atomic_write_text
from dat_jax.training.monitoring.throughput import format_duration
from dat_jax.training.monitoring.time_shares import ACTIVITIES

SUMMARY = "summary.md"
_FIGURES = (
    *("curves.png", "confusion.png", "predictions.png", "segmentations.png", "detections.png", "sampled_points.png"),
)
_MEMORY = {"train/device_memory_gib": "per device", "train/host_memory_gib": "per process"}

Series = Mapping[str, Mapping[int, float]]


def list_commands(workdir: str, *, command_flags: str) -> dict[str, str]:
    """List commands for the next things to do with a run: purpose -> command, resuming first.

    Args:
      workdir: the work directory.
      command_flags: command line flags of the configuration.
    """
    directory = shlex.quote(str(workdir))
    run = f"python -m dat_jax.main {command_flags} --workdir={directory}"
    return {
        "Resume the run, or extend it with a larger --config.epochs or --config.steps": run,
        "Evaluate the best checkpoint": f"python -m dat_jax.main --workdir={directory} --mode=eval",
        "Predict": f"python -m dat_jax.predict {directory} IMAGE...",
        "Visualize sampled points and attention": f"python -m dat_jax.visualize {directory} IMAGE... --output=figures",
        "Write the weights with their published names": f"python -m dat_jax.conversion {directory} OUT.safetensors",
    }


def measure(series: Series, *, seconds: float | None) -> dict[str, str]:
    """Rows of wall time, throughput and memory, as far as they are known.

    Args:
      series: metrics, see ``metrics.read_metrics``.
      seconds: duration of the last call, or None.
    """
    rows = {}
    if seconds is not None:
        minutes, rest = divmod(round(seconds), 60)
        rows["wall time of the last call"] = f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    if rates := series.get("train/images_per_second"):
        rows["images/s, median"] = f"{statistics.median(rates.values()):,.1f}"
    for name, unit in _MEMORY.items():
        if values := series.get(name):
            rows[f"peak memory {unit}"] = f"{max(values.values()):.2f} GiB"
    return rows


def list_results(series: Series, *, metric: str) -> list[tuple[str, str, str]]:
    """List (metric, value at the best evaluation, last value), values with their steps, the deciding ``metric`` first.

    Metrics of training have no best evaluation: theirs is "".
    """
    scores = {step: value for step, value in series.get(f"eval/{metric}", {}).items() if math.isfinite(value)}
    best = max(scores, key=lambda step: (scores[step], step), default=None)
    rows = []
    for name, values in series.items():
        if name.startswith("eval/") or name in ("train/loss", "train/learning_rate"):
            last = max(values)
            at_best = ""
            if name.startswith("eval/") and best is not None and best in values:
                at_best = _format_value(values[best], best)
            rows.append((name, at_best, _format_value(values[last], last)))
    return sorted(rows, key=lambda row: (row[0] != f"eval/{metric}", row[0]))


def format_summary(
    *,
    name: str,
    description: Mapping[str, str],
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    ended_by: str | None,
    series: Series,
    metric: str,
    seconds: float | None,
    activities: Mapping[str, float],
    figures: list[str],
    commands: Mapping[str, str],
) -> str:
    """Format the summary as Markdown.

    Args:
      name: name of the run.
      description: rows of the table at the start of the run.
      step: number of finished steps.
      total_steps, steps_per_epoch: number of steps of the whole run, and per epoch.
      ended_by: name of the signal that ended the run before its last step, or None.
      series, metric, seconds: see ``measure`` and ``list_results``.
      activities: seconds of each of ``time_shares.ACTIVITIES``, of all calls of the run.
      figures: names of image files beside the summary.
      commands: see ``list_commands``.
    """
    done = f"All {total_steps} steps are done."
    state = f"Unfinished: ended by {ended_by} at step {step} of {total_steps}." if ended_by else done
    epochs = (
        f"{step} of {total_steps} steps, {step / steps_per_epoch:.4g} of {total_steps / steps_per_epoch:.4g} epochs"
    )
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
    rows = {**description, "done": epochs, **measure(series, seconds=seconds), "versions": versions}
    lines = [f"# {name}", "", state, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_escape(value)} |" for key, value in rows.items()]
    lines += ["", "## Metrics", "", f"| | best {metric} (step) | last (step) |", "|---|---|---|"]
    lines += [f"| {key} | {best} | {last} |" for key, best, last in list_results(series, metric=metric)]
    lines += ["", "## Time of all calls", "", "| | | % |", "|---|---|---|"]
    total = sum(activities.values())
    for name, value in activities.items():
        if value > 0:
            lines.append(f"| {ACTIVITIES[name]} | {format_duration(value)} | {100 * value / total:.1f} |")
    if figures:
        lines += ["", "## Figures", "", *(f"![{pathlib.Path(file).stem}]({file})" for file in figures)]
    lines += ["", "## Next commands", ""]
    for purpose, command in commands.items():
        lines += [f"{purpose}:", "", f"    {command}", ""]
    return "\n".join(lines).rstrip() + "\n"


def write_summary(directory: pathlib.Path, text: str) -> pathlib.Path:
    """Write summary.md atomically and return its path. Raises an OSError if it cannot be written."""
    path = directory / SUMMARY
    atomic_write_text(path, text)
    return path


def find_figures(directory: pathlib.Path) -> list[str]:
    """Names of the figures of a run that exist in its work directory."""
    return [name for name in _FIGURES if (directory / name).is_file()]


def _format_value(value: float, step: int) -> str:
    return f"{value:,} ({step})" if isinstance(value, int) else f"{value:.4g} ({step})"


def _escape(value: str) -> str:
    return value.replace("|", "\\|")
