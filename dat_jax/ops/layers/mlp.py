"""The MLP of DAT++: linear, a depthwise 3 x 3 convolution added, GELU, linear."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch
from dat_jax.ops.calls import choose_call, tunable
from dat_jax.ops.layers.activation import gelu_linear
from dat_jax.ops.layers.depthwise import depthwise_conv
from dat_jax.ops.pallas import mlp as pallas_mlp
from dat_jax.ops.pallas import mlp_spans
from dat_jax.ops.pallas.call import MAX_UNROLLED_PIXELS


def uses_pallas(shape: tuple[int, ...], hidden: int, *, dtype: Any = jnp.float32, implementation: str = "auto") -> bool:
    """Whether ``conv_mlp`` runs as a Pallas kernel: if it was chosen (see ``calls``) and fits in VMEM.

    Args:
      shape: (B, H, W, C), the shape of the input.
      hidden: E, the hidden width.
      dtype: of the input. The parameters are float32.
      implementation: see ``conv_mlp``.
    """
    if not fits_kernel(shape, hidden, dtype=dtype):
        return False
    if implementation == "auto":
        channels = shape[-1]
        shapes = ((channels, hidden), (hidden,), (3, 3, 1, hidden), (hidden,), (hidden, channels), (channels,))
        names = ("kernel1", "bias1", "taps", "taps_bias", "kernel2", "bias2")
        arguments = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in zip(names, shapes, strict=True)}
        arguments = {"x": jax.ShapeDtypeStruct(shape, dtype), **arguments}
        implementation = choose_call("conv_mlp", conv_mlp, frozenset({"x"}), arguments)
    return dispatch.choose("conv_mlp", implementation, map_shape=tuple(shape[1:3])) == "pallas"


def fits_kernel(shape: tuple[int, ...], hidden: int, *, dtype: Any = jnp.float32) -> bool:
    """Whether a Pallas kernel can hold the weights of an MLP in VMEM, and a map or some of its rows.

    Args:
      shape: (B, H, W, C), the shape of the input.
      hidden: E, the hidden width.
      dtype: of the input.
    """
    if shape[-1] * hidden > pallas_mlp.MAX_WEIGHTS:
        return False
    return _fits_whole(shape) or mlp_spans.choose_rows(shape, hidden, dtype) is not None


def _fits_whole(shape):
    return shape[1] * shape[2] <= MAX_UNROLLED_PIXELS


@tunable("conv_mlp", batched=("x",))
def conv_mlp(
    x: jax.Array,
    kernel1: jax.Array,
    bias1: jax.Array,
    taps: jax.Array,
    taps_bias: jax.Array,
    kernel2: jax.Array,
    bias2: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """gelu(h + convolution(h)) kernel2 + bias2 with h = x kernel1 + bias1, and the exact GELU.

    Args:
      x: (B, H, W, C).
      kernel1: (C, E), kernel of the first linear layer.
      bias1: (E,).
      taps: (3, 3, 1, E), kernel of the depthwise convolution.
      taps_bias: (E,).
      kernel2: (E, C), kernel of the second linear layer.
      bias2: (C,).
      implementation: "products" runs op by op, each in the dtype of ``x``; "pallas" is a kernel for TPUs, which rounds to
        that dtype only the operands of the two matrix products. See ``dispatch``.

    Returns:
      (B, H, W, C), of the dtype of ``x``.

    Source: DAT++ (2309.01430), section 3.3.
    """
    fits = functools.partial(fits_kernel, x.shape, bias1.size, dtype=x.dtype)
    if dispatch.choose("conv_mlp", implementation, map_shape=x.shape[1:3], kernel_fits=fits) == "pallas":
        wide, hidden = jnp.promote_types(x.dtype, jnp.float32), bias1.size
        rows = (y.reshape(-1, y.shape[-1]).astype(wide) for y in (bias1, taps, taps_bias, bias2))
        bias1, taps, taps_bias, bias2 = rows
        kernel1, kernel2 = kernel1.astype(x.dtype), kernel2.astype(x.dtype)
        parameters = pallas_mlp.Parameters(kernel1, bias1, taps, taps_bias, kernel2, bias2)
        if _fits_whole(x.shape):
            return pallas_mlp.conv_mlp(x, parameters)
        return mlp_spans.conv_mlp(x, parameters, mlp_spans.choose_rows(x.shape, hidden, x.dtype))
    kernel1, bias1, taps, taps_bias, kernel2, bias2 = (
        y.astype(x.dtype) for y in (kernel1, bias1, taps, taps_bias, kernel2, bias2)
    )
    x = x @ kernel1 + bias1.reshape(1, 1, 1, -1)
    convolved = depthwise_conv(x, taps, padding=1, implementation="plain" if implementation == "plain" else "auto")
    with dispatch.gradients_for(implementation):
        return gelu_linear(x + (convolved + taps_bias.reshape(1, 1, 1, -1)), kernel2, bias2)
