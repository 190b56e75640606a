"""Multi-head attention whose scores never leave the chip: one kernel for the forward and one for the backward pass.

One grid step is one image:

* Its queries, keys and values are in VMEM as a whole, with packed channels, and heads are split there.
* The queries of a head are processed in spans, each with a range of keys.
* Scores are (keys, queries). Queries are along the 128 lanes, where a map of 14 x 14 or more wastes little, and keys along the 8
  sublanes, where 49 keys waste little.
* All keys of a query are present at once, so softmax needs no second pass. The backward pass recomputes the weights.

The bias is one of the classes in ``biases``: an array, shared by the batch or not, or the product of sampling weights and a dense
matrix, which is never written to memory.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dat_jax.ops.pallas.call import KernelCall, Result, dot


class Span(NamedTuple):
    """A range of queries that attends to a range of keys.

    Attributes:
      query: first query.
      queries: number of queries.
      key: first key.
      keys: number of keys.
      bias: index of the bias.
    """

    query: int
    queries: int
    key: int
    keys: int
    bias: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static arguments of a call.

    Attributes:
      num_heads: M.
      channels: C; heads are consecutive.
      spans: spans that cover all queries.
      columns: first channel of query, key and value in their arrays.
      packed: whether query, key and value are one array.
    """

    num_heads: int
    channels: int
    spans: tuple[Span, ...]
    columns: tuple[int, int, int] = (0, 0, 0)
    packed: bool = False

    @property
    def width(self) -> int:
        """D, channels per head."""
        return self.channels // self.num_heads

    @property
    def scale(self) -> float:
        """Factor of the logits, 1 / sqrt(D)."""
        return 1 / math.sqrt(self.width)

    @property
    def pairs(self) -> int:
        """Number of attention scores per example."""
        return self.num_heads * sum(span.queries * span.keys for span in self.spans)

    def head(self, index: int) -> slice:
        """Slice of the channels of a head."""
        return slice(index * self.width, (index + 1) * self.width)


def _rows(span_first, count):
    return slice(span_first, span_first + count)


def _load_span(refs, layout, span):
    """Query transposed (C, Q), key and value (K, C) of a span."""
    (q_ref, k_ref, v_ref), columns = refs, [slice(c, c + layout.channels) for c in layout.columns]
    queries, keys = _rows(span.query, span.queries), _rows(span.key, span.keys)
    return q_ref[0, queries, columns[0]].T, k_ref[0, keys, columns[1]], v_ref[0, keys, columns[2]]


def _weights(key, query_t, bias, scale):
    """Softmax over the keys: numerators (K, Q) and denominators (1, Q)."""
    logits = dot(key, query_t, 1, 0) * scale + bias
    numerators = jnp.exp(logits - logits.max(axis=0, keepdims=True))
    return numerators, numerators.sum(axis=0, keepdims=True)


def attend(layout: Layout, query_t, key, value, load_bias):
    """Attention of all heads, inside a kernel.

    Args:
      layout: the static arguments; its spans are not used.
      query_t: (C, Q).
      key: (K, C).
      value: (K, C).
      load_bias: function of a head that returns its bias (K, Q).

    Returns:
      (C, Q), float32 or better.
    """
    value_t = value.T
    outs = []
    for head in range(layout.num_heads):
        at = layout.head(head)
        weights, total = _weights(key[:, at], query_t[at], load_bias(head), layout.scale)
        outs.append(dot(value_t[at], weights.astype(value.dtype), 1, 0) / total)  # (D, Q)
    return jnp.concatenate(outs)


def attend_backward(layout: Layout, query_t, key, value, gradient_t, load_bias, add_gradient):
    """Gradients of ``attend``, inside a kernel, which compute the weights again.

    Args:
      layout: see ``attend``.
      query_t: see ``attend``.
      key: see ``attend``.
      value: see ``attend``.
      gradient_t: (C, Q), gradient of the result.
      load_bias: see ``attend``.
      add_gradient: function of a head and the gradient (K, Q) of its bias.

    Returns:
      Gradients of the query (C, Q), the key (C, K) and the value (C, K), transposed, float32 or better.
    """
    key_t = key.T
    to_query, to_key, to_value = [], [], []
    for head in range(layout.num_heads):
        at = layout.head(head)
        weights, total = _weights(key[:, at], query_t[at], load_bias(head), layout.scale)
        weights = weights / total
        to_value.append(dot(gradient_t[at], weights.astype(value.dtype), 1, 1))  # (D, K)
        to_weights = dot(value[:, at], gradient_t[at], 1, 0)
        to_logits = weights * (to_weights - (weights * to_weights).sum(axis=0, keepdims=True))
        add_gradient(head, to_logits)
        to_products = (to_logits * layout.scale).astype(value.dtype)
        to_query.append(dot(key_t[at], to_products, 1, 0))  # (D, Q)
        to_key.append(dot(query_t[at], to_products, 1, 1))  # (D, K)
    return tuple(map(jnp.concatenate, (to_query, to_key, to_value)))


def forward_kernel(layout: Layout, bias, operands: int, *refs) -> None:
    """Kernel of the forward pass, with references to ``operands`` operands and then to the result."""
    inputs, rest = refs[:operands], refs[operands:]
    count = 1 if layout.packed else 3
    qkv, bias_refs, out_ref = inputs[:count] * (3 // count), inputs[count:], rest[0]
    for span in layout.spans:
        out = attend(layout, *_load_span(qkv, layout, span), functools.partial(bias.load, bias_refs, span))
        out_ref[0, _rows(span.query, span.queries)] = out.T.astype(out_ref.dtype)


def backward_kernel(layout: Layout, bias, operands: int, *refs) -> None:
    """Kernel of the backward pass, with references to ``operands`` operands, to the results and to a buffer of sums."""
    inputs, rest = refs[:operands], refs[operands:]
    count = 1 if layout.packed else 3
    qkv, bias_refs, out_gradient = inputs[:count] * (3 // count), inputs[count:-1], inputs[-1]
    results, bias_results, sums = rest[:count] * (3 // count), rest[count:-1], rest[-1]
    bias.start(bias_results)
    sums[...] = jnp.zeros_like(sums)
    columns = [slice(c, c + layout.channels) for c in layout.columns]
    for span in layout.spans:
        queries, keys = _rows(span.query, span.queries), _rows(span.key, span.keys)
        to_query, to_key, to_value = attend_backward(
            layout,
            *_load_span(qkv, layout, span),
            out_gradient[0, queries].T,
            functools.partial(bias.load, bias_refs, span),
            functools.partial(bias.add_gradient, bias_refs, bias_results, span),
        )
        results[0][0, queries, columns[0]] = to_query.T.astype(results[0].dtype)
        sums[0, keys] += to_key.T
        sums[1, keys] += to_value.T
    for index in (1, 2):
        results[index][0, :, columns[index]] = sums[index - 1].astype(results[index].dtype)


def attention(layout: Layout, bias, arrays: tuple[jax.Array, ...], bias_arrays: tuple[jax.Array, ...]) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v of a batch of packed arrays.

    Args:
      layout: the static arguments.
      bias: an instance of a class in ``biases``.
      arrays: query (B, Q, C), key and value (B, K, C), of one dtype; or one array with all three side by side.
      bias_arrays: the arrays of ``bias``, float32.

    Returns:
      (B, Q, C), of the dtype of ``arrays``. Logits and softmax are float32 or better.

    Raises:
      ValueError: see ``call.KernelCall``.
    """
    return _attention(layout, bias, arrays, bias_arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(layout, bias, arrays, bias_arrays):
    return _run_forward(layout, bias, arrays, bias_arrays)


def _attention_forward(layout, bias, arrays, bias_arrays):
    return _run_forward(layout, bias, arrays, bias_arrays), (arrays, bias_arrays)


def _run_forward(layout, bias, arrays, bias_arrays):
    (out,) = _forward_call(layout, bias, arrays, bias_arrays).run()
    return out


def _forward_call(layout, bias, arrays, bias_arrays):
    operands = [*((x, True) for x in arrays), *bias.operands(*bias_arrays)]
    pairs = layout.pairs
    return KernelCall(
        functools.partial(forward_kernel, layout, bias, len(operands)),
        operands,
        [Result((*arrays[0].shape[:2], layout.channels), arrays[0].dtype, batched=True)],
        flops=4 * layout.width * pairs + bias.flops(operands),
        exponentials=pairs,
        work_bytes=work_bytes(layout, arrays[0].dtype),
        name="attention_forward",
    )


def _attention_backward(layout, bias, residuals, gradient):
    arrays, bias_arrays = residuals
    gradients = _backward_call(layout, bias, arrays, bias_arrays, gradient).run()
    return tuple(gradients[: len(arrays)]), tuple(gradients[len(arrays) :])


_attention.defvjp(_attention_forward, _attention_backward)


def _backward_call(layout, bias, arrays, bias_arrays, gradient):
    bias_operands = bias.operands(*bias_arrays)
    operands = [*((x, True) for x in arrays), *bias_operands, (gradient, True)]
    results = [*(Result(x.shape, x.dtype, batched=True) for x in arrays), *bias.results(bias_operands)]
    dtype = jnp.promote_types(arrays[0].dtype, jnp.float32)
    return KernelCall(
        functools.partial(backward_kernel, layout, bias, len(operands)),
        operands,
        results,
        flops=10 * layout.width * layout.pairs + 3 * bias.flops(bias_operands),
        exponentials=layout.pairs,
        work_bytes=work_bytes(layout, arrays[0].dtype),
        name="attention_backward",
        scratch=[pltpu.VMEM((2, arrays[-1].shape[1], layout.channels), dtype)],
    )


def fits(layout: Layout, bias, arrays: tuple[Any, ...], bias_arrays: tuple[Any, ...]) -> bool:
    """Whether the kernels of ``attention`` fit in VMEM. The arrays may be ShapeDtypeStructs."""
    gradient = jax.ShapeDtypeStruct((*arrays[0].shape[:2], layout.channels), arrays[0].dtype)
    forward = _forward_call(layout, bias, arrays, bias_arrays)
    return forward.fits and _backward_call(layout, bias, arrays, bias_arrays, gradient).fits


def work_bytes(layout: Layout, dtype) -> int:
    """Memory for four arrays of the size of the scores of the largest span, and a few copies of the channels."""
    scores = max(math.ceil(s.keys / 8) * 8 * math.ceil(s.queries / 128) * 128 for s in layout.spans)
    rows = max(max(s.keys, s.queries) for s in layout.spans)
    return 4 * (4 * scores + 8 * rows * max(layout.channels, 128))
