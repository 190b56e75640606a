"""Shared helpers of the benchmarks: timing, fresh processes, tables, plots and a description of the machine."""

import argparse
import importlib
import itertools
import json
import os
import pathlib
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
_RESULT = "result of the fresh process: "


_SETTLE_SECONDS = 0.2  # pause in which the system reclaims the memory of the previous call


def time_interleaved(calls: Mapping[str, Callable[[], Any]], *, repeats: int, min_seconds: float) -> dict[str, float]:
    """Median over rounds of the seconds per call.

    Every round measures all calls in random order. Each measurement follows a pause and the same number of calls that are not
    timed. Other load on the machine then affects all calls, and no call always follows the same other call, whose effect on
    caches and free memory it would measure. (Neighborhood attention took 34 ms instead of 20 whenever it followed a call that
    had freed 1 GB.)

    Args:
      calls: name -> function that starts a computation and returns its arrays. Each has been called before.
      repeats: Number of rounds.
      min_seconds: Minimum duration of one measurement, which repeats the call accordingly.
    """
    import jax

    def run(call, times):
        start = time.perf_counter()
        for _ in range(times):
            out = call()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / times

    times = {name: max(1, round(min_seconds / max(run(call, 1), 1e-6))) for name, call in calls.items()}
    seconds, random = {name: [] for name in calls}, Random(0)
    for _ in range(repeats):
        for name, call in random.sample(list(calls.items()), len(calls)):
            time.sleep(_SETTLE_SECONDS)
            run(call, times[name])
            seconds[name].append(run(call, times[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_matrix_product() -> float:
    """Seconds for the product of two 1024 x 1024 float32 matrices, as a check of the machine's current speed."""
    import jax
    import jax.numpy as jnp

    x = jnp.full((1024, 1024), 1 / 1024, jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    jax.block_until_ready(product(x))
    return time_interleaved({"product": lambda: product(x)}, repeats=9, min_seconds=0.05)["product"]


def describe_machine(*, product_seconds: Sequence[float]) -> str:
    """Sentences with the versions, the device, and the time of the matrix product before and after a measurement."""
    import jax
    import jaxlib
    import numpy

    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{os.cpu_count()} CPU cores ({_processor()})"
    before, after = (f"{1e3 * product_seconds[index]:.1f} ms" for index in (0, -1))
    return (
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, numpy {numpy.__version__}, Python "
        f"{platform.python_version()}, on {kind}. A product of two 1024 x 1024 float32 matrices, as a check of the machine's "
        f"speed, took {before} before and {after} after the measurement."
    )


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# Fresh processes


def run_fresh(target: str, **arguments) -> dict[str, Any]:
    """Call a function in a new process.

    Args:
      target: "package.module:function". The function returns a dict that JSON can represent.
      **arguments: Its arguments, which JSON can represent.

    Returns:
      The function's result, or {"failed": reason} if the process ended before it returned.
    """
    command = [sys.executable, "-m", "experiments.measure", target, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_RESULT):
            return json.loads(line.removeprefix(_RESULT))
    if done.returncode < 0:
        return {"failed": f"ended by {signal.Signals(-done.returncode).name}"}  # SIGKILL: usually out of memory
    return {"failed": (done.stderr.strip().splitlines() or ["without a message"])[-1][:300]}


def compile_then_run(target: str, **arguments) -> dict[str, Any]:
    """Call a function in two new processes, so that the second reads the programs that the first compiled.

    The compiler's memory would otherwise hide that of the program. The function takes ``cache``, a directory for
    ``use_cache``, and ``repeats``. In the first process ``repeats`` is 0, and the function runs the program once, to measure
    the peak memory.

    Returns:
      The second result, with "compile_seconds" of the first, and "whole_peak_bytes" of the first as "compiling_peak_bytes"; or
      {"failed": reason}.
    """
    with tempfile.TemporaryDirectory() as cache:
        first = run_fresh(target, cache=cache, **{**arguments, "repeats": 0})
        second = first if "failed" in first else run_fresh(target, cache=cache, **arguments)
    if "failed" in second:
        return second
    return {
        **second,
        "compile_seconds": first["compile_seconds"],
        "compiling_peak_bytes": first["whole_peak_bytes"],
    }


def use_cache(directory: str) -> None:
    """Cache all compiled programs in a directory. Call this before the first compilation."""
    import jax

    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _serve() -> None:
    """Entry point of the new process."""
    target, arguments = sys.argv[1:]
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(_RESULT + json.dumps(result), flush=True)


# Tables and plots


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table with the columns of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_number(value: float | None) -> str:
    """At least three significant digits, without an exponent; "-" for None."""
    if value is None:
        return "-"
    decimals = next((d for limit, d in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if abs(value) >= limit), 4)
    return f"{value:,.{decimals}f}"


def format_gib(size: float | None) -> str:
    """Bytes in GiB."""
    return "-" if size is None else f"{size / 2**30:.{2 if size > 2**27 else 3}f}"


def write_results(directory: pathlib.Path, *, title: str, sections: Mapping[str, str], name: str = "results") -> None:
    """Write and print ``name``.md with a title and sections by heading ("" for no heading)."""
    parts = [f"# {title}"]
    for head, text in sections.items():
        parts += [f"## {head}", text] if head else [text]
    text = "\n\n".join(parts) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text)
    print(text, flush=True)


def save_lines(
    path: pathlib.Path, panels: Mapping[str, Mapping[str, Mapping[float, float]]], *, x_label: str, y_label: str
) -> None:
    """Plot panels, title -> line -> {x: y}, with logarithmic axes, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    markers = "osd^vx*P"
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for (name, points), marker in zip(lines.items(), itertools.cycle(markers), strict=False):
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), marker=marker, markersize=4, label=name)
        ticks = sorted({x for points in lines.values() for x in points})
        axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def save_bars(
    path: pathlib.Path, panels: Mapping[str, Mapping[str, float]], *, x_label: str, log: bool = False
) -> None:
    """Plot panels of horizontal bars, title -> name -> length, as a PNG file."""
    import numpy as np
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(4.6 * columns, rows * (0.7 + 0.15 * longest)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (title, bars) in zip(grid, panels.items(), strict=False):
        axes.barh(list(bars), list(bars.values()), color="C0")
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        if log:
            axes.set_xlim(
                10 ** np.floor(np.log10(min(bars.values())))
            )  # start at a power of ten, to leave room for ticks
        axes.set(title=title, xlabel=x_label, xscale="log" if log else "linear")
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=80)


# Arguments of all benchmarks


class _Parser(argparse.ArgumentParser):
    """Parser that records the command without its ``--output``."""

    def parse_args(self, args=None, namespace=None):
        options = super().parse_args(args, namespace)
        output_parser = argparse.ArgumentParser(add_help=False)
        output_parser.add_argument("--output")
        _, others = output_parser.parse_known_args(args)
        options.command = f"`{shlex.join(('python', '-m', self.name, *others))}`\n\n{self.explanation}"
        return options


def make_parser(module: str, description: str, *, repeats: int, min_seconds: float) -> argparse.ArgumentParser:
    """Parser with --output, --repeats and --min-seconds. Its options have ``command``, text for the head of the results.

    Args:
      module: File of the benchmark. By default, results are written to its folder.
      description: Docstring of the benchmark: a title, the usage, and an explanation in Markdown.
      repeats: Default of --repeats.
      min_seconds: Default of --min-seconds.
    """
    path = pathlib.Path(module)
    parser = _Parser(description=description.strip().partition("\n")[0])
    parser.name = f"{path.parents[1].name}.{path.parent.name}.{path.stem}"
    parser.explanation = description.strip().split("\n\n", 2)[2]
    parser.add_argument("--output", type=pathlib.Path, default=path.parent, help="folder for the results")
    parser.add_argument("--repeats", type=int, default=repeats, help="number of measurements; results are their median")
    parser.add_argument("--min-seconds", type=float, default=min_seconds, help="minimum duration of one measurement")
    return parser


def words(text: str) -> list[str]:
    """Split a comma-separated argument into words."""
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    """Split a comma-separated argument into integers."""
    return [int(word) for word in words(text)]


if __name__ == "__main__":
    _serve()
