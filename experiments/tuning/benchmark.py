"""Implementations of the ops of a model, as `dat-jax tune` compares them.

python -m experiments.tuning.benchmark [--parts=differences,bytes] [--model=dat_pp_t] [--batch_size=64]

The parts are:

- **differences**: on the CPU, with interpreted kernels, two images: the largest difference from the plain implementation in
  float32, of a result or gradient, relative to the largest value of that array. The tolerances of `dat_jax/tuning/candidates.py`
  come from this table.
- **bytes**: `dat-jax tune` for one v5e chip that is not attached (`pip install libtpu`): what each implementation of each call
  reads and writes in device memory, by the compiler, in GB. These are not times, and nothing was executed.
"""

import argparse
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from experiments import measure

PARTS = ("differences", "bytes")
_IMAGES = 2


def load_config(model: str, batch_size: int) -> Any:
    """The configuration of a model with one device's batch."""
    from dat_jax import config as configuration

    config = configuration.load_config(model)
    config.batch_size, config.accumulate_steps, config.compilation_cache = batch_size, 1, ""
    return config


def list_calls(model: str, dtype: str) -> dict[str, Any]:
    """The calls of ops in a training step of two images on one device."""
    import jax

    from dat_jax.profiling.step_report import make_sources
    from dat_jax.training.trainer import Trainer

    config = load_config(model, _IMAGES)
    config.eval.batch_size, config.model.dtype = _IMAGES, dtype
    sources = make_sources(config, classes=None, examples=1000)
    return Trainer(config, devices=jax.devices()[:1], sources=sources).list_op_calls("train")


def measure_differences(model: str) -> list[dict[str, str]]:
    """A row for each op and implementation."""
    from dat_jax.ops.dispatch import interpreted_kernels
    from dat_jax.tuning import measurement
    from dat_jax.tuning.candidates import list_candidates

    largest: dict[tuple[str, str], dict[str, float]] = {}
    for dtype in ("float32", "bfloat16"):
        for call in list_calls(model, dtype).values():
            with interpreted_kernels():
                measured = measurement.measure(call, list_candidates(call))
            for name, value in measured.items():
                row = largest.setdefault((call.op, name), {})
                row[dtype] = max(row.get(dtype, 0.0), float("nan") if value.error is None else value.error)
    return [
        {"op": op, "implementation": name, **{dtype: f"{error:.1e}" for dtype, error in row.items()}}
        for (op, name), row in sorted(largest.items())
    ]


def count_bytes(model: str, batch_size: int) -> list[dict[str, str]]:
    """A row for each call, with the bytes of each implementation."""
    from dat_jax.tuning.command import tune_run

    config = load_config(model, batch_size)
    config.eval.batch_size = batch_size
    rows = []
    for key, choice in tune_run(config, topology="v5e:1x1").items():
        costs = {
            name: "-" if value.bytes is None else f"{value.bytes / 1e9:.3f}" for name, value in choice.measured.items()
        }
        text = ", ".join(
            f"**{name} {cost}**" if name == choice.chosen else f"{name} {cost}" for name, cost in costs.items()
        )
        rows.append({"call": f"`{key}`", "GB, least in bold": text})
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser("python -m experiments.tuning.benchmark")
    parser.add_argument("--parts", type=measure.words, default=list(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--model", default="dat_pp_t", help="a configuration")
    parser.add_argument("--batch_size", type=int, default=64, help="images, for the part bytes")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the results"
    )
    options = parser.parse_args(arguments)
    if not set(options.parts) <= set(PARTS):
        parser.error(f"--parts: choose from {', '.join(PARTS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts and write the tables."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    options = parse(arguments)
    flags = [f"--parts={','.join(options.parts)}", f"--model={options.model}", f"--batch_size={options.batch_size}"]
    command = shlex.join(("python", "-m", "experiments.tuning.benchmark", *flags))
    sections = {"": f"`{command}`\n\n{__doc__.strip().split(chr(10) * 2, 2)[2]}"}
    if "differences" in options.parts:
        sections["differences"] = measure.format_table(measure_differences(options.model))
    if "bytes" in options.parts:
        sections["bytes"] = measure.format_table(count_bytes(options.model, options.batch_size))
    measure.write_results(options.output, title="Implementations of ops", sections=sections)


if __name__ == "__main__":
    main()
