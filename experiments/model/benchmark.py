"""Evaluation and training steps of whole models: images/s, compile time, memory, and time per module.

JAX_PLATFORMS=cpu python -m experiments.model.benchmark [--models=dat_pp_tiny:1,8,16;dat_pp_small:1,8] [--remat=blocks] ...
JAX_PLATFORMS=cpu python -m experiments.model.benchmark --profile [--models=dat_pp_tiny:8]

- The steps are those of the package. "eval" computes the logits of a batch. "train" is forward, backward and AdamW, with mixing
  and erasing on the device.
- Each step is compiled in one process and run in another that reads the compiled program, because the compiler's memory would
  hide that of the step.
- "resident before" is the memory of the second process before the first step: Python, jax, the program, the state and a batch.
  "peak while it runs" adds the memory of the step. "peak with compiling" is that of the first process.
- With `--profile`, profile.md and profile.png are written instead of results.md and results.png.
"""

import pathlib
import tempfile
from collections import Counter
from typing import Any

from experiments import measure

STEPS = ("eval", "train")
DEFAULT_MODELS = "dat_pp_tiny:1,8,16;dat_pp_small:1,8"
PROFILED_STEPS = 3


def parse_models(text: str) -> dict[str, list[int]]:
    """NAME:BATCH,BATCH;NAME:... -> name -> batches."""
    pairs = (part.partition(":") for part in text.split(";") if part)
    return {name: measure.numbers(batches) for name, _, batches in pairs}


def format_row(variant: str, batch: int, step: str, result: dict[str, Any]) -> dict[str, str]:
    """Row of the table."""
    row = {"model": variant, "batch": str(batch), "step": step}
    columns = (
        *("s", "images/s", "traced and lowered, s", "compiled, s", "temporaries, GiB"),
        *("resident before, GiB", "peak while it runs, GiB", "peak with compiling, GiB"),
    )
    if "failed" in result:
        return row | dict.fromkeys(columns, "-") | {"s": result["failed"]}
    values = (
        *(measure.format_number(result["seconds"]), measure.format_number(batch / result["seconds"])),
        *(f"{result[name]:.1f}" for name in ("lower_seconds", "compile_seconds")),
        *(measure.format_gib(result[f"{name}_bytes"]) for name in ("temporary", "resident", "peak", "compiling_peak")),
    )
    return row | dict(zip(columns, values, strict=True))


def profile_step(*, variant: str, batch: int, step: str, image_side: int, model: dict[str, Any]) -> dict[str, Any]:
    """Profile in this process: {"places": [module, kind, direction, ms per step], "seconds": per step, "threads"}."""
    import os
    import time

    import jax
    import jax.numpy as jnp

    from dat_jax.models.registry import create_model
    from dat_jax.profiling import hlo
    from experiments import steps
    from experiments.model import trace

    config = steps.make_config(variant, batch=batch, image_side=image_side, **model)
    function, arguments = steps.make_step(config, step)
    compiled, _ = steps.compile_step(function, arguments)
    call = steps.make_call(compiled, step, steps.fill(arguments))
    for _ in range(2):
        jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            start = time.perf_counter()
            for _ in range(PROFILED_STEPS):
                jax.block_until_ready(call())
            seconds = (time.perf_counter() - start) / PROFILED_STEPS
        events = trace.read_events(pathlib.Path(directory))
    times = {name: ms / PROFILED_STEPS for name, ms in trace.self_times(events).items()}
    network = create_model(variant)
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    names = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(params) for key in path}
    places = trace.attribute(times, hlo.parse(compiled.as_text()), stages=network.stages, names=names)
    return {"places": [[*place, ms] for place, ms in places.items()], "seconds": seconds, "threads": os.cpu_count()}


def format_profile(
    result: dict[str, Any], column: int, *, rows: int = 30
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """Table of the largest entries by module (column 0) or kind of op (column 1), and its bars in ms."""
    forward, backward, total = Counter(), Counter(), Counter()
    for *place, milliseconds in result["places"]:
        (backward if place[2] == "backward" else forward)[place[column]] += milliseconds
        total[place[column]] += milliseconds
    whole = sum(total.values())
    head = ("module", "kind of op")[column]
    table = [
        {
            head: name,
            "forward, ms": f"{forward[name]:.1f}",
            "backward, ms": f"{backward[name]:.1f}",
            "share, %": f"{100 * milliseconds / whole:.1f}",
        }
        for name, milliseconds in total.most_common(rows)
    ]
    rest = whole - sum(milliseconds for _, milliseconds in total.most_common(rows))
    table.append({head: "the rest", "share, %": f"{100 * rest / whole:.1f}"})
    return table, dict(total.most_common(12))


def run_profile(options) -> None:
    """Write profile.md and profile.png."""
    product = [measure.time_matrix_product()]
    sections, bars = {"": ""}, {}
    for variant, batches in options.models.items():
        for batch in batches:
            for step in options.steps:
                arguments = dict(variant=variant, batch=batch, step=step, image_side=options.image_side)
                result = measure.run_fresh("experiments.model.benchmark:profile_step", **arguments, model=options.model)
                name = f"{variant}, batch {batch}, {step}"
                if "failed" in result:
                    sections[name] = result["failed"]
                    continue
                named = sum(place[-1] for place in result["places"]) / 1e3
                text = (
                    f"{result['seconds']:.3f} s per step while tracing, on {result['threads']} cores. Named ops account for "
                    f"{named:.3f} s of the threads' time. The rest is parallel parts of these ops on other threads, and waiting."
                )
                tables = [format_profile(result, column) for column in (0, 1)]
                sections[name] = "\n\n".join([text, *(measure.format_table(table) for table, _ in tables)])
                bars[name] = tables[0][1]
    product.append(measure.time_matrix_product())
    sections[""] = (
        f"Milliseconds per step of the ops named in a trace of {PROFILED_STEPS} steps, by the module they come from. "
        f"{options.described}{measure.describe_machine(product_seconds=product)}\n\n{options.command}"
    )
    measure.write_results(options.output, title="Time per module", sections=sections, name="profile")
    if bars:
        measure.save_bars(options.output / "profile.png", bars, x_label="ms per step")


def run_benchmark(options) -> None:
    """Write results.md and results.png."""
    product, rows, lines = [measure.time_matrix_product()], [], {step: {} for step in options.steps}
    for variant, batches in options.models.items():
        for step in options.steps:
            for batch in batches:
                result = measure.compile_then_run(
                    "experiments.steps:measure_step",
                    variant=variant,
                    batch=batch,
                    step=step,
                    image_side=options.image_side,
                    repeats=options.repeats,
                    min_seconds=options.min_seconds,
                    max_gib=options.max_gib,
                    model=options.model,
                )
                rows.append(format_row(variant, batch, step, result))
                print(rows[-1], flush=True)
                if "seconds" in result:
                    lines[step].setdefault(variant, {})[batch] = batch / result["seconds"]
    product.append(measure.time_matrix_product())
    notes = f"{options.described}{measure.describe_machine(product_seconds=product)}"
    sections = {"": "\n\n".join((notes, options.command, measure.format_table(rows)))}
    measure.write_results(options.output, title="Whole models", sections=sections)
    panels = {step: values for step, values in lines.items() if values}
    if panels:
        measure.save_lines(options.output / "results.png", panels, x_label="batch", y_label="images/s")


def parse(arguments: list[str] | None = None):
    """Parse the options. ``model`` has the attributes that are set on all models."""
    parser = measure.make_parser(__file__, __doc__, repeats=7, min_seconds=0.5)
    parser.add_argument("--models", type=parse_models, help=f"default: {DEFAULT_MODELS}; dat_pp_tiny:8 to profile")
    parser.add_argument("--steps", type=measure.words, default=list(STEPS))
    parser.add_argument("--image-side", type=int, default=224)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan-blocks", action="store_true")
    parser.add_argument("--max-gib", type=float, default=12.0, help="skip steps with more temporaries")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    options.models = options.models or parse_models("dat_pp_tiny:8" if options.profile else DEFAULT_MODELS)
    options.model = dict(remat=options.remat, scan_blocks=options.scan_blocks)
    options.described = (
        f"float32, images of {options.image_side} x {options.image_side}, remat={options.remat}, "
        f"scan_blocks={options.scan_blocks}. "
    )
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, or the profile with --profile."""
    options = parse(arguments)
    (run_profile if options.profile else run_benchmark)(options)


if __name__ == "__main__":
    main()
