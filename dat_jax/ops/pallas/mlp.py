"""The MLP with a depthwise convolution. Its hidden map, four times as wide, never leaves the chip.

One grid step is one image:

* A loop processes the hidden channels in runs of 128, the lanes of a register.
* The convolution reads a flat map (H * W, 128) between rows of zeros: the neighbor below a pixel is W rows further.
* Where this would wrap around the end of a row, it reads a copy of the map without the last or the first column.
* The backward pass recomputes the hidden map.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dat_jax.ops.pallas.branch import Branch, normalize, normalize_backward
from dat_jax.ops.pallas.call import KernelCall, Result, dot

MAX_WEIGHTS = 2_500_000  # C * E: the kernels and their float32 gradients are in VMEM, each twice
LANES = 128
TAPS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


class Parameters(NamedTuple):
    """Parameters of the MLP, with hidden width E.

    Attributes:
      kernel1: (C, E).
      bias1: (1, E).
      taps: (9, E).
      taps_bias: (1, E).
      kernel2: (E, C).
      bias2: (1, C).
    """

    kernel1: jax.Array
    bias1: jax.Array
    taps: jax.Array
    taps_bias: jax.Array
    kernel2: jax.Array
    bias2: jax.Array

    @classmethod
    def describe(cls, channels: int, hidden: int, dtype: Any) -> "Parameters":
        """ShapeDtypeStructs of the parameters for a map of ``dtype``, to find out what fits in VMEM."""
        wide = jnp.promote_types(dtype, jnp.float32)
        struct: Any = jax.ShapeDtypeStruct
        return cls(
            struct((channels, hidden), dtype),
            struct((1, hidden), wide),
            struct((9, hidden), wide),
            struct((1, hidden), wide),
            struct((hidden, channels), dtype),
            struct((1, channels), wide),
        )


def conv_mlp(x: jax.Array, parameters: Parameters, branch: Branch | None = None) -> jax.Array:
    """See ``ops.layers.mlp``.

    Args:
      x: (B, H, W, C).
      parameters: kernel1 and kernel2 of the dtype of ``x``, the others float32 or better.
      branch: for ``x`` plus a residual branch, or None.

    Returns:
      (B, H, W, C).
    """
    batch, height, width, channels = x.shape
    out = _mlp(width, x.reshape(batch, height * width, channels), branch, parameters)
    return out.reshape(x.shape)  # pyright: ignore[reportAttributeAccessIssue] (custom_vjp loses the type of the result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(width, x, branch, parameters):
    return _forward_call(width, x, branch, parameters).run()[0]


def _mlp_forward(width, x, branch, parameters):
    return _mlp(width, x, branch, parameters), (x, branch, parameters)


def list_calls(x: jax.Array, parameters: Parameters, branch: Branch | None = None) -> list[KernelCall]:
    """The calls of ``conv_mlp`` with these arguments and of its backward pass."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height * width, channels)
    return [_forward_call(width, x, branch, parameters), _backward_call(width, x, branch, parameters, x)]


def _forward_call(width, x, branch, parameters):
    operands, _ = _list_operands(x, branch, parameters)
    options = dict(hidden=parameters.kernel1.shape[1], is_branch=branch is not None, products=2, copies=1)
    return _call(_forward_kernel, width, operands, [Result(x.shape, x.dtype, True)], **options)


def _mlp_backward(width, residuals, gradient):
    x, branch, parameters = residuals
    to_x, *gradients = _backward_call(width, x, branch, parameters, gradient).run()
    if branch is not None:
        branch = Branch(jnp.zeros_like(branch.factors), *gradients[:2])
        gradients = gradients[2:]
    return to_x, branch, Parameters(*(g.astype(p.dtype) for g, p in zip(gradients, parameters, strict=True)))


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _backward_call(width, x, branch, parameters, gradient):
    operands, results = _list_operands(x, branch, parameters)
    results = [Result(x.shape, x.dtype, True), *results]
    options = dict(hidden=parameters.kernel1.shape[1], is_branch=branch is not None, products=5, copies=2)
    return _call(_backward_kernel, width, [*operands, (gradient, True)], results, **options)


def _list_operands(x, branch, parameters):
    """Operands of both kernels, and the gradients of parameters, which are summed over the batch in float32 or better."""
    operands = [(x, True), *(branch.operands() if branch is not None else ()), *((p, False) for p in parameters)]
    results = [Result(p.shape, parameters.bias1.dtype, False) for p in parameters]
    return operands, [*(branch.results() if branch is not None else ()), *results]


def _call(kernel, width, operands, results, *, hidden, is_branch, products, copies) -> KernelCall:
    x = operands[0][0]
    pixels, channels = x.shape[1:]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    run = LANES if hidden % LANES == 0 else hidden
    rows = pixels + 2 * border_rows(width)
    itemsize = jnp.dtype(dtype).itemsize
    scratch = [pltpu.VMEM((3, rows, run), dtype)] * copies + [pltpu.VMEM((pixels, channels), dtype)]
    return KernelCall(
        functools.partial(kernel, width, run, is_branch),
        operands,
        results,
        flops=pixels * hidden * (2 * products * channels + 18 * (3 * copies - 2)),
        exponentials=copies * pixels * hidden,
        work_bytes=itemsize * pixels * (12 * max(run, LANES) + (3 + 3 * is_branch) * max(channels, LANES))
        + 3 * copies * itemsize * rows * max(run, LANES),
        name=f"mlp{kernel.__name__.removesuffix('_kernel')}",
        scratch=scratch + [pltpu.VMEM((1, pixels, channels), x.dtype)] * (copies if is_branch else 0),
    )


def border_rows(width: int) -> int:
    """Number of rows of zeros before and after the map: at least width + 1, in whole registers."""
    return math.ceil((width + 1) / 8) * 8


def clear_borders(ref, width: int, pixels: int) -> None:
    """Writes zeros before and after the three maps in ``ref``."""
    border = border_rows(width)
    for copy in range(3):
        ref[copy, :border] = jnp.zeros((border, ref.shape[2]), ref.dtype)
        ref[copy, border + pixels :] = jnp.zeros((border, ref.shape[2]), ref.dtype)


def store_map(ref, width: int, values: jax.Array) -> None:
    """Stores the map without its last column, the map, and the map without its first column."""
    pixels, border = values.shape[0], border_rows(width)
    index = lax.broadcasted_iota(jnp.int32, values.shape, 0).astype(jnp.float32)
    column = index - jnp.floor((index + 0.5) / width) * width  # integer division is slow
    for copy, mask in enumerate((column < width - 1, None, column > 0)):
        ref[copy, border : border + pixels] = values if mask is None else jnp.where(mask, values, 0)


def neighbors(ref, width, pixels):
    """For each tap, the neighbor of every pixel that it reads; zero outside the map."""
    for dy, dx in TAPS:
        first = border_rows(width) + dy * width + dx
        yield ref[dx + 1, first : first + pixels]


def _hidden(x_ref, kernel1, bias1, taps, taps_bias, ref, width):
    """The input of the GELU, (H * W, run). The input of the convolution stays in ``ref``."""
    values = dot(x_ref[0], kernel1, 1, 0) + bias1
    store_map(ref, width, values)
    for tap, neighbor in enumerate(neighbors(ref, width, values.shape[0])):
        values = values + neighbor * taps[tap : tap + 1]
    return values + taps_bias


def normal_cdf(x: jax.Array) -> jax.Array:
    """Cumulative distribution function of the normal distribution."""
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


def at_run(index, run: int):
    """Channels of a run."""
    return pl.ds(pl.multiple_of(index * run, run), run)


def _forward_kernel(width, run, is_branch, x_ref, *refs):
    branch, refs = (refs[:3], refs[3:]) if is_branch else (None, refs)
    k1, b1, taps, taps_bias, k2, b2, out_ref, map_ref, sum_ref, *input_refs = refs
    pixels, in_ref = x_ref.shape[1], x_ref
    if branch is not None:
        (in_ref,) = input_refs
        in_ref[0] = normalize(x_ref[0], *branch[1:])
    clear_borders(map_ref, width, pixels)
    sum_ref[...] = jnp.zeros_like(sum_ref) + b2[...]

    def step(index, _):
        at = at_run(index, run)
        hidden = _hidden(in_ref, k1[:, at], b1[:, at], taps[:, at], taps_bias[:, at], map_ref, width)
        active = (hidden * normal_cdf(hidden)).astype(k2.dtype)
        sum_ref[...] += dot(active, k2[at], 1, 0)
        return 0

    lax.fori_loop(0, k1.shape[1] // run, step, 0)
    total = sum_ref[...] if branch is None else x_ref[0] + branch[0][0] * sum_ref[...]
    out_ref[0] = total.astype(out_ref.dtype)


def _backward_kernel(width, run, is_branch, x_ref, *refs):
    branch, refs = (refs[:3], refs[3:]) if is_branch else (None, refs)
    k1, b1, taps, taps_bias, k2, _, gradient_ref, to_x, *refs = refs
    to_branch, refs = (refs[:2], refs[2:]) if is_branch else ([], refs)
    to_k1, to_b1, to_taps, to_taps_bias, to_k2, to_b2, map_ref, gradient_map_ref, sum_ref, *input_refs = refs
    pixels, dtype, in_ref, to_out_ref = x_ref.shape[1], k2.dtype, x_ref, gradient_ref
    if branch is not None:
        in_ref, to_out_ref = input_refs
        in_ref[0] = normalize(x_ref[0], *branch[1:])
        to_out_ref[0] = (gradient_ref[0] * branch[0][0]).astype(dtype)

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in (*to_branch, to_k1, to_b1, to_taps, to_taps_bias, to_k2, to_b2):
            ref[...] = jnp.zeros_like(ref)

    for ref in (map_ref, gradient_map_ref):
        clear_borders(ref, width, pixels)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    gradient = to_out_ref[0]
    to_b2[...] += gradient.astype(to_b2.dtype).sum(axis=0, keepdims=True)

    def step(index, _):
        at = at_run(index, run)
        hidden = _hidden(in_ref, k1[:, at], b1[:, at], taps[:, at], taps_bias[:, at], map_ref, width)
        below = normal_cdf(hidden)
        to_k2[at] += dot((hidden * below).astype(dtype), gradient, 0, 0)
        slope = below + hidden * jnp.exp(-0.5 * hidden * hidden) * (1 / math.sqrt(2 * math.pi))
        to_hidden = dot(gradient, k2[at], 1, 1) * slope
        to_taps_bias[:, at] += to_hidden.sum(axis=0, keepdims=True)
        sums = [(n * to_hidden).sum(axis=0, keepdims=True) for n in neighbors(map_ref, width, pixels)]
        to_taps[:, at] += jnp.concatenate(sums)
        store_map(gradient_map_ref, width, to_hidden)
        rotated = taps[:, at]
        for tap, neighbor in enumerate(neighbors(gradient_map_ref, width, pixels)):
            to_hidden = to_hidden + neighbor * rotated[8 - tap : 9 - tap]
        to_b1[:, at] += to_hidden.sum(axis=0, keepdims=True)
        to_hidden = to_hidden.astype(dtype)
        to_k1[:, at] += dot(in_ref[0], to_hidden, 0, 0)
        sum_ref[...] += dot(to_hidden, k1[:, at], 1, 1)
        return 0

    lax.fori_loop(0, k1.shape[1] // run, step, 0)
    total = sum_ref[...]
    if branch is not None:
        total = gradient_ref[0] + normalize_backward(x_ref[0], total, branch[1], *to_branch)
    to_x[0] = total.astype(to_x.dtype)
