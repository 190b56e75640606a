"""Calling a kernel that works through a batch, an example a grid step."""

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

MAX_VMEM_BYTES = 100 * 2**20  # of the 128 MiB of a v5e or v6e
_MARGIN_BYTES = 16 * 2**20  # for what the compiler keeps beside that


@dataclasses.dataclass(frozen=True)
class Result:
    """Of a kernel. ``batched``: an example a step; else summed over the batch in the kernel and over devices after it."""

    shape: tuple[int, ...]
    dtype: Any
    batched: bool


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, precision=None) -> jax.Array:
    """Product of two matrices over these axes, accumulated in float32 or better."""
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
      kernel: sees blocks (1, ...) of what is batched, and the whole of what is not, which stays in VMEM.
      operands: array, and whether its first axis is the batch.
      results: shapes with the batch.
      flops, exponentials: of one example, for the compiler's estimate.
      work_bytes: of the largest arrays that the kernel holds at a time besides its operands and results.
      name: of the kernel, in profiles.

    Returns:
      An array for each result.

    Raises:
      ValueError: it does not fit in VMEM, or the program is for another platform than a TPU and not interpreted.
    """
    interpret = dispatch.interprets_kernels()
    if dispatch.target_platform() != "tpu" and not interpret:
        raise ValueError(
            f'implementation="pallas" is for TPUs, the program is for {dispatch.target_platform()}; choose "auto", or '
            "dispatch.interpreted_kernels() for a test."
        )
    resident = [_stored_bytes(x.shape[1:] if batched else x.shape, x.dtype) for x, batched in operands]
    resident += [_stored_bytes(r.shape[1:] if r.batched else r.shape, r.dtype) for r in results]
    needed = 2 * sum(resident) + work_bytes  # blocks are double-buffered
    if needed > MAX_VMEM_BYTES:
        raise ValueError(
            f'implementation="pallas" would need {needed / 2**20:.0f} MiB of the {MAX_VMEM_BYTES / 2**20:.0f} in VMEM for an '
            'example of this size; choose "auto".'
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


def _block(shape, batched) -> pl.BlockSpec:
    if not batched:
        return pl.BlockSpec(shape, lambda b: (0,) * len(shape))
    return pl.BlockSpec((1, *shape[1:]), lambda b: (b,) + (0,) * (len(shape) - 1))


def _stored_bytes(shape, dtype) -> int:
    """With the padding of tiles: 128 lanes, and 8 sublanes of 32 bits."""
    itemsize = jnp.dtype(dtype).itemsize
    rows, lanes = (1, 1, *shape)[-2:]
    tile = 32 // itemsize
    return math.prod(shape[:-2]) * pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, 128) * 128 * itemsize
