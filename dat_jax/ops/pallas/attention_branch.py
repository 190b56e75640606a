"""A block's attention as one kernel: x + factor * projection(attention(projection(LayerNorm(x)))).

The normalized map, queries and, in neighborhood attention, keys and values stay on the chip. The forward pass stores the result
of the attention for the backward pass, which recomputes the rest from ``x``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dat_jax.ops.pallas import attention
from dat_jax.ops.pallas.branch import Branch, normalize, normalize_backward
from dat_jax.ops.pallas.call import KernelCall, Result, dot

MAX_CHANNELS = 768  # the projections and their float32 gradients are in VMEM, each twice


class Projections(NamedTuple):
    """Linear layers before and after the attention, float32 or better.

    Attributes:
      kernel_in: (C, 3C), or (C, C) if only queries are projected.
      bias_in: (1, 3C) or (1, C).
      kernel_out: (C, C).
      bias_out: (1, C).
    """

    kernel_in: jax.Array
    bias_in: jax.Array
    kernel_out: jax.Array
    bias_out: jax.Array

    @classmethod
    def make(cls, kernel_in, bias_in, kernel_out, bias_out, *, dtype) -> "Projections":
        """Projections with biases as vectors, converted to ``dtype``."""
        parameters = (kernel_in, bias_in.reshape(1, -1), kernel_out, bias_out.reshape(1, -1))
        return cls(*(p.astype(dtype) for p in parameters))


def attention_branch(
    layout: attention.Layout,
    bias,
    x: jax.Array,
    branch: Branch,
    projections: Projections,
    pairs: tuple[jax.Array, ...],
    bias_arrays: tuple[jax.Array, ...],
) -> jax.Array:
    """x + factor * (attention(...) kernel_out + bias_out), with the projection of LayerNorm(x) as the queries.

    Args:
      layout: see ``attention``; packed if ``x`` is projected to query, key and value.
      bias: an instance of a class in ``biases``.
      x: (B, P, C).
      branch: LayerNorm, and factors of the branch.
      projections: the linear layers.
      pairs: key and value (B, N, C) of the dtype of ``x``; empty if the layout is packed.
      bias_arrays: see ``attention``.

    Returns:
      (B, P, C), of the dtype of ``x``.

    Raises:
      ValueError: see ``call.KernelCall``.
    """
    return _attend(layout, bias, x, branch, projections, pairs, bias_arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(layout, bias, x, branch, projections, pairs, bias_arrays):
    return _forward_call(layout, bias, x, branch, projections, pairs, bias_arrays, store=False).run()[0]


def _attend_forward(layout, bias, *arrays):
    out, attended = _forward_call(layout, bias, *arrays, store=True).run()
    return out, (*arrays, attended)


def list_calls(layout: attention.Layout, bias, *arrays) -> list[KernelCall]:
    """The calls of ``attention_branch`` with these arguments and of its backward pass."""
    x = arrays[0]
    forward = _forward_call(layout, bias, *arrays, store=True)
    return [forward, _backward_call(layout, bias, *arrays, attended=x, gradient=x)]


def _forward_call(layout, bias, x, branch, projections, pairs, bias_arrays, *, store) -> KernelCall:
    """It computes the result, and that of the attention if it is stored."""
    bias_operands = bias.operands(*bias_arrays)
    operands = [*_list_operands(x, branch, projections, pairs), *bias_operands]
    same = Result(x.shape, x.dtype, batched=True)
    scratch = [] if store else [pltpu.VMEM((1, *x.shape[1:]), x.dtype)]
    return KernelCall(
        functools.partial(_forward_kernel, layout, bias, len(operands)),
        operands,
        [same, same] if store else [same],
        flops=_projection_flops(x, projections) + 4 * layout.width * layout.pairs + bias.flops(bias_operands),
        exponentials=layout.pairs,
        work_bytes=_work_bytes(layout, x, projections),
        name="attention_branch_forward",
        scratch=[*scratch, _projected(x, projections)],
    )


def _attend_backward(layout, bias, residuals, gradient):
    *arrays, attended = residuals
    _, branch, _, pairs, _ = arrays
    call = _backward_call(layout, bias, *arrays, attended=attended, gradient=gradient)
    to_x, to_scale, to_bias, *gradients = call.run()
    branch = Branch(jnp.zeros_like(branch.factors), to_scale, to_bias)
    count = len(pairs)
    return to_x, branch, Projections(*gradients[:4]), tuple(gradients[4 : 4 + count]), tuple(gradients[4 + count :])


_attend.defvjp(_attend_forward, _attend_backward)


def _backward_call(layout, bias, x, branch, projections, pairs, bias_arrays, *, attended, gradient) -> KernelCall:
    bias_operands = bias.operands(*bias_arrays)
    operands = [*_list_operands(x, branch, projections, pairs), *bias_operands, (attended, True), (gradient, True)]
    results = [
        Result(x.shape, x.dtype, batched=True),
        *branch.results(),
        *(Result(p.shape, p.dtype, batched=False) for p in projections),
        *(Result(p.shape, p.dtype, batched=True) for p in pairs),
        *bias.results(bias_operands),
    ]
    keys = pairs[0].shape[1] if pairs else x.shape[1]
    row = pltpu.VMEM((1, *x.shape[1:]), x.dtype)
    sums = pltpu.VMEM((2, keys, layout.channels), jnp.promote_types(x.dtype, jnp.float32))
    return KernelCall(
        functools.partial(_backward_kernel, layout, bias, len(operands)),
        operands,
        results,
        flops=3 * _projection_flops(x, projections) + 10 * layout.width * layout.pairs + 3 * bias.flops(bias_operands),
        exponentials=layout.pairs,
        work_bytes=2 * _work_bytes(layout, x, projections),
        name="attention_branch_backward",
        scratch=[row, row, _projected(x, projections), _projected(x, projections), sums],
    )


def _list_operands(x, branch, projections, pairs):
    kernel_in, bias_in, kernel_out, bias_out = projections
    parameters = (kernel_in.astype(x.dtype), bias_in, kernel_out.astype(x.dtype), bias_out)
    return [(x, True), *branch.operands(), *((p, False) for p in parameters), *((p, True) for p in pairs)]


def _projected(x, projections):
    return pltpu.VMEM((1, x.shape[1], projections.kernel_in.shape[1]), x.dtype)


def _projection_flops(x, projections):
    return 2 * x.shape[1] * (projections.kernel_in.size + projections.kernel_out.size)


def _work_bytes(layout, x, projections):
    """Memory of the attention, of the projected map in two dtypes, and of a few wide maps."""
    lanes = max(projections.kernel_in.shape[1], 128) + 3 * max(x.shape[2], 128)
    return attention.work_bytes(layout, x.dtype) + 6 * x.shape[1] * lanes


def _project(x_ref, scale, shift, kernel_in, bias_in, projected_ref):
    """Stores the projection of the normalized map, and returns that map."""
    normalized = normalize(x_ref[0], scale, shift)
    projected_ref[0] = (dot(normalized, kernel_in[...], 1, 0) + bias_in[...]).astype(projected_ref.dtype)
    return normalized


def _forward_kernel(layout, bias, operands, *refs):
    x_ref, factor, scale, shift, kernel_in, bias_in, kernel_out, bias_out, *others = refs[:operands]
    out_ref, attended_ref, projected_ref = refs[operands:]
    _project(x_ref, scale, shift, kernel_in, bias_in, projected_ref)
    attention.forward_kernel(layout, bias, 1 + len(others), projected_ref, *others, attended_ref)
    branch = dot(attended_ref[0], kernel_out[...], 1, 0) + bias_out[...]
    out_ref[0] = (x_ref[0] + factor[0] * branch).astype(out_ref.dtype)


def _backward_kernel(layout, bias, operands, *refs):
    x_ref, factor, scale, shift, kernel_in, bias_in, kernel_out, _, *others = refs[: operands - 2]
    attended_ref, gradient_ref = refs[operands - 2 : operands]
    to_x, to_scale, to_shift, to_kernel_in, to_bias_in, to_kernel_out, to_bias_out, *to_others = refs[operands:-5]
    normalized_ref, to_attended_ref, projected_ref, to_projected_ref, sums_ref = refs[-5:]

    @pl.when(pl.program_id(0) == 0)
    def _():
        for ref in (to_scale, to_shift, to_kernel_in, to_bias_in, to_kernel_out, to_bias_out):
            ref[...] = jnp.zeros_like(ref)

    dtype = x_ref.dtype
    to_branch = (gradient_ref[0] * factor[0]).astype(dtype)
    to_kernel_out[...] += dot(attended_ref[0], to_branch, 0, 0)
    to_bias_out[...] += to_branch.astype(to_bias_out.dtype).sum(axis=0, keepdims=True)
    to_attended_ref[0] = dot(to_branch, kernel_out[...], 1, 1).astype(dtype)
    normalized_ref[0] = _project(x_ref, scale, shift, kernel_in, bias_in, projected_ref)
    inputs, results = (projected_ref, *others, to_attended_ref), (to_projected_ref, *to_others, sums_ref)
    attention.backward_kernel(layout, bias, len(inputs), *inputs, *results)
    to_projected = to_projected_ref[0]
    to_kernel_in[...] += dot(normalized_ref[0], to_projected, 0, 0)
    to_bias_in[...] += to_projected.astype(to_bias_in.dtype).sum(axis=0, keepdims=True)
    to_normalized = dot(to_projected, kernel_in[...], 1, 1)
    to_input = normalize_backward(x_ref[0], to_normalized, scale, to_scale, to_shift)
    to_x[0] = (gradient_ref[0] + to_input).astype(dtype)
