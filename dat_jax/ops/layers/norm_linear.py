"""LayerNorm followed by a linear layer, both of whose results are used."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch
from dat_jax.ops.calls import choose_call
from dat_jax.ops.layers.linear import linear
from dat_jax.ops.layers.normalization import layer_norm
from dat_jax.ops.pallas import norm_linear as pallas_norm_linear
from dat_jax.ops.pallas.call import all_fit, is_unrolled

MAX_WEIGHTS = 2**20  # C * features: the kernel and its float32 gradient are in VMEM, each twice


def norm_linear(
    x: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """n = layer_norm(x) and n kernel + bias.

    Args:
      x: (B, H, W, C).
      norm_scale: (C,), float32 or better.
      norm_bias: (C,), float32 or better.
      kernel: (C, features).
      bias: (features,).
      implementation: "products" runs op by op, each in the dtype of ``x``; "pallas" is a kernel for TPUs. See ``dispatch``.

    Returns:
      (B, H, W, C) and (B, H, W, features), of the dtype of ``x``.
    """
    if implementation == "auto":
        implementation = choose_norm_linear(x.shape, kernel.shape[1], x.dtype)
    fits = functools.partial(fits_kernel, x.shape, kernel.shape[1], dtype=x.dtype)
    if dispatch.choose("norm_linear", implementation, map_shape=x.shape[1:3], kernel_fits=fits) == "pallas":
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale, shift, bias = (y.reshape(1, -1).astype(wide) for y in (norm_scale, norm_bias, bias))
        flat = x.reshape(x.shape[0], -1, x.shape[3])
        maps = pallas_norm_linear.norm_linear(flat, scale, shift, kernel.astype(wide), bias)
        normalized, out = (y.reshape(*x.shape[:3], -1) for y in maps)
        return normalized, out
    with dispatch.gradients_for(implementation):
        normalized = layer_norm(x, norm_scale, norm_bias)
        return normalized, linear(normalized, kernel.astype(x.dtype), bias.astype(x.dtype))


def fits_kernel(shape: tuple[int, ...], features: int, *, dtype: Any = jnp.float32) -> bool:
    """Whether there is a Pallas kernel for (B, H, W, C) with this number of features that fits in VMEM."""
    batch, height, width, channels = shape
    if channels * features > MAX_WEIGHTS or not is_unrolled((height, width)):
        return False
    wide = jnp.promote_types(dtype, jnp.float32)
    shapes = ((1, channels), (1, channels), (channels, features), (1, features))
    parameters = (jax.ShapeDtypeStruct(s, wide) for s in shapes)
    x = jax.ShapeDtypeStruct((batch, height * width, channels), dtype)
    return all_fit(pallas_norm_linear.list_calls, x, *parameters)


def concatenated_norm_linear(*arrays: jax.Array, implementation: str = "auto", **named: jax.Array) -> jax.Array:
    """Both results of ``norm_linear`` side by side, (B, H, W, C + features), to compare implementations."""
    return jnp.concatenate(norm_linear(*arrays, **named, implementation=implementation), axis=-1)


def choose_norm_linear(shape: tuple[int, ...], features: int, dtype: Any) -> str:
    """The implementation that was chosen for ``norm_linear`` of (B, H, W, C), or "auto". The call is recorded, see ``calls``."""
    channels = shape[3]
    parameters = dict(norm_scale=(channels,), norm_bias=(channels,), kernel=(channels, features), bias=(features,))
    arguments = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in parameters.items()}
    arguments = {"x": jax.ShapeDtypeStruct(shape, dtype), **arguments}
    return choose_call("norm_linear", concatenated_norm_linear, frozenset({"x"}), arguments)
