"""Time of every implementation of every op, forward and gradient: python -m experiments.ops.benchmark

At the stage shapes of dat_pp_tiny at 224, batch 8, float32; medians. One process, nothing beside it.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dat_jax.ops.depthwise import depthwise_conv
from dat_jax.ops.grid_sample import grid_sample
from dat_jax.ops.neighborhood_attention import neighborhood_attention
from dat_jax.ops.position_bias import table_position_bias

BATCH, REPEATS = 8, 5
STAGES = ((56, 64, 2, 1), (28, 128, 4, 2), (14, 256, 8, 4))  # side, channels, heads, groups; 7 x 7 keys


def milliseconds(function, *arguments) -> float:
    """Median time of a compiled call."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def cases():
    """(op and shape, implementation, function of arrays, the arrays), of what is differentiated."""
    for side, channels, heads, groups in STAGES:
        shape = (side, side)
        x = jax.random.normal(jax.random.key(0), (BATCH, *shape, channels))
        points = jax.random.uniform(jax.random.key(1), (BATCH, groups, 49, 2), maxval=side - 1)
        table = jax.random.normal(jax.random.key(2), (heads, 2 * side - 1, 2 * side - 1))
        window = jax.random.normal(jax.random.key(3), (heads, 13, 13))
        hidden = jax.random.normal(jax.random.key(4), (BATCH, *shape, 4 * channels))
        kernel = jax.random.normal(jax.random.key(5), (3, 3, 1, 4 * channels))
        for name in ("gather", "slice", "matmul"):
            yield (
                f"position bias, {side} x {side}, {heads} heads",
                name,
                lambda t, p, n=name, s=shape: table_position_bias(t, p, map_shape=s, implementation=n),
                (table, points),
            )
        for name in ("gather", "matmul"):
            yield (
                f"sampling, {side} x {side} x {channels}",
                name,
                lambda x, p, n=name: grid_sample(x, p, implementation=n),
                (x, points),
            )
        for name in ("gather", "tiles", "dense") if side < 56 else ("gather", "tiles"):
            yield (
                f"neighborhood, {side} x {side} x {channels}",
                name,
                lambda x, t, n=name, m=heads: neighborhood_attention(
                    x, x, x, t, kernel_size=7, num_heads=m, implementation=n
                ),
                (x, window),
            )
        for name in ("conv", "shifts"):
            yield (
                f"depthwise 3 x 3, {side} x {side} x {4 * channels}",
                name,
                lambda x, k, n=name: depthwise_conv(x, k, padding=1, implementation=n),
                (hidden, kernel),
            )


def main():
    """Prints the table."""
    device = jax.devices()[0].device_kind
    table = Table("op", "implementation", "forward, ms", "gradient, ms", title=f"jax {jax.__version__}, {device}")
    for op, name, function, arrays in cases():
        forward = milliseconds(function, *arrays)
        both = milliseconds(jax.grad(lambda *a, f=function: jnp.sum(f(*a) ** 2), argnums=(0, 1)), *arrays)
        table.add_row(op, name, f"{forward:.1f}", f"{both:.1f}")
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
