"""The local perception unit, x plus a depthwise 3 x 3 convolution of x, on flat maps as in ``mlp``.

The other kernels of a block read and write flat maps (H * W, C), row by row. A convolution of the compiler would have another
layout, with a copy before and after it, in both directions.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dat_jax.ops.pallas import mlp
from dat_jax.ops.pallas.call import KernelCall, Result


def local_perception(x: jax.Array, taps: jax.Array, bias: jax.Array) -> jax.Array:
    """See ``ops.layers.local_perception``.

    Args:
      x: (B, H, W, C).
      taps: (9, C), float32 or better.
      bias: (1, C), float32 or better.

    Returns:
      (B, H, W, C).
    """
    batch, height, width, channels = x.shape
    out = _perceive(width, x.reshape(batch, height * width, channels), taps, bias)
    return out.reshape(x.shape)  # pyright: ignore[reportAttributeAccessIssue] (custom_vjp loses the type of the result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _perceive(width, x, taps, bias):
    return _forward_call(width, x, taps, bias).run()[0]


def _perceive_forward(width, x, taps, bias):
    return _perceive(width, x, taps, bias), (x, taps)


def _perceive_backward(width, residuals, gradient):
    x, taps = residuals
    return tuple(_backward_call(width, x, taps, gradient).run())


_perceive.defvjp(_perceive_forward, _perceive_backward)


def list_calls(x: jax.Array, taps: jax.Array, bias: jax.Array) -> list[KernelCall]:
    """The calls of ``local_perception`` with these arguments and of its backward pass."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height * width, channels)
    return [_forward_call(width, x, taps, bias), _backward_call(width, x, taps, x)]


def _forward_call(width, x, taps, bias):
    operands = [(x, True), (taps, False), (bias, False)]
    return _call(_forward_kernel, width, operands, [Result(x.shape, x.dtype, True)], products=1)


def _backward_call(width, x, taps, gradient):
    operands = [(x, True), (taps, False), (gradient, True)]
    rows = ((9, x.shape[2]), (1, x.shape[2]))
    results = [Result(x.shape, x.dtype, True), *(Result(shape, taps.dtype, False) for shape in rows)]
    return _call(_backward_kernel, width, operands, results, products=2)


def _call(kernel, width, operands, results, *, products) -> KernelCall:
    x, taps = operands[0][0], operands[1][0]
    pixels, channels = x.shape[1:]
    run = mlp.LANES if channels % mlp.LANES == 0 else channels
    shape = (3, pixels + 2 * mlp.border_rows(width), run)
    stored = taps.dtype.itemsize * max(run, mlp.LANES)
    return KernelCall(
        functools.partial(kernel, width, run),
        operands,
        results,
        flops=18 * products * pixels * channels,
        exponentials=0,
        work_bytes=stored * (8 * pixels + 3 * products * shape[1]),
        name=f"local_perception{kernel.__name__.removesuffix('_kernel')}",
        scratch=[pltpu.VMEM(shape, taps.dtype)] * products,
    )


def _convolve(ref, values, taps, width):
    """values plus their convolution; ``ref`` keeps the map for ``mlp.neighbors``."""
    mlp.store_map(ref, width, values)
    out = values
    for tap, neighbor in enumerate(mlp.neighbors(ref, width, values.shape[0])):
        out = out + neighbor * taps[tap]
    return out


def _forward_kernel(width, run, x_ref, taps, bias, out_ref, map_ref):
    pixels, channels = x_ref.shape[1:]
    mlp.clear_borders(map_ref, width, pixels)

    def step(index, _):
        at = mlp.at_run(index, run)
        rows = [taps[tap : tap + 1, at] for tap in range(9)]
        out = _convolve(map_ref, x_ref[0, :, at].astype(taps.dtype), rows, width) + bias[:, at]
        out_ref[0, :, at] = out.astype(out_ref.dtype)
        return 0

    lax.fori_loop(0, channels // run, step, 0)


def _backward_kernel(width, run, x_ref, taps, gradient_ref, to_x, to_taps, to_bias, map_ref, gradient_map_ref):
    pixels, channels = x_ref.shape[1:]

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in (to_taps, to_bias):
            ref[...] = jnp.zeros_like(ref)

    for ref in (map_ref, gradient_map_ref):
        mlp.clear_borders(ref, width, pixels)

    def step(index, _):
        at = mlp.at_run(index, run)
        gradient = gradient_ref[0, :, at].astype(taps.dtype)
        mlp.store_map(map_ref, width, x_ref[0, :, at].astype(taps.dtype))
        sums = [(n * gradient).sum(axis=0, keepdims=True) for n in mlp.neighbors(map_ref, width, pixels)]
        to_taps[:, at] += jnp.concatenate(sums)
        to_bias[:, at] += gradient.sum(axis=0, keepdims=True)
        rotated = [taps[tap : tap + 1, at] for tap in reversed(range(9))]
        to_x[0, :, at] = _convolve(gradient_map_ref, gradient, rotated, width).astype(to_x.dtype)
        return 0

    lax.fori_loop(0, channels // run, step, 0)
