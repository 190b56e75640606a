"""The backbone of dat_pp_tiny on one 800 x 1333 image, with deformable attention in tiles and over the whole map.

JAX_PLATFORMS=cpu python -m experiments.large_maps.benchmark

Prints seconds (median of three calls) and the compiler's temporary memory of both.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import dat_jax
from dat_jax.ops import dispatch


def measure(model, variables, images) -> tuple[float, float]:
    """Seconds of a forward pass to the four maps, and GiB of temporaries."""
    forward = jax.jit(lambda v, x: model.apply(v, x, method="features")).lower(variables, images).compile()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(forward(variables, images))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), forward.memory_analysis().temp_size_in_bytes / 2**30


def main() -> None:
    """Prints the table."""
    model, rng = dat_jax.create_model("dat_pp_tiny"), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = jax.tree.map(lambda s: jnp.asarray(0.05 * rng.normal(size=s.shape), jnp.float32), shapes)
    images = jnp.asarray(rng.normal(size=(1, 800, 1333, 3)), jnp.float32)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n\n| attention | s | temporaries, GiB |\n|---|---|---|"
    )
    limit = dispatch.MAX_PAIRS
    for name, pairs in (("in tiles", limit), ("over the whole map", 2**62)):
        dispatch.MAX_PAIRS = pairs
        print("| {} | {:.1f} | {:.2f} |".format(name, *measure(model, variables, images)), flush=True)


if __name__ == "__main__":
    main()
