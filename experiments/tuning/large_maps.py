"""Gradients of ops on large maps, compiled for TPUs that are not attached: kernels, and what "auto" uses without a measurement.

python -m experiments.tuning.large_maps [--ops=neighborhood_attention,conv_mlp] [--topologies=v5e,v5p,v6e]

The value and all gradients of one call, two images, bfloat16 with float32 parameters, compiled with libtpu. Two numbers of bytes:
the compiler's count, which has each loop body once, and the sum of all operands and results, with the padding of tiles and with
loop bodies once per iteration. Both include arrays that the compiler keeps on the chip, which two small maps may be. These are
not times, and nothing was executed. "auto" is compiled for the first topology only. The tables of deformable attention
were made for maps of another size, as those of dat_pp_base_384 and of detectors are.
"""

import argparse
import functools
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import measure

IMAGES = 2
# (H, W, C, heads, groups, keys, side of the map that the table was made for): the first stage of dat_pp_base_384, and of a
# detector with dat_pp_tiny at 800 x 1344.
MAPS = ((96, 96, 128, 4, 2, 144, 56), (200, 336, 64, 2, 1, 1050, 56))
# Maps whose table was made for another size have other kernels of deformable attention, too: the other stages of
# dat_pp_base_384, and the second stage of UperNet with dat_pp_tiny at 512 x 512.
OTHER_TABLES = (
    (48, 48, 256, 8, 4, 144, 28),
    (24, 24, 512, 16, 8, 144, 14),
    (12, 12, 1024, 32, 16, 144, 7),
    (64, 64, 128, 4, 2, 256, 28),
)
TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
_COLUMNS = ("MB, compiler's count", "MB, operands and results", "temporary MiB", "s to compile")
OPS = ("neighborhood_attention", "deformable_attention", "conv_mlp", "grid_sample")


def make_calls(op: str, implementation: str, case: tuple[int, ...]) -> tuple[Callable[..., Any], list[tuple]]:
    """A function of arrays, and the shape and dtype of each array."""
    import jax.numpy as jnp

    from dat_jax.ops.attention.deformable import deformable_attention
    from dat_jax.ops.attention.grid_sample import grid_sample
    from dat_jax.ops.attention.neighborhood import neighborhood_attention
    from dat_jax.ops.layers.mlp import conv_mlp

    height, width, channels, heads, groups, keys, side = case
    half, full = jnp.bfloat16, jnp.float32
    options: dict[str, Any] = dict(implementation=implementation)
    feature_map = ((IMAGES, height, width, channels), half)
    points = ((IMAGES, groups, keys, 2), full)
    if op == "neighborhood_attention":
        packed = ((IMAGES, height, width, 3 * channels), half)

        def attend(packed, table):
            split = jnp.split(packed, 3, axis=-1)
            return neighborhood_attention(*split, table, kernel_size=7, num_heads=heads, **options)

        return attend, [packed, ((heads, 13, 13), full)]
    if op == "deformable_attention":
        sampled, table = ((IMAGES, keys, channels), half), ((heads, 2 * side - 1, 2 * side - 1), full)

        def attend(query, key, value, points, table):
            options.update(num_heads=heads, points_inside=True)
            return deformable_attention(query, key, value, points=points, table=table, **options)

        return attend, [feature_map, sampled, sampled, points, table]
    if op == "conv_mlp":
        hidden = 4 * channels
        shapes = (channels, hidden), (hidden,), (3, 3, 1, hidden), (hidden,), (hidden, channels), (channels,)
        return functools.partial(conv_mlp, **options), [feature_map, *((shape, full) for shape in shapes)]
    return functools.partial(grid_sample, **options), [feature_map, points]


def compile_gradient(function: Callable[..., Any], arrays: Sequence[tuple], topology: str) -> dict[str, str]:
    """Bytes, temporaries and seconds of compilation of the value and gradients of a function."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from dat_jax.ops import dispatch
    from dat_jax.profiling import hlo, topologies

    _, devices = topologies.find_devices(TOPOLOGIES[topology])
    where = SingleDeviceSharding(devices[0])
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in arrays]

    def loss(*arguments):
        out = function(*arguments).astype(jnp.float32)
        return (out * out).sum()

    start = time.perf_counter()
    try:
        with dispatch.compiling_for("tpu"):
            differentiated = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))
            compiled = jax.jit(differentiated).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"compiled": f"no: {topologies.first_line(error)[:80]}", **dict.fromkeys(_COLUMNS, "-")}
    by_opcode, _ = hlo.traffic(hlo.parse(compiled.as_text()))
    moved = sum(counts["padded_bytes"] for counts in by_opcode.values())
    cost: Any = compiled.cost_analysis()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    numbers = (
        f"{cost['bytes accessed'] / 1e6:,.0f}",
        f"{moved / 1e6:,.0f}",
        f"{temporary / 2**20:,.1f}",
        f"{time.perf_counter() - start:.0f}",
    )
    return {"compiled": "yes", **dict(zip(_COLUMNS, numbers, strict=True))}


def list_rows(ops: Sequence[str], chips: Sequence[str]) -> Iterator[dict[str, str]]:
    """A row for each op, map, implementation and topology."""
    for op in ops:
        for case in (*MAPS, *(OTHER_TABLES if op == "deformable_attention" else ())):
            for implementation in ("auto", "pallas"):
                for chip in chips[:1] if implementation == "auto" else chips:
                    function, arrays = make_calls(op, implementation, case)
                    what = {"op": op, "map": "x".join(map(str, case[:3])), "implementation": implementation}
                    row = {**what, "chip": chip, **compile_gradient(function, arrays, chip)}
                    print(row, flush=True)
                    yield row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser("python -m experiments.tuning.large_maps")
    parser.add_argument("--ops", type=measure.words, default=list(OPS), help="ops, separated by commas")
    parser.add_argument("--topologies", type=measure.words, default=list(TOPOLOGIES), help="chips, separated by commas")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the results"
    )
    options = parser.parse_args(arguments)
    for name, choices in (("ops", OPS), ("topologies", TOPOLOGIES)):
        if not set(getattr(options, name)) <= set(choices):
            parser.error(f"--{name}: choose from {', '.join(choices)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile everything and write the table."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    options = parse(arguments)
    flags = [f"--ops={','.join(options.ops)}", f"--topologies={','.join(options.topologies)}"]
    command = shlex.join(("python", "-m", "experiments.tuning.large_maps", *flags))
    rows = list(list_rows(options.ops, options.topologies))
    sections = {
        "": f"`{command}`\n\n{__doc__.strip().split(chr(10) * 2, 2)[2]}",
        "gradients": measure.format_table(rows),
    }
    measure.write_results(options.output, title="Ops on large maps", sections=sections, name="large_maps")


if __name__ == "__main__":
    main()
