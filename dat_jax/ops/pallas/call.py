"""Calls of kernels that process a batch: one example per grid step, or spans of rows of one example after the other."""

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
ALIGNMENT = 16  # pixels: the rows of a register in bfloat16, and two registers in float32
MAX_UNROLLED_PIXELS = 4096  # of a map in kernels whose programs have all of its spans of rows, and so grow with it
_MARGIN_BYTES = 16 * 2**20  # for the compiler's own arrays


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch (B, rows, ...) of which a grid step has one example's block of consecutive rows.

    The last block may reach beyond the array. What a kernel reads there is undefined, and what it writes there is dropped.

    Attributes:
      count: rows per block.
      lag: grid step s of an example has block s - lag, or the nearest block that exists.
    """

    count: int
    lag: int = 0


Batching = bool | Rows  # whether the first axis is the batch


@dataclasses.dataclass(frozen=True)
class Result:
    """An array that a kernel computes.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      batched: whether each example has a block of the array, or a block of its rows. If not, the kernel sums over the batch, and
        ``KernelCall`` over devices.
    """

    shape: tuple[int, ...]
    dtype: Any
    batched: Batching


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not less than a number."""
    return math.ceil(value / multiple) * multiple


def is_unrolled(map_shape: tuple[int, ...]) -> bool:
    """Whether a map (H, W) is small enough for kernels whose programs have all of its spans of rows."""
    return math.prod(map_shape) <= MAX_UNROLLED_PIXELS


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, precision=None) -> jax.Array:
    """Product of two matrices over the given axis of each, accumulated in float32 or better."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of ``kernel(*operand refs, *result refs, *scratch refs)`` for each example of a batch.

    The grid is sequential: a kernel may carry sums and maps from one step to the next, in its results and in scratch.

    Attributes:
      kernel: gets references to blocks (1, ...) of batched arrays, and to the whole of others, which stay in VMEM.
      operands: arrays, each with its ``Batching``; ShapeDtypeStructs for a call that is not run.
      results: shapes and dtypes of the results; shapes include the batch.
      flops: FLOPs of one example, for the compiler's estimate.
      exponentials: number of exponentials of one example, for the compiler's estimate.
      work_bytes: size of the arrays that the kernel holds at a time besides its operands and results.
      name: name of the kernel in profiles.
      scratch: buffers that the kernel works in.
      steps: grid steps per example; None for one, without an axis of the grid.
    """

    kernel: Callable[..., None]
    operands: Sequence[tuple[Any, Batching]]
    results: Sequence[Result]
    flops: float
    exponentials: float
    work_bytes: int
    name: str
    scratch: Sequence[Any] = ()
    steps: int | None = None

    @property
    def vmem_bytes(self) -> int:
        """Memory on the chip that a grid step needs. The blocks of all arrays are double-buffered."""
        arrays = [(x.shape, x.dtype, batched) for x, batched in self.operands]
        arrays += [(r.shape, r.dtype, r.batched) for r in self.results]
        return 2 * sum(stored_bytes(_block_shape(s, b), d) for s, d, b in arrays) + self.work_bytes

    @property
    def fits(self) -> bool:
        """Whether a grid step fits in VMEM."""
        return self.vmem_bytes <= MAX_VMEM_BYTES

    def run(self) -> list[jax.Array]:
        """Runs the kernel.

        Returns:
          A list with an array for each result.

        Raises:
          ValueError: a step does not fit in VMEM, or the target platform is not a TPU and kernels are not interpreted.
        """
        dispatch.check_platform("pallas")
        if not self.fits:
            raise ValueError(
                f'implementation="pallas" needs {self.vmem_bytes / 2**20:.0f} MiB of VMEM for an example of this size, more '
                f'than the limit of {MAX_VMEM_BYTES / 2**20:.0f} MiB; choose "auto".'
            )
        arrays = [x for x, _ in self.operands]
        mesh, axes = dispatch.batch_split()
        if mesh is None:
            return self._run_part(*arrays)

        def run_part(*arrays):
            parts = self._run_part(*arrays)
            return [part if r.batched else lax.psum(part, axes) for part, r in zip(parts, self.results, strict=True)]

        return jax.shard_map(
            run_part,
            mesh=mesh,
            in_specs=tuple(P(axes) if batched else P() for _, batched in self.operands),
            out_specs=[P(axes) if r.batched else P() for r in self.results],
            check_vma=False,
        )(*arrays)

    def _run_part(self, *arrays):
        kinds = [batched for _, batched in self.operands]
        batch = next(x.shape[0] for x, batched in zip(arrays, kinds, strict=True) if batched)
        shapes = [(batch, *r.shape[1:]) if r.batched else r.shape for r in self.results]
        moved = sum(x.size * x.dtype.itemsize for x in arrays)
        moved += sum(math.prod(s) * jnp.dtype(r.dtype).itemsize for s, r in zip(shapes, self.results, strict=True))
        return pl.pallas_call(
            self.kernel,
            grid=(batch,) if self.steps is None else (batch, self.steps),
            in_specs=[_block(x.shape, batched) for x, batched in zip(arrays, kinds, strict=True)],
            out_specs=[_block(s, r.batched) for s, r in zip(shapes, self.results, strict=True)],
            out_shape=[jax.ShapeDtypeStruct(s, r.dtype) for s, r in zip(shapes, self.results, strict=True)],
            scratch_shapes=list(self.scratch),
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=min(self.vmem_bytes + _MARGIN_BYTES, MAX_VMEM_BYTES)),
            cost_estimate=pl.CostEstimate(
                flops=int(batch * self.flops),
                transcendentals=int(batch * self.exponentials),
                bytes_accessed=int(moved),
            ),
            interpret=dispatch.interprets_kernels(),
            name=self.name,
        )(*arrays)


def all_fit(make_calls: Callable[..., Sequence[KernelCall]], *arrays: Any) -> bool:
    """Whether all calls that a function of arrays makes fit in VMEM. Nothing is computed.

    Args:
      make_calls: function of the arrays that returns the calls.
      arrays: arrays, ShapeDtypeStructs, or tuples of them.
    """
    found: list[bool] = []
    jax.eval_shape(lambda *arrays: found.extend(call.fits for call in make_calls(*arrays)), *arrays)
    return all(found)


def _block_shape(shape, batched: Batching) -> tuple[int, ...]:
    if isinstance(batched, Rows):
        return (1, batched.count, *shape[2:])
    return (1, *shape[1:]) if batched else tuple(shape)


def _block(shape, batched: Batching) -> pl.BlockSpec:
    def index(b, step=0):
        if not batched:
            return (0,) * len(shape)
        row = 0
        if isinstance(batched, Rows):
            row = jnp.clip(step - batched.lag, 0, pl.cdiv(shape[1], batched.count) - 1)
        return (b, row) + (0,) * (len(shape) - 2)

    return pl.BlockSpec(_block_shape(shape, batched), index)


def stored_bytes(shape, dtype) -> int:
    """Size of an array in VMEM, with the padding of tiles: 128 lanes, and 8 sublanes of 32 bits."""
    itemsize = jnp.dtype(dtype).itemsize
    rows, lanes = (1, 1, *shape)[-2:]
    tile = 32 // itemsize
    return math.prod(shape[:-2]) * pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, 128) * 128 * itemsize
