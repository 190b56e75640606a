"""Cost of larger images and batches: the backbone, the training step, and single attention modules.

JAX_PLATFORMS=cpu python -m experiments.scaling.benchmark [--parts=images,batches,modules,large,chip] [--model=dat_pp_tiny] ...

The parts are:

- **batches**: features of the backbone and a training step, for several batch sizes at 224 x 224.
- **images**: the same for one square image of several sizes.
- **modules**: the attention of an N and of a D block of every stage. The slope is that of log(seconds) against log(pixels)
  between one map and the next; 1 is linear. At a fixed stride, the keys of a D block grow with the pixels as its queries do, so
  its products grow with the square.
- **large**: one 800 x 1333 image, as in detection, with the scores of deformable attention in tiles of rows and over the whole
  map.
- **chip**: compiler estimates for the forward and backward pass of the backbone in bfloat16, on a chip that is not attached
  (`pip install libtpu`).

Except for "chip", programs are compiled in one process and run in another that reads them. "resident before" is the memory of
the second process before the first run: Python, jax, the program, weights and images. "peak while it runs" adds the memory of
the program. "peak with compiling" is that of the first process.
"""

import functools
import math
from typing import Any

from experiments import measure

PARTS = ("images", "batches", "modules", "large", "chip")
LARGE = (800, 1333)


def measure_features(
    *,
    variant: str,
    batch: int,
    height: int,
    width: int,
    whole_map: bool,
    cache: str,
    repeats: int,
    min_seconds: float,
    max_gib: float,
) -> dict[str, Any]:
    """Measure the four feature maps of a backbone like ``steps.measure_step``, for ``measure.compile_then_run``.

    With ``whole_map``, scores of deformable attention are never split into tiles.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dat_jax
    from dat_jax.ops import dispatch
    from experiments import steps

    measure.use_cache(cache)
    if whole_map:
        dispatch.MAX_PAIRS = 2**62
    model, rng = dat_jax.create_model(variant), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
    function = jax.jit(lambda variables, images: model.apply(variables, images, method="features"))
    compiled, report = steps.compile_step(function, (shapes, images))
    if report["temporary_bytes"] > max_gib * 2**30:
        return {"failed": f"not run: {report['temporary_bytes'] / 2**30:.1f} GiB of temporaries"}
    arguments = jax.tree.map(
        lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32)), (shapes, images)
    )
    call = functools.partial(compiled, *arguments)
    return report | steps.run_and_measure(call, repeats=repeats, min_seconds=min_seconds)


def compile_features(
    *, variant: str, batch: int, height: int, width: int, whole_map: bool, topology: str, model: dict[str, Any]
) -> dict[str, Any]:
    """Compile the gradient of a backbone in bfloat16 for a chip that is not attached, in this process.

    The gradient is that of the product of the four feature maps with fixed arrays, with respect to all weights.

    Returns:
      The report of ``steps.compile_step``, and "peak_bytes".
    """
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    import dat_jax
    from dat_jax.ops import dispatch
    from dat_jax.profiling.topologies import find_devices
    from experiments import steps

    if whole_map:
        dispatch.MAX_PAIRS = 2**62
    chip, devices = find_devices(topology)
    network = dat_jax.create_model(variant, dtype=jnp.bfloat16, **model)
    place = jax.sharding.SingleDeviceSharding(devices[0])

    def on_chip(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    def gradient(variables, images, weights):
        maps, backward = jax.vjp(lambda variables: network.apply(variables, images, method="features"), variables)
        return maps, backward(weights)

    with dispatch.compiling_for(chip.platform):
        variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.bfloat16)
        maps = jax.eval_shape(lambda *arguments: network.apply(*arguments, method="features"), variables, images)
        arguments = on_chip((variables, images, maps))
        compiled, report = steps.compile_step(jax.jit(gradient, out_shardings=place), arguments)
    return report | {"peak_bytes": compiled.memory_analysis().peak_memory_in_bytes}


def measure_modules(*, variant: str, stage: int, sides: list[int], repeats: int, min_seconds: float) -> dict[str, Any]:
    """Measure the attention of an N and of a D block of a stage in this process, on the maps of images of several sizes.

    Returns:
      {"rows": [kind, map side, keys per query, seconds, temporary bytes]}.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dat_jax
    from dat_jax.models import attention
    from dat_jax.ops.attention.deformable import key_grid_shape

    model, rng = dat_jax.create_model(variant), np.random.default_rng(0)
    heads, channels, window = model.num_heads[stage], model.dims[stage], model.neighborhood_sizes[stage]
    table_image = (model.image_size,) * 2 if isinstance(model.image_size, int) else model.image_size
    modules = {
        "N": attention.NeighborhoodAttention(heads, window),
        "D": attention.DeformableAttention(
            num_heads=heads,
            num_groups=model.num_groups[stage],
            key_stride=model.key_strides[stage],
            offset_kernel=model.offset_kernels[stage],
            offset_range_factor=model.offset_range_factors[stage],
            position_bias=model.position_bias[stage],
            use_offsets=model.use_offsets[stage],
            table_shape=model.map_shape(table_image, stage=stage),
        ),
    }
    calls, sizes = {}, {}
    for image_side in sides:
        side = model.map_shape((image_side, image_side), stage=stage)[0]
        x = jnp.asarray(rng.standard_normal((1, side, side, channels), np.float32))
        grid = key_grid_shape((side, side), kernel_size=model.offset_kernels[stage], stride=model.key_strides[stage])
        for kind, module in modules.items():
            shapes = jax.eval_shape(module.init, jax.random.key(0), x)
            variables = jax.tree.map(
                lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32)),
                {"params": shapes["params"]},
            )
            compiled = jax.jit(module.apply).lower(variables, x).compile()
            jax.block_until_ready(compiled(variables, x))
            calls[kind, side] = functools.partial(compiled, variables, x)
            keys = math.prod(grid) if kind == "D" else window**2
            sizes[kind, side] = keys, compiled.memory_analysis().temp_size_in_bytes
    seconds = measure.time_interleaved(calls, repeats=repeats, min_seconds=min_seconds)
    return {"rows": [[*name, keys, seconds[name], size] for name, (keys, size) in sorted(sizes.items())]}


def slope(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Slope of log(y) against log(x) between two points (x, y)."""
    return math.log(after[1] / before[1]) / math.log(after[0] / before[0])


def format_step(row: dict[str, str], result: dict[str, Any], *, batch: int = 1) -> dict[str, str]:
    """Row of a table of steps: ``row`` identifies it, and the results are added."""
    columns = (
        *("s", "images/s", "temporaries, GiB", "resident before, GiB", "peak while it runs, GiB"),
        *("peak with compiling, GiB", "compiled, s"),
    )
    if "failed" in result:
        return row | dict.fromkeys(columns, "-") | {"s": result["failed"]}
    values = (
        *(measure.format_number(result["seconds"]), measure.format_number(batch / result["seconds"])),
        *(measure.format_gib(result[f"{name}_bytes"]) for name in ("temporary", "resident", "peak", "compiling_peak")),
        f"{result['compile_seconds']:.1f}",
    )
    return row | dict(zip(columns, values, strict=True))


def _measure_steps(options, name: str, *, sizes, train_sizes, arguments_of) -> tuple[list[dict], dict]:
    """Rows for features and training steps, and their lines size -> seconds.

    ``arguments_of`` maps a size to (batch, image side).
    """
    rows, lines = [], {"features": {}, "training step": {}}
    timing = dict(repeats=options.repeats, min_seconds=options.min_seconds, max_gib=options.max_gib)
    for kind, of_kind in (("features", sizes), ("training step", train_sizes)):
        for size in of_kind:
            batch, side = arguments_of(size)
            arguments = dict(variant=options.model, batch=batch, **timing)
            if kind == "features":
                target = "experiments.scaling.benchmark:measure_features"
                arguments |= dict(height=side, width=side, whole_map=False)
            else:
                target = "experiments.steps:measure_step"
                arguments |= dict(step="train", image_side=side, model=dict(remat=options.remat))
            result = measure.compile_then_run(target, **arguments)
            rows.append(format_step({name: str(size), "program": kind}, result, batch=batch))
            print(rows[-1], flush=True)
            if "seconds" in result:
                lines[kind][size] = result["seconds"]
    return rows, lines


def run_images(options) -> tuple[str, dict]:
    """Table, and panels of a plot."""
    rows, lines = _measure_steps(
        options,
        "image side",
        sizes=options.sides,
        train_sizes=options.train_sides,
        arguments_of=lambda side: (1, side),
    )
    return measure.format_table(rows), {"one image: s by its side": lines}


def run_batches(options) -> tuple[str, dict]:
    """Table, and panels of a plot."""
    rows, lines = _measure_steps(
        options,
        "batch",
        sizes=options.batches,
        train_sizes=options.train_batches,
        arguments_of=lambda batch: (batch, options.batch_side),
    )
    return measure.format_table(rows), {f"{options.batch_side} x {options.batch_side}: s by batch": lines}


def run_modules(options) -> tuple[str, dict]:
    """Table, and panels of a plot."""
    import dat_jax

    rows, lines = [], {}
    for stage in range(len(dat_jax.create_model(options.model).dims)):
        timing = dict(repeats=options.repeats, min_seconds=min(options.min_seconds, 0.1))
        arguments = dict(variant=options.model, stage=stage, sides=options.module_sides, **timing)
        result = measure.run_fresh("experiments.scaling.benchmark:measure_modules", **arguments)
        if "failed" in result:
            rows.append({"stage": str(stage), "block": result["failed"]})
            continue
        previous = None
        for kind, side, keys, seconds, temporaries in result["rows"]:
            point = (side**2, seconds)
            same = previous is not None and previous[0] == kind
            rows.append(
                {
                    "stage": str(stage),
                    "block": kind,
                    "queries": f"{side} x {side}",
                    "keys per query": str(keys),
                    "ms": measure.format_number(1e3 * seconds),
                    "slope from the last": f"{slope(previous[1], point):.2f}" if same else "",
                    "temporaries, MB": f"{temporaries / 1e6:.1f}",
                }
            )
            previous = kind, point
            lines.setdefault(f"{kind}, stage {stage}", {})[side] = seconds
        print(f"modules of stage {stage}", flush=True)
    return measure.format_table(rows), {"attention modules: s by side of the map": lines}


def run_large(options) -> tuple[str, dict]:
    """Table, without a plot."""
    rows = []
    for name, whole_map in (("in tiles", False), ("over the whole map", True)):
        result = measure.compile_then_run(
            "experiments.scaling.benchmark:measure_features",
            variant=options.model,
            batch=1,
            height=options.large[0],
            width=options.large[1],
            whole_map=whole_map,
            repeats=options.repeats,
            min_seconds=options.min_seconds,
            max_gib=options.max_gib,
        )
        rows.append(format_step({f"scores, {options.large[0]} x {options.large[1]}": name}, result))
        print(rows[-1], flush=True)
    return measure.format_table(rows), {}


def run_chip(options) -> tuple[str, dict]:
    """Table, without a plot."""
    rows = []
    for (height, width), whole_map in (
        (tuple(side // 2 for side in options.chip_image), False),
        (options.chip_image, False),
        (options.chip_image, True),
    ):
        result = measure.run_fresh(
            "experiments.scaling.benchmark:compile_features",
            variant=options.model,
            batch=options.chip_batch,
            height=height,
            width=width,
            whole_map=whole_map,
            topology=options.topology,
            model=dict(remat=options.chip_remat, scan_blocks=True),
        )
        row = {
            f"{options.topology}, batch {options.chip_batch}, remat={options.chip_remat}": f"{height} x {width}",
            "scores": "over the whole map" if whole_map else "in tiles",
        }
        columns = ("temporaries, GiB", "peak, GiB", "compiled, s")
        if "failed" in result:
            rows.append(row | dict.fromkeys(columns, "-") | {columns[0]: result["failed"]})
        else:
            sizes = (measure.format_gib(result[f"{name}_bytes"]) for name in ("temporary", "peak"))
            rows.append(row | dict(zip(columns, (*sizes, f"{result['compile_seconds']:.0f}"), strict=True)))
        print(rows[-1], flush=True)
    return measure.format_table(rows), {}


def parse(arguments: list[str] | None = None):
    """Parse the options."""
    parser = measure.make_parser(__file__, __doc__, repeats=5, min_seconds=0.3)
    parser.add_argument("--parts", type=measure.words, default=list(PARTS))
    parser.add_argument("--model", default="dat_pp_tiny")
    parser.add_argument("--remat", default="none", help="remat of the training steps")
    parser.add_argument("--sides", type=measure.numbers, default=[224, 448, 672, 896, 1120, 1344])
    parser.add_argument("--train-sides", type=measure.numbers, default=[224, 448, 672, 896])
    parser.add_argument("--batches", type=measure.numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--train-batches", type=measure.numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--batch-side", type=int, default=224, help="image side for the batches")
    parser.add_argument(
        "--module-sides", type=measure.numbers, default=[224, 448, 896], help="image sides for the modules"
    )
    parser.add_argument("--large", type=measure.numbers, default=list(LARGE), help="height,width of the large image")
    parser.add_argument(
        "--chip-image", type=measure.numbers, default=[800, 1344], help="height,width; half of both is also compiled"
    )
    parser.add_argument("--chip-batch", type=int, default=2)
    parser.add_argument("--chip-remat", default="blocks")
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--max-gib", type=float, default=12.0, help="skip steps with more temporaries")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure the selected parts and write the results."""
    options = parse(arguments)
    product = [measure.time_matrix_product()]
    sections, panels = {"": ""}, {}
    for part in options.parts:
        runner = {
            "images": run_images,
            "batches": run_batches,
            "modules": run_modules,
            "large": run_large,
            "chip": run_chip,
        }[part]
        sections[part], more = runner(options)
        panels |= more
    product.append(measure.time_matrix_product())
    sections[""] = (
        f"{options.model}, float32, training with remat={options.remat}. {measure.describe_machine(product_seconds=product)}"
        f"\n\n{options.command}"
    )
    measure.write_results(options.output, title="Size of images and batches", sections=sections)
    if panels:
        measure.save_lines(options.output / "results.png", panels, x_label="", y_label="s")


if __name__ == "__main__":
    main()
