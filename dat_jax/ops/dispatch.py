"""The one place that chooses between the exact algorithms of an op, by platform and size.

Every op with several algorithms takes ``implementation=``: the name of one of them, "auto" for the fastest known on this
platform, or "plain" for the obvious one that the others are tested against. "pallas" is the kernel for TPUs of the ops
that have one, and "auto" for the others and for maps that are too large for VMEM. No kernel has run on a device yet, so
that "auto" takes none.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = {
    "grid_sample": ("matmul", "gather", "map_coordinates", "pallas"),
    "position_bias": ("slice", "matmul", "gather", "map_coordinates"),
    "neighborhood_attention": ("rows", "tiles", "dense", "gather", "pallas"),
    "deformable_attention": ("products", "pallas"),
    "conv_mlp": ("products", "pallas"),
    "depthwise_conv": ("shifts", "conv"),
}
PLAIN = {
    "grid_sample": "map_coordinates",
    "position_bias": "gather",
    "neighborhood_attention": "gather",
    "deformable_attention": "products",
    "conv_mlp": "products",
    "depthwise_conv": "conv",
}

_KERNEL_PIXELS = 4096  # of the largest map that kernels take, an example of which lies in VMEM whole

_PLATFORM = contextvars.ContextVar("platform", default=None)


def target_platform() -> str:
    """What the program is compiled for: "cpu", "gpu" or "tpu". That of the default devices, unless ``compiling_for``."""
    return _PLATFORM.get() or jax.default_backend()


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of "auto", "float32" or "bfloat16"; auto is float32 on CPU, else bfloat16."""
    if name == "auto":
        name = "float32" if target_platform() == "cpu" else "bfloat16"
    return jnp.dtype(name)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced within is traced for another platform: "cpu", "gpu" or "tpu".

    jax keeps the trace of a function object, so the functions have to be made within too.
    """
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


_INTERPRET = contextvars.ContextVar("interpret", default=False)


def interprets_kernels() -> bool:
    """Whether Pallas kernels are run step by step by jax, on any platform."""
    return _INTERPRET.get()


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Kernels that are traced within are interpreted: slow, for tests on a machine without a TPU."""
    token = _INTERPRET.set(True)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


_BATCH_SPLIT = contextvars.ContextVar("batch_split", default=(None, ()))


def batch_split() -> tuple[Any, tuple[str, ...]]:
    """(mesh, its axes that split the batch), or (None, ()) on one device or unless ``split_batch`` says."""
    return _BATCH_SPLIT.get()


@contextlib.contextmanager
def split_batch(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> Iterator[None]:
    """Kernels that are traced within are run by each device on its own part of the batch.

    The partitioner does not know what a kernel does and would gather the batch for it. Batches have to be multiples of
    the product of the axes.
    """
    token = _BATCH_SPLIT.set((mesh, tuple(axes)) if mesh.size > 1 else (None, ()))
    try:
        yield
    finally:
        _BATCH_SPLIT.reset(token)


def choose(op: str, implementation: str, *, map_shape: tuple[int, int], table_fits: bool = False) -> str:
    """Name of the algorithm to run.

    Args:
      op: a key of ``IMPLEMENTATIONS``.
      implementation: "auto", "plain", "pallas" or an algorithm of the op.
      map_shape: (H, W) of the map that the op works on.
      table_fits: of "position_bias", whether the table was made for this map size.

    Raises:
      ValueError: the op has no such implementation.
    """
    if implementation == "pallas" and not ("pallas" in IMPLEMENTATIONS[op] and math.prod(map_shape) <= _KERNEL_PIXELS):
        implementation = "auto"
    if implementation == "auto":
        return _fastest(op, map_shape, table_fits)
    if implementation == "plain":
        return PLAIN[op]
    if implementation not in IMPLEMENTATIONS[op]:
        choices = ", ".join(("auto", "plain", *IMPLEMENTATIONS[op]))
        raise ValueError(f"{op} has no implementation {implementation!r}; choose one of {choices}.")
    return implementation


def _fastest(op, map_shape, table_fits):
    """On CPU by what was fastest there; products instead of gathers elsewhere, which has not been timed on a device yet."""
    cpu = target_platform() == "cpu"
    if op == "depthwise_conv":
        return "shifts" if cpu else "conv"  # XLA's CPU depthwise convolution is 10 to 30 times slower than shifts
    if op in ("deformable_attention", "conv_mlp"):
        return "products"
    if op == "position_bias":
        return "slice" if cpu and table_fits else "matmul"
    if op == "neighborhood_attention":
        if max(map_shape) <= 16:
            return "dense"
        return "rows" if cpu else "tiles"
    # The matrix of hat weights has H * W numbers a point. On CPU the gather's few rows are always less work (56 x 56 x 64:
    # 0.03 ms instead of 5, gradient 0.9 instead of 30; experiments/ops), elsewhere past this size.
    return "matmul" if not cpu and map_shape[0] * map_shape[1] <= 4096 else "gather"


MAX_PAIRS = 2**23  # (head, query, key) of an image whose logits may stand in memory at a time; 32 MB in float32
TILE_PAIRS = 2**22  # of a tile, where there are more


def choose_query_tile(map_shape: tuple[int, int], *, pairs_a_query: int) -> tuple[int, int]:
    """(height, width) of the tiles of queries that attention is done in: the whole map, or some whole rows, or part of one.

    Rows, because what the lookup of the position bias does for a row serves all of its columns: 40 square tiles took 17 s
    where 34 tiles of rows and the whole map took 8 (backbone of dat_pp_tiny on 800 x 1333, 2 CPU cores).

    Args:
      map_shape: (H, W) of the map of queries.
      pairs_a_query: heads times keys.
    """
    height, width = map_shape
    if height * width * pairs_a_query <= MAX_PAIRS:
        return map_shape
    rows, columns = max(1, TILE_PAIRS // (pairs_a_query * width)), max(1, min(width, TILE_PAIRS // pairs_a_query))
    # As many tiles as that asks for, and these as equal as they can be.
    return tuple(-(-size // -(-size // side)) for size, side in ((height, rows), (width, columns)))
