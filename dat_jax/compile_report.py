"""Compiles a configuration's steps for a TPU or GPU that is not there, and says what the compiler says.

python -m dat_jax.compile_report --config=FILE --topology=v5e:2x2|v6e:2x2|v5p:2x2x1|h100 [--config.KEY=VALUE ...]

What the training step takes on one chip; the largest batch of a GPU; where the bytes of an evaluation come from:

  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:1x1 --steps=train --config.batch_size=64
  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=h100 --find_batch
  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:2x2 --steps=eval --top=20

Needs the compiler: `pip install libtpu` for a TPU, `pip install "jax[cuda12]"` for a GPU. No data set is read.
"""

import json
import pathlib
from collections import Counter

from absl import flags
from rich.console import Console
from rich.table import Table

from dat_jax.cli.console import format_size, make_console
from dat_jax.cli.flags import fail, run_tool
from dat_jax.config import validate
from dat_jax.config.files import define_config_flag
from dat_jax.errors import UserError
from dat_jax.storage import atomic_write_text


def write_json(path: str | pathlib.Path, report: dict) -> None:
    """Write a report as JSON, atomically.

    Raises:
      UserError: it cannot be written.
    """
    try:
        atomic_write_text(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}.") from error


def print_report(console: Console, report: dict) -> None:
    """The tables, a column for each step."""
    chips = f"{report['chips']} x {report['device']}"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    console.print(f"{report['model']}, {report['images']}, {report['dtype']}, for {chips}")
    console.print(f"Compiled with {versions}. Every number is for one chip and one step.")
    columns = {step: _column(found) for step, found in report["steps"].items()}
    style = {} if console.is_terminal else {"box": None}
    table = Table(report["topology"], *columns, **style)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        table.add_row(name, *(column.get(name, "-") for column in columns.values()))
    console.print(table, soft_wrap=False)
    for step, found in report["steps"].items():
        if "message" in found:
            console.print(f"{step} does not fit: {found['message']}")
        if "unread" in found:
            console.print(f"{step}: the compiled text cannot be read, so collectives are not known: {found['unread']}")
        for kind, rows in found.get("top", {}).items():
            table = Table(f"{step}, by {kind}", "ops", "GB", "GB padded", "GB in HBM", **style)
            for row in rows:
                sizes = (f"{row[key] / 1e9:.3f}" for key in ("bytes", "padded_bytes", "hbm_bytes"))
                table.add_row(row["name"], f"{row['ops']:,}", *sizes)
            console.print(table, soft_wrap=False)
    console.print(_NOTES, style="dim")


_NOTES = (
    "Peak: arguments, results that do not take the place of arguments, temporaries and code, all at once. FLOPs and bytes "
    "accessed are the compiler's: a loop's body counts once, tiles with their padding, and arrays on the chip as well as "
    "those in its HBM. FLOPs of products are those of the traced program. Operands and results are read from the compiled "
    "text, whole but for slices; both count as often as loops run. Collectives, gathers and scatters "
    "in a loop count once; a dynamic slice is neither."
)
_COSTS = {
    "flops": "FLOPs",
    "product_flops": "FLOPs of products",
    "bytes_accessed": "bytes accessed",
    "bytes": "operands and results",
    "padded_bytes": "the same, padded",
    "hbm_bytes": "those in HBM",
}


def _column(found: dict) -> dict[str, str]:
    """Row -> value."""
    memory, batch = found["memory"], found["batch_size_per_chip"]
    rows = {"batch of a chip; of all": f"{batch}; {found['batch_size']}"}
    rows |= {key.replace("_", " "): format_size(size) for key, size in memory.items() if size is not None}
    if memory["available"] is not None:
        rows["fits"] = "yes" if found["fits"] else "no"
    if cost := found.get("cost"):
        untiled = len({cost[key] for key in ("bytes", "padded_bytes", "hbm_bytes")}) == 1
        for key, name in _COSTS.items():
            if cost[key] is not None and not (untiled and key in ("padded_bytes", "hbm_bytes")):
                rows[f"{name}, G; an image"] = f"{cost[key] / 1e9:,.2f}; {cost[key] / batch / 1e9:.3f}"
    if roofline := found.get("roofline"):
        rows["at peak FLOP/s, ms"] = f"{1e3 * roofline['compute_seconds']:.2f}"
        rows["at memory bandwidth, ms"] = f"{1e3 * roofline['memory_seconds']:.2f}"
        rows["likewise, what is in HBM, ms"] = f"{1e3 * roofline['hbm_seconds']:.2f}"
        rows["what binds"] = f"{roofline['binds']}, {roofline['images_per_second']:,.0f} images/s at most"
    if "collectives" in found:
        rows["collectives"] = "\n".join(
            f"{kind} {row['count']}, {row['bytes'] / 1e6:.1f} MB"
            + f", {row['in_loops']} in loops" * (row["in_loops"] > 0)
            for kind, row in found["collectives"].items()
        )
        for kind in ("gather", "scatter"):
            row = found[kind]
            rows[f"{kind}s"] = f"{row['count']}" + f", largest {row['largest']}" * (row["count"] > 0)
        runs = sorted(Counter(found["loops"]).items(), key=lambda run: run[0] or 0)
        rows["loops"] = ", ".join(f"{loops} x {times or 'unknown'} times" for times, loops in runs)
    rows["traced and lowered, s"] = f"{found['lower_seconds']:.1f}"
    rows["compiled, s"] = f"{found['compile_seconds']:.1f}"
    return {name: value or "none" for name, value in rows.items()}


def define_flags(values: flags.FlagValues) -> None:
    """Only where this is the program: dat_jax.main has a flag of the same name."""
    own = {"flag_values": values}
    define_config_flag(values)
    help_text = "What to compile for: v5e:2x2, v6e:2x2, v5p:2x2x1 and other sizes, h100, cpu."
    flags.DEFINE_string("topology", None, help_text, **own)
    flags.DEFINE_list("steps", ["train", "eval"], "Which steps, of train and eval.", **own)
    flags.DEFINE_string("json", None, "A file for the report as JSON.", **own)
    help_text = "Searches the largest batch a chip that fits; each try is a compilation."
    flags.DEFINE_bool("find_batch", False, help_text, **own)
    flags.DEFINE_alias("find-batch", "find_batch", flag_values=values)
    help_text = "Rows of tables of where bytes come from, by op and by module."
    flags.DEFINE_integer("top", 0, help_text, lower_bound=0, **own)
    help_text = "Of the data set, where config.data.directory names one: 1,000, or 150 to segment, unless given."
    flags.DEFINE_integer("classes", None, help_text, lower_bound=1, **own)
    flags.DEFINE_integer("examples", 1_281_167, "Of the data set, likewise.", lower_bound=1, **own)
    help_text = "The file that describes a GPU to its compiler; an H100's unless given."
    flags.DEFINE_string("target_config", None, help_text, **own)


_FLAGS = {
    "What is compiled, and what for": ("config=CONFIG", "topology=NAME", "steps=train,eval", "find_batch"),
    "What is said": ("json=FILE", "top=ROWS"),
    "What is not read": ("classes=N", "examples=N", "target_config=FILE"),
}


def main(_):
    """One call, and its mistakes as one sentence."""
    values = flags.FLAGS
    if values.config is None or not values.topology:
        fail("Expected --config=CONFIG --topology=NAME, such as --config=dat_pp_t --topology=v5e:2x2.")
    import jax  # late, as it takes long

    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    jax.config.update("jax_enable_compilation_cache", False)  # the time of compilation is told, not of finding
    console = make_console()
    try:
        report = _make_report(values, console)
        print_report(console, report)  # first: it may have taken minutes
        if values.json:
            write_json(values.json, report)
    except UserError as error:
        fail(str(error))


def _make_report(values: flags.FlagValues, console: Console) -> dict:
    from dat_jax.profiling import step_report
    from dat_jax.profiling.topologies import TARGET_CONFIG, find_devices
    from dat_jax.tasks.registry import get_task_class

    if not values.steps or not set(values.steps) <= set(step_report.STEPS):
        choices = ", ".join(step_report.STEPS)
        raise UserError(f"--steps wants some of {choices}, got {','.join(values.steps) or 'none'}.")
    validate(values.config)
    target_config = values.target_config or TARGET_CONFIG
    find_devices(values.topology, target_config=target_config)  # its mistakes before data are read
    classes = values.classes or get_task_class(values.config.task).published_classes
    sources = step_report.make_sources(values.config, classes=classes, examples=values.examples)
    options = dict(topology=values.topology, sources=sources, target_config=target_config, top=values.top)
    if not values.find_batch:
        return step_report.compile_report(values.config, steps=values.steps, **options)
    find = step_report.find_batch
    reports = [find(values.config, step, note=console.print, **options) for step in values.steps]
    return {**reports[0], "steps": {step: found for report in reports for step, found in report["steps"].items()}}


if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_flags)
