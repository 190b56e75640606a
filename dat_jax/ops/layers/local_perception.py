"""The local perception unit of DAT++: a depthwise 3 x 3 convolution with a residual."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch
from dat_jax.ops.calls import choose_call, tunable
from dat_jax.ops.layers.depthwise import depthwise_conv
from dat_jax.ops.pallas import local_perception as pallas_local_perception
from dat_jax.ops.pallas.call import all_fit, is_unrolled


@tunable("local_perception", batched=("x",))
def local_perception(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """x + (convolution(x) + bias), with zero padding.

    Args:
      x: (B, H, W, C).
      kernel: (3, 3, 1, C).
      bias: (C,).
      implementation: "products" runs op by op, each in the dtype of ``x``; "pallas" is a kernel for TPUs, which computes in
        float32 or better. See ``dispatch``.

    Returns:
      (B, H, W, C), of the dtype of ``x``.

    Source: CMT (2107.06263), as DAT++ (2309.01430) uses it.
    """
    if _choose(implementation, x.shape, x.dtype) == "pallas":
        wide = jnp.promote_types(x.dtype, jnp.float32)
        taps, bias = (y.reshape(-1, y.shape[-1]).astype(wide) for y in (kernel, bias))
        return pallas_local_perception.local_perception(x, taps, bias)
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    convolved = depthwise_conv(x, kernel, padding=1, implementation="plain" if implementation == "plain" else "auto")
    return x + (convolved + bias.reshape(1, 1, 1, -1))


def uses_pallas(shape: tuple[int, ...], *, dtype: Any = jnp.float32, implementation: str = "auto") -> bool:
    """Whether ``local_perception`` of (B, H, W, C) runs as a Pallas kernel. The parameters are float32."""
    if implementation == "auto":
        parameters = {"kernel": (3, 3, 1, shape[-1]), "bias": shape[-1:]}
        arguments = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in parameters.items()}
        arguments = {"x": jax.ShapeDtypeStruct(shape, dtype), **arguments}
        implementation = choose_call("local_perception", local_perception, frozenset({"x"}), arguments)
    return _choose(implementation, shape, dtype) == "pallas"


def fits_kernel(shape: tuple[int, ...], *, dtype: Any = jnp.float32) -> bool:
    """Whether there is a Pallas kernel for (B, H, W, C) that fits in VMEM."""
    wide = jnp.promote_types(dtype, jnp.float32)
    shapes = ((tuple(shape), dtype), ((9, shape[3]), wide), ((1, shape[3]), wide))
    arrays = (jax.ShapeDtypeStruct(*array) for array in shapes)
    return is_unrolled(shape[1:3]) and all_fit(pallas_local_perception.list_calls, *arrays)


def _choose(implementation, shape, dtype):
    fits = functools.partial(fits_kernel, shape, dtype=dtype)
    return dispatch.choose("local_perception", implementation, map_shape=tuple(shape[1:3]), kernel_fits=fits)
