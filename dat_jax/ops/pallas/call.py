"""Calls of kernels that process a batch, one example per grid step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from dat_jax.ops import dispatch

MAX_VMEM_BYTES = 100 * 2**20  # a v5e or v6e has 128 MiB
_MARGIN_BYTES = 16 * 2**20  # for the compiler's own arrays


@dataclasses.dataclass(frozen=True)
class Result:
    """An array that a kernel computes.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      batched: whether each grid step writes one example. If not, the kernel sums over the batch, and ``batched_call`` over
        devices.
    """

    shape: tuple[int, ...]
    dtype: Any
    batched: bool


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, precision=None) -> jax.Array:
    """Product of two matrices over the given axis of each, accumulated in float32 or better."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=dtype)


def batched_call(
    kernel: Callable[..., None],
    operands: Sequence[tuple[jax.Array, bool]],
    results: Sequence[Result],
    *,
    flops: float,
    exponentials: float,
    work_bytes: int,
    name: str,
    scratch: Sequence[Any] = (),
) -> list[jax.Array]:
    """Runs ``kernel(*operand refs, *result refs, *scratch refs)`` for each example of a batch.

    Args:
      kernel: gets references to blocks (1, ...) of batched arrays, and to the whole of others, which stay in VMEM.
      operands: arrays, each with a flag that its first axis is the batch.
      results: shapes and dtypes of the results; shapes include the batch.
      flops: FLOPs of one example, for the compiler's estimate.
      exponentials: number of exponentials of one example, for the compiler's estimate.
      work_bytes: size of the arrays that the kernel holds at a time besides its operands and results.
      name: name of the kernel in profiles.
      scratch: buffers that the kernel works in.

    Returns:
      A list with an array for each result.

    Raises:
      ValueError: an example does not fit in VMEM, or the target platform is not a TPU and kernels are not interpreted.
    """
    interpret = dispatch.interprets_kernels()
    if dispatch.target_platform() != "tpu" and not interpret:
        raise ValueError(
            f'implementation="pallas" is for TPUs, but the program is compiled for {dispatch.target_platform()}; choose '
            '"auto", or use dispatch.interpreted_kernels() in a test.'
        )
    needed = _resident_bytes(operands, results) + work_bytes
    if needed > MAX_VMEM_BYTES:
        raise ValueError(
            f'implementation="pallas" needs {needed / 2**20:.0f} MiB of VMEM for an example of this size, more than the '
            f'limit of {MAX_VMEM_BYTES / 2**20:.0f} MiB; choose "auto".'
        )

    def run(*arrays):
        batch = next(x.shape[0] for x, (_, batched) in zip(arrays, operands, strict=True) if batched)
        shapes = [(batch, *r.shape[1:]) if r.batched else r.shape for r in results]
        moved = sum(x.size * x.dtype.itemsize for x in arrays)
        moved += sum(math.prod(s) * jnp.dtype(r.dtype).itemsize for s, r in zip(shapes, results, strict=True))
        return pl.pallas_call(
            kernel,
            grid=(batch,),
            in_specs=[_block(x.shape, batched) for x, (_, batched) in zip(arrays, operands, strict=True)],
            out_specs=[_block(s, r.batched) for s, r in zip(shapes, results, strict=True)],
            out_shape=[jax.ShapeDtypeStruct(s, r.dtype) for s, r in zip(shapes, results, strict=True)],
            scratch_shapes=list(scratch),
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=min(needed + _MARGIN_BYTES, MAX_VMEM_BYTES)),
            cost_estimate=pl.CostEstimate(
                flops=int(batch * flops), transcendentals=int(batch * exponentials), bytes_accessed=int(moved)
            ),
            interpret=interpret,
            name=name,
        )(*arrays)

    arrays = [x for x, _ in operands]
    mesh, axes = dispatch.batch_split()
    if mesh is None:
        return run(*arrays)

    def run_part(*arrays):
        parts = run(*arrays)
        return [part if r.batched else lax.psum(part, axes) for part, r in zip(parts, results, strict=True)]

    return jax.shard_map(
        run_part,
        mesh=mesh,
        in_specs=tuple(P(axes) if batched else P() for _, batched in operands),
        out_specs=[P(axes) if r.batched else P() for r in results],
        check_vma=False,
    )(*arrays)


def _resident_bytes(operands, results) -> int:
    """Size in VMEM of the blocks of all arrays, which are double-buffered."""
    blocks = [_stored_bytes(x.shape[1:] if batched else x.shape, x.dtype) for x, batched in operands]
    blocks += [_stored_bytes(r.shape[1:] if r.batched else r.shape, r.dtype) for r in results]
    return 2 * sum(blocks)


def _block(shape, batched) -> pl.BlockSpec:
    if not batched:
        return pl.BlockSpec(shape, lambda b: (0,) * len(shape))
    return pl.BlockSpec((1, *shape[1:]), lambda b: (b,) + (0,) * (len(shape) - 1))


def _stored_bytes(shape, dtype) -> int:
    """Size in VMEM, with the padding of tiles: 128 lanes, and 8 sublanes of 32 bits."""
    itemsize = jnp.dtype(dtype).itemsize
    rows, lanes = (1, 1, *shape)[-2:]
    tile = 32 // itemsize
    return math.prod(shape[:-2]) * pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, 128) * 128 * itemsize
