"""LayerNorm and a linear layer of its result in one kernel, which reads the map once in each direction."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dat_jax.ops.pallas.branch import normalize, normalize_backward
from dat_jax.ops.pallas.call import KernelCall, Result, dot


@jax.custom_vjp
def norm_linear(
    x: jax.Array, scale: jax.Array, shift: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The normalized map and its projection.

    Args:
      x: (B, P, C).
      scale: (1, C), scale of LayerNorm, float32 or better.
      shift: (1, C), bias of LayerNorm, float32 or better.
      kernel: (C, features), float32 or better.
      bias: (1, features), float32 or better.

    Returns:
      (B, P, C) and (B, P, features), of the dtype of ``x``.
    """
    normalized, out = _forward_call(x, scale, shift, kernel, bias).run()
    return normalized, out


def list_calls(
    x: jax.Array, scale: jax.Array, shift: jax.Array, kernel: jax.Array, bias: jax.Array
) -> list[KernelCall]:
    """The calls of ``norm_linear`` with these arguments and of its backward pass."""
    forward = _forward_call(x, scale, shift, kernel, bias)
    gradients = (jax.ShapeDtypeStruct(r.shape, r.dtype) for r in forward.results)
    return [forward, _backward_call(x, scale, shift, kernel, *gradients)]


def _forward_call(x, scale, shift, kernel, bias):
    operands = [(x, True), *((y, False) for y in (scale, shift, kernel.astype(x.dtype), bias))]
    shapes = x.shape, (*x.shape[:2], kernel.shape[1])
    results = [Result(shape, x.dtype, batched=True) for shape in shapes]
    return _call(_forward_kernel, operands, results, kernel, products=1)


def _forward(x, scale, shift, kernel, bias):
    return norm_linear(x, scale, shift, kernel, bias), (x, scale, shift, kernel)


def _backward(residuals, gradients):
    return tuple(_backward_call(*residuals, *gradients).run())


norm_linear.defvjp(_forward, _backward)


def _backward_call(x, scale, shift, kernel, *gradients):
    parameters = ((y, False) for y in (scale, shift, kernel.astype(x.dtype)))
    operands = [(x, True), *parameters, *((gradient, True) for gradient in gradients)]
    sums = (scale.shape, shift.shape, kernel.shape, (1, kernel.shape[1]))
    results = [Result(x.shape, x.dtype, batched=True), *(Result(s, kernel.dtype, batched=False) for s in sums)]
    return _call(_backward_kernel, operands, results, kernel, products=2)


def _call(kernel_function, operands, results, kernel, *, products) -> KernelCall:
    pixels, channels = operands[0][0].shape[1:]
    return KernelCall(
        kernel_function,
        operands,
        results,
        flops=2 * products * pixels * kernel.size,
        exponentials=0,
        work_bytes=kernel.dtype.itemsize * pixels * (4 * max(channels, 128) + 2 * max(kernel.shape[1], 128)),
        name=f"norm_linear{kernel_function.__name__.removesuffix('_kernel')}",
    )


def _forward_kernel(x_ref, scale, shift, kernel, bias, normalized_ref, out_ref):
    normalized = normalize(x_ref[0], scale, shift)
    normalized_ref[0] = normalized
    out_ref[0] = (dot(normalized, kernel[...], 1, 0) + bias[...]).astype(out_ref.dtype)


def _backward_kernel(x_ref, scale, shift, kernel, to_normalized, to_out, to_x, to_scale, to_shift, to_kernel, to_bias):
    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in (to_scale, to_shift, to_kernel, to_bias):
            ref[...] = jnp.zeros_like(ref)

    gradient = to_out[0]
    to_kernel[...] += dot(normalize(x_ref[0], scale, shift), gradient, 0, 0)
    to_bias[...] += gradient.astype(to_bias.dtype).sum(axis=0, keepdims=True)
    total = to_normalized[0] + dot(gradient, kernel[...], 1, 1)
    to_x[0] = normalize_backward(x_ref[0], total, scale, to_scale, to_shift).astype(to_x.dtype)
