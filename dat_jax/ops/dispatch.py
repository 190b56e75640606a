"""The one place that chooses between the exact algorithms of an op, by platform and map size.

An op with several algorithms takes ``implementation=``:

* "auto": the implementation that ``dat_jax.tuning`` chose for the call by measuring it, see ``calls``; without such a choice
  the fastest known on this platform.
* "plain": the obvious algorithm, the reference that the others are tested against.
* "pallas": the TPU kernel of ops that have one (``ops.pallas``); "auto" for other ops, and for calls whose kernel does not fit
  in VMEM.
* "triton": the GPU kernel of ops that have one (``ops.triton``); "auto" for other ops. No kernel has run on a device yet, so
  "auto" selects "pallas" or "triton" only by measurement.
* the name of an algorithm of the op, see ``IMPLEMENTATIONS``.

Ops without that argument use the algorithms of ``ops.cpu`` on CPUs, see ``uses_cpu_algorithms``.

Differentiation: "plain" supports forward mode (``jax.jvp``, ``jax.jacfwd``, ``jax.linearize``) and reverse mode to any order, so
also Hessian-vector products. The other choices have backward passes of their own (``jax.custom_vjp``), which support only
``jax.grad`` and ``jax.vjp``; for forward mode jax raises its own TypeError. Memory is larger with "plain".
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# "slice", "rows" and "shifts" are in ``ops.cpu``, "pallas" is in ``ops.pallas``, "triton" in ``ops.triton``.
IMPLEMENTATIONS = {
    "grid_sample": ("matmul", "gather", "map_coordinates", "pallas"),
    "position_bias": ("slice", "matmul", "gather", "map_coordinates"),
    "neighborhood_attention": ("rows", "tiles", "dense", "gather", "pallas", "triton"),
    "deformable_attention": ("products", "pallas", "triton"),
    "neighborhood_branch": ("products", "pallas"),
    "deformable_branch": ("products", "pallas"),
    "conv_mlp": ("products", "pallas"),
    "local_perception": ("products", "pallas"),
    "norm_linear": ("products", "pallas"),
    "depthwise_conv": ("shifts", "conv"),
}
PLAIN = {
    "grid_sample": "map_coordinates",
    "position_bias": "gather",
    "neighborhood_attention": "gather",
    "deformable_attention": "products",
    "neighborhood_branch": "products",
    "deformable_branch": "products",
    "conv_mlp": "products",
    "local_perception": "products",
    "norm_linear": "products",
    "depthwise_conv": "conv",
}

EVERY_OP = ("auto", "plain", "pallas", "triton")  # names that every op accepts
_KERNEL_PLATFORMS = {"pallas": "tpu", "triton": "gpu"}

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def target_platform() -> str:
    """Platform that programs are compiled for: "cpu", "gpu" or "tpu".

    The platform of the default devices, unless ``compiling_for`` is active.
    """
    return _PLATFORM.get() or jax.default_backend()


def uses_cpu_algorithms() -> bool:
    """Whether ops without ``implementation=`` (linear layers, sums of gradients) use the algorithms of ``ops.cpu``."""
    return target_platform() == "cpu" and uses_custom_gradients()


def compute_dtype(name: str) -> jnp.dtype:
    """Dtype of the computation.

    Args:
      name: "float32", "bfloat16", or "auto": float32 on CPU, bfloat16 elsewhere.
    """
    if name == "auto":
        name = "float32" if target_platform() == "cpu" else "bfloat16"
    return jnp.dtype(name)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces for another platform, "cpu", "gpu" or "tpu", within this context.

    jax caches the trace of a function object, so create the functions within the context too.
    """
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


_CUSTOM_GRADIENTS: contextvars.ContextVar[bool] = contextvars.ContextVar("custom_gradients", default=True)


def uses_custom_gradients() -> bool:
    """Whether ops without ``implementation=`` have backward passes of their own, which save memory and exclude ``jax.jvp``."""
    return _CUSTOM_GRADIENTS.get()


@contextlib.contextmanager
def gradients_for(implementation: str) -> Iterator[None]:
    """With "plain", ops that are traced within this context are differentiated by jax. Other names change nothing."""
    token = _CUSTOM_GRADIENTS.set(_CUSTOM_GRADIENTS.get() and implementation != "plain")
    try:
        yield
    finally:
        _CUSTOM_GRADIENTS.reset(token)


_INTERPRET = contextvars.ContextVar("interpret", default=False)


def interprets_kernels() -> bool:
    """Whether jax interprets Pallas kernels, which it can do on any platform."""
    return _INTERPRET.get()


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Interprets Pallas kernels that are traced within this context: slow, for tests on a machine without a TPU or GPU."""
    token = _INTERPRET.set(True)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


def check_name(implementation: str) -> None:
    """Checks that an implementation is one of ``EVERY_OP``.

    Raises:
      ValueError: it is not.
    """
    if implementation not in EVERY_OP:
        raise ValueError(f"Unknown implementation {implementation!r}; choose one of {', '.join(EVERY_OP)}.")


def check_platform(implementation: str) -> None:
    """Checks that the kernels of an implementation can run on the target platform. Other implementations run on all of them.

    Raises:
      ValueError: the kernels are for another platform, and kernels are not interpreted.
    """
    platform = _KERNEL_PLATFORMS.get(implementation, target_platform())
    if platform != target_platform() and not interprets_kernels():
        raise ValueError(
            f'implementation="{implementation}" is for {platform.upper()}s, but the program is compiled for '
            f'{target_platform()}; choose "auto", or use dispatch.interpreted_kernels() in a test.'
        )


_BATCH_SPLIT: contextvars.ContextVar[tuple[Mesh | None, tuple[str, ...]]] = contextvars.ContextVar(
    "batch_split", default=(None, ())
)


def batch_split() -> tuple[Any, tuple[str, ...]]:
    """(mesh, mesh axes that split the batch) of ``split_batch``; (None, ()) on one device or without it."""
    return _BATCH_SPLIT.get()


@contextlib.contextmanager
def split_batch(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> Iterator[None]:
    """Runs Pallas kernels that are traced within this context per device, each on its part of the batch.

    The partitioner cannot look into a kernel and would gather the batch for it. Batch sizes must be multiples of the product
    of the axes' sizes.
    """
    token = _BATCH_SPLIT.set((mesh, tuple(axes)) if mesh.size > 1 else (None, ()))
    try:
        yield
    finally:
        _BATCH_SPLIT.reset(token)


def choose(
    op: str,
    implementation: str,
    *,
    map_shape: tuple[int, ...],
    table_fits: bool = False,
    kernel_fits: Callable[[], bool] = lambda: True,
) -> str:
    """Name of the algorithm to run.

    Args:
      op: a key of ``IMPLEMENTATIONS``.
      implementation: "auto", "plain", "pallas", "triton" or an algorithm of the op.
      map_shape: (H, W) of the map that the op works on.
      table_fits: for "position_bias", whether the table was made for this map size.
      kernel_fits: returns whether the op has a Pallas kernel for this call that fits in VMEM. It is called only for "pallas",
        which is replaced by "auto" if it returns False.

    Raises:
      ValueError: the op has no such implementation.
    """
    if implementation == "pallas" and not ("pallas" in IMPLEMENTATIONS[op] and kernel_fits()):
        implementation = "auto"
    if implementation == "triton" and implementation not in IMPLEMENTATIONS[op]:
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
    """Measured on CPU. Elsewhere matrix products instead of gathers, which have not been timed on a device yet."""
    cpu = target_platform() == "cpu"
    if op == "depthwise_conv":
        return "shifts" if cpu else "conv"  # XLA's CPU depthwise convolution is 10 to 30 times slower than shifts
    if "products" in IMPLEMENTATIONS[op]:
        return "products"
    if op == "position_bias":
        return "slice" if cpu and table_fits else "matmul"
    if op == "neighborhood_attention":
        if max(map_shape) <= 16:
            return "dense"
        return "rows" if cpu else "tiles"
    # grid_sample: the matrix of hat weights has H * W numbers per point. On CPU, gathering a few rows is always less work
    # (56 x 56 x 64: 0.03 ms instead of 5, gradient 0.9 instead of 30; experiments/ops), elsewhere on maps above this size.
    return "matmul" if not cpu and map_shape[0] * map_shape[1] <= 4096 else "gather"


# (head, query, key) triples per image. Up to MAX_PAIRS the logits of the whole map are in memory at once (32 MiB in float32);
# above it attention runs in tiles of at most about TILE_PAIRS.
MAX_PAIRS = 2**23
TILE_PAIRS = 2**22


def choose_query_tile(map_shape: tuple[int, int], *, pairs_per_query: int) -> tuple[int, int]:
    """(height, width) of the tiles of queries for attention: the whole map, some whole rows, or part of one row.

    Whole rows, because the position bias lookup of a row is shared by all of its columns: 40 square tiles took 17 s where 34
    tiles of rows and the whole map took 8 (backbone of dat_pp_tiny on 800 x 1333, 2 CPU cores).

    Args:
      map_shape: (H, W) of the map of queries.
      pairs_per_query: number of heads times number of keys.
    """
    height, width = map_shape
    if height * width * pairs_per_query <= MAX_PAIRS:
        return map_shape
    rows = max(1, TILE_PAIRS // (pairs_per_query * width))
    columns = max(1, min(width, TILE_PAIRS // pairs_per_query))
    # The fewest tiles of at most this size, with sides as equal as possible.
    return -(-height // -(-height // rows)), -(-width // -(-width // columns))
