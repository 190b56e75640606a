"""The MLP of DAT++: linear, a depthwise 3 x 3 convolution added, GELU, linear."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops import dispatch
from dat_jax.ops.calls import choose_call, tunable
from dat_jax.ops.layers.activation import gelu_linear
from dat_jax.ops.layers.depthwise import depthwise_conv
from dat_jax.ops.layers.normalization import layer_norm
from dat_jax.ops.pallas import mlp as pallas_mlp
from dat_jax.ops.pallas import mlp_spans
from dat_jax.ops.pallas.branch import Branch
from dat_jax.ops.pallas.call import MAX_UNROLLED_PIXELS, all_fit

_BATCHED = ("x", "factors")


def uses_pallas(
    shape: tuple[int, ...],
    hidden: int,
    *,
    dtype: Any = jnp.float32,
    implementation: str = "auto",
    is_branch: bool = False,
) -> bool:
    """Whether ``conv_mlp`` runs as a Pallas kernel: if it was chosen (see ``calls``) and fits in VMEM.

    Args:
      shape: (B, H, W, C), the shape of the input.
      hidden: E, the hidden width.
      dtype: of the input. The parameters are float32.
      implementation: see ``conv_mlp``.
      is_branch: whether the call has ``norm_scale``, ``norm_bias`` and ``factors``.
    """
    if not fits_kernel(shape, hidden, dtype=dtype):
        return False
    if implementation == "auto":
        channels = shape[-1]
        shapes = dict(
            kernel1=(channels, hidden),
            bias1=(hidden,),
            taps=(3, 3, 1, hidden),
            taps_bias=(hidden,),
            kernel2=(hidden, channels),
            bias2=(channels,),
        )
        if is_branch:
            shapes |= dict(norm_scale=(channels,), norm_bias=(channels,), factors=(shape[0],))
        arguments = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
        arguments = {"x": jax.ShapeDtypeStruct(shape, dtype), **arguments}
        implementation = choose_call("conv_mlp", conv_mlp, frozenset(_BATCHED), arguments)
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
    return _fits_whole(shape, hidden, dtype) or mlp_spans.choose_rows(shape, hidden, dtype) is not None


def _fits_whole(shape, hidden, dtype):
    """Whether the kernel of a whole map fits as a branch, which needs more memory than the MLP alone."""
    batch, height, width, channels = shape
    if height * width > MAX_UNROLLED_PIXELS:
        return False
    wide = jnp.promote_types(dtype, jnp.float32)
    struct: Any = jax.ShapeDtypeStruct
    parameters = pallas_mlp.Parameters.describe(channels, hidden, dtype)
    branch = Branch(struct((batch, 1, 1), wide), struct((1, channels), wide), struct((1, channels), wide))
    return all_fit(pallas_mlp.list_calls, struct(tuple(shape), dtype), parameters, branch)


@tunable("conv_mlp", batched=_BATCHED)
def conv_mlp(
    x: jax.Array,
    kernel1: jax.Array,
    bias1: jax.Array,
    taps: jax.Array,
    taps_bias: jax.Array,
    kernel2: jax.Array,
    bias2: jax.Array,
    *,
    norm_scale: jax.Array | None = None,
    norm_bias: jax.Array | None = None,
    factors: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """gelu(h + convolution(h)) kernel2 + bias2 with h = x kernel1 + bias1, and the exact GELU.

    With ``norm_scale``, ``norm_bias`` and ``factors`` it is a residual branch: x + factors * conv_mlp(layer_norm(x)).

    Args:
      x: (B, H, W, C).
      kernel1: (C, E), kernel of the first linear layer.
      bias1: (E,).
      taps: (3, 3, 1, E), kernel of the depthwise convolution.
      taps_bias: (E,).
      kernel2: (E, C), kernel of the second linear layer.
      bias2: (C,).
      norm_scale: (C,), scale of LayerNorm, float32 or better.
      norm_bias: (C,), bias of LayerNorm, float32 or better.
      factors: (B,), factor of each example's branch. It is constant: its gradient is zero.
      implementation: "products" runs op by op, each in the dtype of ``x``; "pallas" is a kernel for TPUs, which rounds to
        that dtype only the operands of the two matrix products. See ``dispatch``.

    Returns:
      (B, H, W, C), of the dtype of ``x``.

    Raises:
      ValueError: only some of ``norm_scale``, ``norm_bias`` and ``factors`` are given.

    Source: DAT++ (2309.01430), section 3.3.
    """
    if len({y is None for y in (norm_scale, norm_bias, factors)}) > 1:
        raise ValueError("conv_mlp expected all or none of norm_scale, norm_bias and factors.")
    parameters = (kernel1, bias1, taps, taps_bias, kernel2, bias2)
    fits = functools.partial(fits_kernel, x.shape, bias1.size, dtype=x.dtype)
    uses_kernel = dispatch.choose("conv_mlp", implementation, map_shape=x.shape[1:3], kernel_fits=fits) == "pallas"
    if uses_kernel and _fits_whole(x.shape, bias1.size, x.dtype):
        return _run_kernel(x, *parameters, norm=(norm_scale, norm_bias), factors=factors)
    branch = x
    if factors is not None and norm_scale is not None and norm_bias is not None:
        with dispatch.gradients_for(implementation):
            branch = layer_norm(x, norm_scale, norm_bias)
    run = _run_spans if uses_kernel else functools.partial(_run_products, implementation=implementation)
    branch = run(branch, *parameters)
    return branch if factors is None else x + scale_examples(branch, factors)


def scale_examples(x: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiplies the examples of (B, ...) by constant factors (B,), in the dtype of ``x``."""
    return x * lax.stop_gradient(factors).reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)


def _run_kernel(x, *parameters, norm, factors):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    branch = None if factors is None else Branch.make(lax.stop_gradient(factors), *norm, dtype=wide)
    return pallas_mlp.conv_mlp(x, _kernel_parameters(x, *parameters), branch)


def _run_spans(x, *parameters):
    made = _kernel_parameters(x, *parameters)
    rows = mlp_spans.choose_rows(x.shape, made.kernel1.shape[1], x.dtype)
    assert rows is not None  # ``fits_kernel``
    return mlp_spans.conv_mlp(x, made, rows)


def _kernel_parameters(x, kernel1, bias1, taps, taps_bias, kernel2, bias2):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    bias1, taps, taps_bias, bias2 = (y.reshape(-1, y.shape[-1]).astype(wide) for y in (bias1, taps, taps_bias, bias2))
    return pallas_mlp.Parameters(kernel1.astype(x.dtype), bias1, taps, taps_bias, kernel2.astype(x.dtype), bias2)


def _run_products(x, kernel1, bias1, taps, taps_bias, kernel2, bias2, *, implementation):
    kernel1, bias1, taps, taps_bias, kernel2, bias2 = (
        y.astype(x.dtype) for y in (kernel1, bias1, taps, taps_bias, kernel2, bias2)
    )
    x = x @ kernel1 + bias1.reshape(1, 1, 1, -1)
    convolved = depthwise_conv(x, taps, padding=1, implementation="plain" if implementation == "plain" else "auto")
    with dispatch.gradients_for(implementation):
        return gelu_linear(x + (convolved + taps_bias.reshape(1, 1, 1, -1)), kernel2, bias2)
