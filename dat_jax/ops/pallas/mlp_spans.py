"""The MLP with a depthwise convolution on maps of any size: one grid step has some rows of the map.

The grid is (batch, steps), and sequential. Step s reads block s of the rows, so every row is read once. Scratch memory holds the
block before it, whose output is computed, and a halo: the output needs one row of the hidden map above and below the block, its
gradient two. These rows of the hidden map are computed for both neighbors.

Inside a step it is the kernel of ``mlp``: a loop over runs of hidden channels, and a convolution of a flat map between zeros.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dat_jax.ops.pallas.call import ALIGNMENT, KernelCall, Result, Rows, dot, round_up, stored_bytes
from dat_jax.ops.pallas.mlp import LANES, TAPS, Parameters, at_run, normal_cdf

_BLOCK_PIXELS = 4096
_MAX_STEP_BYTES = 56 * 2**20  # a v5p has 64 MiB of VMEM


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The static arguments of a call. A block is a range of pixels of the flat map.

    Attributes:
      map_shape: (H, W).
      rows: rows per block.
      reach: rows of the hidden map that a block needs above and below it: 1, or 2 for the gradient.
    """

    map_shape: tuple[int, int]
    rows: int
    reach: int

    @property
    def pixels(self) -> int:
        """Pixels of a block."""
        return self.rows * self.map_shape[1]

    @property
    def halo(self) -> int:
        """Pixels before and after a block in scratch memory."""
        return round_up(self.reach * self.map_shape[1], ALIGNMENT)

    @property
    def span(self) -> int:
        """Pixels whose hidden map is computed in a step: a block and its halo."""
        return self.pixels + 2 * self.halo

    @property
    def border(self) -> int:
        """Zeros before and after the hidden map, which the convolution reads beyond it."""
        return round_up(self.map_shape[1] + 1, ALIGNMENT)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.ceil(self.map_shape[0] / self.rows)


def _row_choices(map_shape):
    """Rows of a block, most first: its pixels are a multiple of the alignment, and at least the halo of the gradient."""
    height, width = map_shape
    step = ALIGNMENT // math.gcd(width, ALIGNMENT)
    least = round_up(math.ceil(round_up(2 * width, ALIGNMENT) / width), step)
    most = round_up(min(height, max(1, _BLOCK_PIXELS // width)), step)
    return range(max(least, most), least - 1, -step)


def choose_rows(shape: tuple[int, ...], hidden: int, dtype) -> int | None:
    """Rows per block: the most that fit in VMEM; None if the fewest do not.

    Args:
      shape: (B, H, W, C), the shape of the input.
      hidden: E.
      dtype: of the input.
    """
    _, height, width, channels = shape
    x, parameters = (
        jax.ShapeDtypeStruct((1, height * width, channels), dtype),
        Parameters.describe(channels, hidden, dtype),
    )
    for rows in _row_choices((height, width)):
        if _backward_call((height, width), rows, x, parameters, x).vmem_bytes <= _MAX_STEP_BYTES:
            return rows
    return None


def conv_mlp(x: jax.Array, parameters: Parameters, rows: int) -> jax.Array:
    """See ``ops.layers.mlp``.

    Args:
      x: (B, H, W, C).
      parameters: see ``mlp.conv_mlp``.
      rows: rows per block, from ``choose_rows``.

    Returns:
      (B, H, W, C).
    """
    batch, height, width, channels = x.shape
    out = _mlp((height, width), rows, x.reshape(batch, height * width, channels), parameters)
    return out.reshape(x.shape)  # pyright: ignore[reportAttributeAccessIssue] (custom_vjp loses the type of the result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(map_shape, rows, x, parameters):
    return _forward_call(map_shape, rows, x, parameters).run()[0]


def _mlp_forward(map_shape, rows, x, parameters):
    return _mlp(map_shape, rows, x, parameters), (x, parameters)


def _mlp_backward(map_shape, rows, residuals, gradient):
    x, parameters = residuals
    to_x, *to_parameters = _backward_call(map_shape, rows, x, parameters, gradient).run()
    casts = (g.astype(p.dtype) for g, p in zip(to_parameters, parameters, strict=True))
    return to_x, Parameters(*casts)


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _forward_call(map_shape, rows, x, parameters) -> KernelCall:
    blocks = Blocks(map_shape, rows, reach=1)
    operands = [(x, Rows(blocks.pixels)), *((p, False) for p in parameters)]
    results = [Result(x.shape, x.dtype, Rows(blocks.pixels, 1))]
    return _call(_forward_kernel, blocks, operands, results, products=2, copies=1)


def _backward_call(map_shape, rows, x, parameters, gradient) -> KernelCall:
    blocks = Blocks(map_shape, rows, reach=2)
    operands = [(x, Rows(blocks.pixels)), *((p, False) for p in parameters), (gradient, Rows(blocks.pixels))]
    dtype = parameters.bias1.dtype  # sums over the batch
    results = [Result(x.shape, x.dtype, Rows(blocks.pixels, 1))]
    results += [Result(p.shape, dtype, False) for p in parameters]
    return _call(_backward_kernel, blocks, operands, results, products=5, copies=2)


def _call(kernel, blocks, operands, results, *, products, copies) -> KernelCall:
    x, hidden, dtype = operands[0][0], operands[1][0].shape[1], operands[2][0].dtype
    (_, pixels, channels), span = x.shape, blocks.span
    run = LANES if hidden % LANES == 0 else hidden
    windows = [((blocks.halo + 2 * blocks.pixels, channels), x.dtype)] * copies
    maps = [((3, span + 2 * blocks.border, run), dtype)] * copies
    scratch = [*windows, *maps, ((blocks.pixels, channels), dtype)]
    work = 12 * stored_bytes((span, run), dtype) + 3 * stored_bytes((span, channels), dtype)
    return KernelCall(
        functools.partial(kernel, blocks, run),
        operands,
        results,
        flops=pixels * hidden * (2 * products * channels + 18 * (3 * copies - 2)),
        exponentials=copies * pixels * hidden,
        work_bytes=work + sum(stored_bytes(*array) for array in scratch),
        name=f"mlp_spans{kernel.__name__.removesuffix('_kernel')}",
        scratch=[pltpu.VMEM(*array) for array in scratch],
        steps=blocks.count + 1,
    )


def _append_block(blocks, ref, window, step):
    """Moves the pixels in scratch memory up by one block, and appends the block of this step, with zeros outside the map.

    A window is the halo, the previous block and the new one, of which the first pixels are the halo after the previous block.
    """
    height, width = blocks.map_shape
    pixels, kept = blocks.pixels, blocks.halo + blocks.pixels

    @pl.when(step == 0)
    def _():
        window[...] = jnp.zeros_like(window)

    @pl.when(step > 0)
    def _():
        window[:kept] = window[pixels:]

    pixel = step * pixels + lax.broadcasted_iota(jnp.int32, (pixels, 1), 0)
    window[kept:] = jnp.where(pixel < height * width, ref[0], jnp.zeros_like(ref[0]))


def _clear_borders(blocks, ref):
    zeros = jnp.zeros((blocks.border, ref.shape[2]), ref.dtype)
    for copy in range(3):
        ref[copy, : blocks.border] = zeros
        ref[copy, blocks.border + blocks.span :] = zeros


def _pixels(blocks, step):
    """For the pixels of a span, (span, 1): whether they are in the map, are not in its last column, or in its first."""
    height, width = blocks.map_shape
    index = lax.broadcasted_iota(jnp.int32, (blocks.span, 1), 0)
    pixel = (step - 1) * blocks.pixels - blocks.halo + index
    shifted = (index + (round_up(blocks.halo, width) - blocks.halo)).astype(jnp.float32)
    column = shifted - jnp.floor((shifted + 0.5) / width) * width  # integer division is slow
    inside = (pixel >= 0) & (pixel < height * width)
    return inside, inside & (column < width - 1), inside & (column > 0)


def _store_map(blocks, ref, values, masks):
    """Stores the map without its last column, the map, and the map without its first column; zero outside the map."""
    inside, not_last, not_first = masks
    at = slice(blocks.border, blocks.border + blocks.span)
    for copy, mask in enumerate((not_last, inside, not_first)):
        ref[copy, at] = jnp.where(mask, values, 0)


def _neighbors(blocks, ref):
    """For each tap, the neighbor of every pixel of the span that it reads; zero outside the map."""
    for dy, dx in TAPS:
        first = blocks.border + dy * blocks.map_shape[1] + dx
        yield ref[dx + 1, first : first + blocks.span]


def _hidden(blocks, x, kernel1, bias1, taps, taps_bias, ref, masks):
    """The input of the GELU, (span, run). The input of the convolution stays in ``ref``."""
    values = dot(x, kernel1, 1, 0) + bias1
    _store_map(blocks, ref, values, masks)
    for tap, neighbor in enumerate(_neighbors(blocks, ref)):
        values = values + neighbor * taps[tap : tap + 1]
    return values + taps_bias


def _forward_kernel(blocks, run, x_ref, k1, b1, taps, taps_bias, k2, b2, out_ref, window, map_ref, sum_ref):
    step_index = pl.program_id(1)
    _append_block(blocks, x_ref, window, step_index)
    core = slice(blocks.halo, blocks.halo + blocks.pixels)

    @pl.when(step_index > 0)
    def _():
        _clear_borders(blocks, map_ref)
        masks = _pixels(blocks, step_index)
        sum_ref[...] = jnp.zeros_like(sum_ref) + b2[...]

        def step(index, _):
            at = at_run(index, run)
            x = window[: blocks.span]
            hidden = _hidden(blocks, x, k1[:, at], b1[:, at], taps[:, at], taps_bias[:, at], map_ref, masks)[core]
            active = (hidden * normal_cdf(hidden)).astype(k2.dtype)
            sum_ref[...] += dot(active, k2[at], 1, 0)
            return 0

        lax.fori_loop(0, k1.shape[1] // run, step, 0)
        out_ref[0] = sum_ref[...].astype(out_ref.dtype)


def _backward_kernel(blocks, run, x_ref, k1, b1, taps, taps_bias, k2, b2, gradient_ref, *results_and_scratch):
    results, scratch = results_and_scratch[:7], results_and_scratch[7:]
    to_x, to_k1, to_b1, to_taps, to_taps_bias, to_k2, to_b2 = results
    x_window, gradient_window, map_ref, gradient_map_ref, sum_ref = scratch
    step_index, dtype = pl.program_id(1), k2.dtype
    _append_block(blocks, x_ref, x_window, step_index)
    _append_block(blocks, gradient_ref, gradient_window, step_index)
    core = slice(blocks.halo, blocks.halo + blocks.pixels)

    @pl.when((pl.program_id(0) == 0) & (step_index == 0))
    def _():
        for ref in (to_k1, to_b1, to_taps, to_taps_bias, to_k2, to_b2):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(step_index > 0)
    def _():
        for ref in (map_ref, gradient_map_ref):
            _clear_borders(blocks, ref)
        masks = _pixels(blocks, step_index)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        to_b2[...] += gradient_window[core].astype(to_b2.dtype).sum(axis=0, keepdims=True)

        def step(index, _):
            at = at_run(index, run)
            x, gradient = x_window[: blocks.span], gradient_window[: blocks.span]
            hidden = _hidden(blocks, x, k1[:, at], b1[:, at], taps[:, at], taps_bias[:, at], map_ref, masks)
            below = normal_cdf(hidden)
            # The gradient of pixels outside the map is zero, so they add nothing to the sums over the pixels of a block.
            to_k2[at] += dot((hidden * below)[core].astype(dtype), gradient[core], 0, 0)
            slope = below + hidden * jnp.exp(-0.5 * hidden * hidden) * (1 / math.sqrt(2 * math.pi))
            to_hidden = dot(gradient, k2[at], 1, 1) * slope
            to_taps_bias[:, at] += to_hidden[core].sum(axis=0, keepdims=True)
            neighbors = _neighbors(blocks, map_ref)
            to_taps[:, at] += jnp.concatenate(
                [(n[core] * to_hidden[core]).sum(axis=0, keepdims=True) for n in neighbors]
            )
            _store_map(blocks, gradient_map_ref, to_hidden, masks)
            to_hidden, rotated = to_hidden[core], taps[:, at]
            for tap, neighbor in enumerate(_neighbors(blocks, gradient_map_ref)):
                to_hidden = to_hidden + neighbor[core] * rotated[8 - tap : 9 - tap]
            if blocks.map_shape[0] % blocks.rows:  # below the last row, the hidden map is not used
                to_hidden = jnp.where(masks[0][core], to_hidden, 0)
            to_b1[:, at] += to_hidden.sum(axis=0, keepdims=True)
            to_hidden = to_hidden.astype(dtype)
            to_k1[:, at] += dot(x[core], to_hidden, 0, 0)
            sum_ref[...] += dot(to_hidden, k1[:, at], 1, 1)
            return 0

        lax.fori_loop(0, k1.shape[1] // run, step, 0)
        to_x[0] = sum_ref[...].astype(to_x.dtype)
