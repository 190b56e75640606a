"""Compile time of training steps, with and without loops over blocks, cold and from the cache.

python -m experiments.compile_time.benchmark [--configs=quickstart,dat_pp_t] [--topologies=cpu,v5e:1x1] [--batch=8]

Every compilation runs in its own process.

- "cold" compiles and fills a persistent cache. "warm" reads the program from that cache. Neither includes tracing and lowering,
  which run both times.
- For a TPU, which is not attached, only the compiler runs (`pip install libtpu`), without a cache.
"""

import importlib.util
import pathlib
import tempfile
from typing import Any

from experiments import measure


def measure_compilation(
    *, config: str, topology: str, scan_blocks: bool, batch: int, cache: str | None = None
) -> dict[str, Any]:
    """Compile in this process: {"lower_seconds", "compile_seconds", "temporary_bytes", "peak_bytes", "code_bytes"}."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    from dat_jax.config import load_config
    from dat_jax.ops.dispatch import compiling_for
    from dat_jax.profiling.topologies import find_devices
    from dat_jax.training.monitoring.throughput import peak_host_memory
    from experiments import steps

    if cache:
        measure.use_cache(cache)
    chip, devices = find_devices(topology)
    settings = load_config(config).unlock()
    settings.batch_size = settings.eval.batch_size = batch
    settings.model.scan_blocks = scan_blocks
    with compiling_for(chip.platform):
        function, arguments = steps.make_step(settings, "train", devices=devices)
        compiled, report = steps.compile_step(function, arguments)
    return {
        **report,
        "peak_bytes": peak_host_memory(),
        "code_bytes": compiled.memory_analysis().generated_code_size_in_bytes,
    }


def run_case(config: str, topology: str, scan_blocks: bool, batch: int) -> dict[str, Any]:
    """Result of the cold compilation, with "warm_seconds" and "cached_bytes" on a CPU; or {"failed": reason}."""
    target = "experiments.compile_time.benchmark:measure_compilation"
    arguments = dict(config=config, topology=topology, scan_blocks=scan_blocks, batch=batch)
    if topology != "cpu":
        return measure.run_fresh(target, **arguments)
    with tempfile.TemporaryDirectory() as cache:
        cold = measure.run_fresh(target, cache=cache, **arguments)
        if "failed" in cold:
            return cold
        size = sum(path.stat().st_size for path in pathlib.Path(cache).rglob("*") if path.is_file())
        warm = measure.run_fresh(target, cache=cache, **arguments)
    if "failed" in warm:
        return warm
    return {**cold, "warm_seconds": warm["compile_seconds"], "cached_bytes": size}


def format_row(config: str, topology: str, scan_blocks: bool, result: dict[str, Any]) -> dict[str, str]:
    """Row of the table."""
    row = {"configuration": config, "for": topology, "scan_blocks": str(scan_blocks)}
    columns = (
        *("traced and lowered, s", "compiled, cold, s", "warm, s", "in the cache, MB"),
        *("step's temporaries, GiB", "peak of the compiling process, GiB"),
    )
    if "failed" in result:
        return row | dict.fromkeys(columns, "-") | {columns[0]: result["failed"]}
    values = (
        f"{result['lower_seconds']:.1f}",
        f"{result['compile_seconds']:.1f}",
        f"{result['warm_seconds']:.1f}" if "warm_seconds" in result else "-",
        f"{result['cached_bytes'] / 1e6:.1f}" if "cached_bytes" in result else "-",
        measure.format_gib(result["temporary_bytes"]),
        measure.format_gib(result["peak_bytes"]),
    )
    return row | dict(zip(columns, values, strict=True))


def parse(arguments: list[str] | None = None):
    """Parse the options. The default topologies are those whose compiler is installed."""
    parser = measure.make_parser(__file__, __doc__, repeats=1, min_seconds=0.0)
    default = ["cpu", "v5e:1x1"] if importlib.util.find_spec("libtpu") else ["cpu"]
    parser.add_argument(
        "--configs",
        type=measure.words,
        default=["quickstart", "dat_pp_t"],
        help="names of configurations",
    )
    parser.add_argument("--topologies", type=measure.words, default=default, help="see dat_jax.compile_report")
    parser.add_argument("--batch", type=int, default=8)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compile the selected configurations and write the results."""
    options = parse(arguments)
    product, rows, bars = [measure.time_matrix_product()], [], {}
    for config in options.configs:
        for topology in options.topologies:
            for scan_blocks in (False, True):
                result = run_case(config, topology, scan_blocks, options.batch)
                rows.append(format_row(config, topology, scan_blocks, result))
                print(rows[-1], flush=True)
                name = f"{topology}, {'loops' if scan_blocks else 'every block'}"
                for key, label in (("compile_seconds", "cold"), ("warm_seconds", "warm")):
                    if key in result:
                        bars.setdefault(config, {})[f"{name}, {label}"] = result[key]
    product.append(measure.time_matrix_product())
    notes = f"Batch {options.batch}. {measure.describe_machine(product_seconds=product)}"
    sections = {"": "\n\n".join((notes, options.command, measure.format_table(rows)))}
    measure.write_results(options.output, title="Compile time of training steps", sections=sections)
    if bars:
        measure.save_bars(options.output / "results.png", bars, x_label="s")


if __name__ == "__main__":
    main()
