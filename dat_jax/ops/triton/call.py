"""Calls of kernels that process a batch in blocks, on a GPU."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from dat_jax.ops import dispatch

try:  # The Triton backend of Pallas is deprecated since jax 0.12.
    from jax.experimental.pallas import triton as plgpu
except ImportError:
    plgpu: Any = None

DTYPES = ("bfloat16", "float16", "float32")
_MIN_WIDTH = 16  # the smallest side of a matrix product in Triton


@dataclasses.dataclass(frozen=True)
class Result:
    """An array that a kernel computes.

    Attributes:
      shape: its shape, with the batch first.
      dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: Any


def is_supported() -> bool:
    """Whether the installed jax can compile these kernels."""
    return plgpu is not None


def check(*arrays: jax.Array) -> None:
    """Checks that the kernels can run on the target platform, with these queries, keys and values.

    Raises:
      ValueError: the target platform is not a GPU and kernels are not interpreted, jax has no Triton backend, or the kernels do
        not support the dtype.
    """
    dispatch.check_platform("triton")
    if not is_supported():
        raise ValueError(
            f'implementation="triton" needs the Triton backend of Pallas, which jax {jax.__version__} does not have; choose '
            '"auto", or install an earlier version of jax.'
        )
    for x in arrays:
        if str(x.dtype) not in DTYPES and not dispatch.interprets_kernels():
            raise ValueError(f'implementation="triton" supports {", ".join(DTYPES)}, got {x.dtype}; choose "auto".')


def block_side(size: int) -> int:
    """The side of a block for ``size`` rows or columns: a power of two, as Triton requires, and at least 16."""
    return max(_MIN_WIDTH, pl.next_power_of_2(size))


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Product of two matrices over the given axis of each, accumulated in float32 or better."""
    a = a.T if axis_a == 0 else a
    b = b.T if axis_b == 1 else b
    return jnp.dot(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def load(ref: Any, index: tuple[Any, ...], mask: jax.Array | None = None) -> jax.Array:
    """Elements of an array at integer arrays that broadcast together, zero where the mask is False."""
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[index], mask=mask, other=other)


def store(ref: Any, index: tuple[Any, ...], values: jax.Array, mask: jax.Array | None = None) -> None:
    """Writes elements of an array at integer arrays that broadcast together, where the mask is True.

    No two indices may be the same, and they may be beyond the array where the mask is False.
    """
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def kernel_call(
    kernel: Callable[..., None],
    operands: Sequence[tuple[jax.Array, bool]],
    results: Sequence[Result],
    *,
    grid: tuple[int, int],
    name: str,
    num_warps: int = 4,
    num_stages: int = 2,
) -> list[jax.Array]:
    """Runs ``kernel(*operand refs, *result refs)`` for each block, head and example.

    The kernel gets references to whole arrays in device memory. ``pl.program_id`` is (block, head, example).

    Args:
      kernel: see above. Each result has the batch first, so that no two examples write the same element.
      operands: arrays, each with a flag that its first axis is the batch.
      results: shapes and dtypes of the results.
      grid: number of blocks and of heads.
      name: name of the kernel in profiles.
      num_warps: number of groups of 32 threads that share a block.
      num_stages: number of iterations of a loop whose loads overlap.

    Returns:
      A list with an array for each result.
    """
    interpret = dispatch.interprets_kernels()

    def run(*arrays):
        batch = next(x.shape[0] for x, (_, batched) in zip(arrays, operands, strict=True) if batched)
        call = pl.pallas_call(
            kernel,
            grid=(*grid, batch),
            out_shape=[jax.ShapeDtypeStruct((batch, *r.shape[1:]), r.dtype) for r in results],
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=interpret,
            name=name,
        )
        with contextlib.nullcontext() if interpret else _described_device():
            return list(call(*arrays))

    arrays = [x for x, _ in operands]
    mesh, axes = dispatch.batch_split()
    if mesh is None:
        return run(*arrays)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(P(axes) if batched else P() for _, batched in operands),
        out_specs=[P(axes)] * len(results),
        check_vma=False,
    )(*arrays)


def _described_device() -> contextlib.AbstractContextManager:
    """Tells jax >= 0.12 which GPU to lower for if none is attached. The compiler takes its description from the topology."""
    abstract_device = getattr(jax.sharding, "AbstractDevice", None)
    if abstract_device is None or jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    current = jax.sharding.get_abstract_mesh()
    device = abstract_device("NVIDIA H100", None, "gpu")
    mesh = jax.sharding.AbstractMesh(current.axis_sizes, current.axis_names, current.axis_types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def loop(count: int, step: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """Runs ``step(index, carry)`` for ``count`` indices, int32, and returns the last carry."""
    return lax.fori_loop(np.int32(0), np.int32(count), step, start)


def divide(index: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of an int32 index that is not negative."""
    return lax.div(index, np.int32(count)), lax.rem(index, np.int32(count))


def clamp(index: jax.Array, side: int) -> jax.Array:
    """An index limited to 0 to ``side - 1``."""
    return lax.clamp(jnp.int32(0), index, jnp.int32(side - 1))


def channels(head: jax.Array, width: int) -> tuple[jax.Array, jax.Array | None]:
    """Indices of the channels of a head in a row of packed channels, and a mask of those that belong to it.

    Args:
      head: index of the head.
      width: D. The block has ``block_side(D)`` channels.

    Returns:
      int (1, P) indices, and bool (1, P), None if D = P.
    """
    index = lax.broadcasted_iota(jnp.int32, (1, block_side(width)), 1)
    return head * width + index, None if index.shape[1] == width else index < width
