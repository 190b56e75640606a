"""The command ``python -m dat_jax.compile_report``: compile the steps of a configuration, print and write the report."""

import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table

from dat_jax.cli.console import configure_logging, format_size, make_console
from dat_jax.config.validation import validate
from dat_jax.errors import UserError
from dat_jax.profiling import evaluation_report, step_report
from dat_jax.profiling.topologies import TARGET_CONFIG, find_devices
from dat_jax.storage import atomic_path

_NOTES = """\
peak: arguments, outputs that do not reuse the memory of arguments, temporaries and code
FLOPs, bytes accessed: the compiler's estimates, which count each loop body once, with padding and on-chip memory
FLOPs of products: counted in the traced program, with all iterations of loops
operands and results: counted in the compiled program, with all iterations of loops; of slices the part that is taken or replaced
collectives, gathers, scatters: each counts once, also in a loop; a dynamic slice is neither a gather nor a scatter"""
_SLICE_NOTES = "between slices: bytes that one chip sends or receives, over the network of the data center for TPUs"
_COSTS = {
    "flops": "FLOPs",
    "product_flops": "FLOPs of products",
    "bytes_accessed": "bytes accessed",
    "bytes": "operands and results",
    "padded_bytes": "operands and results, padded",
    "hbm_bytes": "operands and results in HBM",
}


def report_steps(
    config: ConfigDict,
    *,
    topology: str,
    slices: int = 1,
    steps: Sequence[str],
    find_batch: bool = False,
    json_file: str | None = None,
    top: int = 0,
    classes: int | None = None,
    examples: int,
    target_config: str | None = None,
    choices_file: str | None = None,
) -> None:
    """Compile the steps of a configuration, print the report, and write it as JSON.

    It sets jax to the CPU platform and disables the compilation cache, for the whole process.

    Args:
      config: configuration of a run.
      topology, slices: see ``find_devices``.
      steps: one or more of ``step_report.STEPS``.
      find_batch: whether to find the largest batch size that fits, instead of using that of the configuration.
      json_file: file for the report, or None.
      top: number of rows in the tables of bytes by op and by module.
      classes: see ``step_report.make_sources``.
      examples: see ``step_report.make_sources``.
      target_config: file that describes the GPU to its compiler, by default that of an H100.
      choices_file: file of choices of implementations of ops, see ``tuning.choices``, or None.

    Raises:
      UserError: an argument or the configuration is impossible, compilation fails, or the file cannot be written.
    """
    _configure()
    report = _make_report(
        config,
        topology=topology,
        slices=slices,
        steps=steps,
        find_batch=find_batch,
        top=top,
        classes=classes,
        examples=examples,
        target_config=target_config or TARGET_CONFIG,
        choices_file=choices_file,
    )
    print_report(make_console(), report)  # before writing, which may fail after minutes of compilation
    if json_file:
        write_json(json_file, report)


def report_evaluation(
    config: ConfigDict, *, topology: str, json_file: str | None = None, target_config: str | None = None
) -> None:
    """Compile the network for the arrays of an evaluation, print a table of the programs, and write it as JSON.

    It changes the settings of jax as ``report_steps`` does.

    Args:
      config: configuration of a run, whose validation data are there.
      topology: see ``find_devices``.
      json_file: file for the report, or None.
      target_config: as for ``report_steps``.

    Raises:
      UserError: see ``evaluation_report.report_evaluation``, or the file cannot be written.
    """
    _configure()
    report = evaluation_report.report_evaluation(
        config, topology=topology, target_config=target_config or TARGET_CONFIG
    )
    console, programs = make_console(), report["programs"]
    table = Table("array", "images", "lowering, s", "compilation, s", box=HEAVY_HEAD if console.is_terminal else None)
    for program in programs:
        shape, seconds = "{} x {}".format(*program["shape"]), (program["lower_seconds"], program["compile_seconds"])
        table.add_row(shape, f"{program['images']:,}", *(f"{value:.1f}" for value in seconds))
    console.print(table, soft_wrap=False)
    console.print(
        f"Programs of {report['model']} for {report['device']}, batches of {report['batch_size']}: {len(programs)}, "
        f"{report['seconds']:.0f} s. With config.eval.buckets=exact: {report['sizes']:,}, about "
        f"{report['seconds'] / max(len(programs), 1) * report['sizes']:,.0f} s."
    )
    if json_file:
        write_json(json_file, report)


def _configure() -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    jax.config.update("jax_enable_compilation_cache", False)  # to avoid reporting the time of a cache hit
    configure_logging()


def _make_report(
    config, *, topology, slices, steps, find_batch, top, classes, examples, target_config, choices_file
) -> dict[str, Any]:
    if not steps or not set(steps) <= set(step_report.STEPS):
        choices = ", ".join(step_report.STEPS)
        raise UserError(f"--steps must be one or more of {choices}, got {','.join(steps) or 'none'}.")
    validate(config)
    find_devices(topology, slices=slices, target_config=target_config)  # reports errors before data are read
    sources = step_report.make_sources(config, classes=classes, examples=examples)
    options: dict[str, Any] = dict(
        topology=topology,
        slices=slices,
        sources=sources,
        target_config=target_config,
        top=top,
        choices_file=choices_file,
    )
    if not find_batch:
        return step_report.compile_report(config, steps=steps, **options)
    reports = [step_report.find_batch(config, step, **options) for step in steps]
    return {**reports[0], "steps": {step: part for report in reports for step, part in report["steps"].items()}}


def write_json(path: str | pathlib.Path, report: dict) -> None:
    """Write a report as JSON.

    Raises:
      UserError: the file cannot be written.
    """
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def print_report(console: Console, report: dict) -> None:
    """Print a report of ``step_report.compile_report`` as tables, with one column per step."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    slices = f" in {report['slices']} slices" if report["slices"] > 1 else ""
    console.print(
        f"{report['model']}, {report['images']}, {report['dtype']}, for {report['chips']} x {report['device']}{slices}"
    )
    console.print(f"Compiled with {versions}. Every number is per chip and per step.")
    columns = {step: _make_column(part) for step, part in report["steps"].items()}
    box = HEAVY_HEAD if console.is_terminal else None
    table = Table(report["topology"], *columns, box=box)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        table.add_row(name, *(column.get(name, "-") for column in columns.values()))
    console.print(table, soft_wrap=False)
    for step, part in report["steps"].items():
        if "message" in part:
            console.print(f"{step} does not fit: {part['message']}")
        if "unread" in part:
            console.print(f"{step}: the compiled program cannot be read, so collectives are unknown: {part['unread']}")
        for kind, rows in part.get("top", {}).items():
            table = Table(f"{step}, by {kind}", "ops", "GB", "GB padded", "GB in HBM", box=box)
            for row in rows:
                sizes = (f"{row[key] / 1e9:.3f}" for key in ("bytes", "padded_bytes", "hbm_bytes"))
                table.add_row(row["name"], f"{row['ops']:,}", *sizes)
            console.print(table, soft_wrap=False)
    console.print(_NOTES, style="dim")
    if report["slices"] > 1:
        console.print(_SLICE_NOTES, style="dim")


def _make_column(part: dict) -> dict[str, str]:
    """Rows of one step: name -> value."""
    memory, batch = part["memory"], part["batch_size_per_chip"]
    rows = {"batch size per chip; total": f"{batch}; {part['batch_size']}"}
    rows |= {key.replace("_", " "): format_size(size) for key, size in memory.items() if size is not None}
    if memory["available"] is not None:
        rows["fits"] = "yes" if part["fits"] else "no"
    if cost := part.get("cost"):
        untiled = len({cost[key] for key in ("bytes", "padded_bytes", "hbm_bytes")}) == 1
        for key, name in _COSTS.items():
            if cost[key] is not None and not (untiled and key in ("padded_bytes", "hbm_bytes")):
                rows[f"{name}, G; per image"] = f"{cost[key] / 1e9:,.2f}; {cost[key] / batch / 1e9:.3f}"
    if roofline := part.get("roofline"):
        rows["time at peak FLOP/s, ms"] = f"{1e3 * roofline['compute_seconds']:.2f}"
        rows["time at memory bandwidth, ms"] = f"{1e3 * roofline['memory_seconds']:.2f}"
        rows["time at memory bandwidth, HBM only, ms"] = f"{1e3 * roofline['hbm_seconds']:.2f}"
        rows["bottleneck"] = f"{roofline['binds']}, at most {roofline['images_per_second']:,.0f} images/s"
    if "collectives" in part:
        rows |= _make_program_rows(part)
    rows["tracing and lowering, s"] = f"{part['lower_seconds']:.1f}"
    rows["compilation, s"] = f"{part['compile_seconds']:.1f}"
    return {name: value or "none" for name, value in rows.items()}


def _make_program_rows(part: dict) -> dict[str, str]:
    """Rows that describe the ops of the compiled program."""
    inside, between = part["collectives"], part.get("collectives_between_slices")
    if between is None:
        rows = {"collectives": _list_collectives(inside)}
    else:
        executed = (row["executed_bytes"] for row in between.values())
        rows = {
            "collectives inside a slice": _list_collectives(inside),
            "collectives between slices": _list_collectives(between),
            "between slices, with all iterations": f"{sum(row['executions'] for row in between.values())}, "
            f"{sum(executed) / 1e6:.2f} MB",
        }
    for kind in ("gather", "scatter"):
        row = part[kind]
        rows[f"{kind}s"] = f"{row['count']}" + f", largest {row['largest']}" * (row["count"] > 0)
    by_trips = sorted(Counter(part["loops"]).items(), key=lambda item: item[0] or 0)
    rows["loops"] = ", ".join(f"{loops} x {trips or 'unknown'} iterations" for trips, loops in by_trips)
    return rows


def _list_collectives(table: dict[str, dict[str, int]]) -> str:
    """One line per kind."""
    return "\n".join(
        f"{kind} {row['count']}, {row['bytes'] / 1e6:.1f} MB" + f", {row['in_loops']} in loops" * (row["in_loops"] > 0)
        for kind, row in table.items()
    )
