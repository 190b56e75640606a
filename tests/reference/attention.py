"""Attention, one head at a time, over all pairs of pixels: a rule decides for each pair whether it is masked and its bias."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.reference import sampling


def attend(query, key, value, *, num_heads, bias=None, allowed=None):
    """(B, Nq, C), (B, Nk, C) x 2 -> (B, Nq, C).

    bias is (B | 1, M, Nq, Nk); allowed is (Nq, Nk), True where a query sees a key.
    """
    width = query.shape[-1] // num_heads
    outs = []
    for head in range(num_heads):
        q, k, v = (x[..., head * width : (head + 1) * width] for x in (query, key, value))
        logits = jnp.einsum("bqd,bkd->bqk", q, k) / math.sqrt(width)
        if bias is not None:
            logits = logits + bias[:, head]
        weights = jnp.exp(logits)
        if allowed is not None:
            weights = weights * allowed[None]
        outs.append(jnp.einsum("bqk,bkd->bqd", weights / weights.sum(axis=-1, keepdims=True), v))
    return jnp.concatenate(outs, axis=-1)


def pixels(map_shape):
    """All (row, column) pairs of a map, in the order of the flattened map."""
    return [(i, j) for i in range(map_shape[0]) for j in range(map_shape[1])]


def attend_over_map(query, key, value, **options):
    """``attend`` from all pixels of maps (B, H, W, C) to all pixels."""
    flat = [x.reshape(x.shape[0], -1, x.shape[-1]) for x in (query, key, value)]
    return attend(*flat, **options).reshape(query.shape)


def neighborhood(position, size, kernel_size):
    """Keys of a query along one axis: a window around it, shifted inward at the borders."""
    start = min(max(position - kernel_size // 2, 0), size - kernel_size)
    return range(start, start + kernel_size)


def neighborhood_attention(query, key, value, table, *, kernel_size, num_heads):
    """Maps (B, H, W, C); table (M, 2K - 1, 2K - 1), read at key - query + K - 1."""
    map_shape = height, width = query.shape[1:3]
    allowed = np.zeros((height * width, height * width), bool)
    index = np.zeros((2, *allowed.shape), int)
    for q, (qi, qj) in enumerate(pixels(map_shape)):
        for k, (ki, kj) in enumerate(pixels(map_shape)):
            if ki in neighborhood(qi, height, kernel_size) and kj in neighborhood(qj, width, kernel_size):
                allowed[q, k] = True
                index[:, q, k] = ki - qi + kernel_size - 1, kj - qj + kernel_size - 1
    bias = table[:, index[0], index[1]][None]
    return attend_over_map(query, key, value, num_heads=num_heads, bias=bias, allowed=allowed)


def window_attention(query, key, value, table, *, window_size, num_heads, shifted):
    """Maps (B, H, W, C); table ((2w - 1)^2, M)."""
    map_shape, w = query.shape[1:3], window_size
    shift = math.ceil(w / 2) if shifted else 0

    def rolled(pixel):
        """Position of the pixel after rolling the map by -shift."""
        return [(position - shift) % size for position, size in zip(pixel, map_shape, strict=True)]

    def window(pixel):
        return [position // w for position in rolled(pixel)]

    def region(pixel):
        """Bands of the rolled map: pixels of one region were neighbors before the roll."""
        splits = [(size - w, size - shift) for size in map_shape]
        return [(p >= first) + (p >= second) for p, (first, second) in zip(rolled(pixel), splits, strict=True)]

    pairs = len(pixels(map_shape))
    allowed, index, penalty = np.zeros((pairs, pairs), bool), np.zeros((pairs, pairs), int), np.zeros((pairs, pairs))
    for q, query_pixel in enumerate(pixels(map_shape)):
        for k, key_pixel in enumerate(pixels(map_shape)):
            if window(query_pixel) == window(key_pixel):
                dy, dx = (a - b for a, b in zip(rolled(query_pixel), rolled(key_pixel), strict=True))
                allowed[q, k] = True
                index[q, k] = (dy + w - 1) * (2 * w - 1) + (dx + w - 1)
                if shifted and region(query_pixel) != region(key_pixel):
                    penalty[q, k] = -100.0
    bias = jnp.moveaxis(table[index], -1, 0)[None] + penalty[None, None]
    return attend_over_map(query, key, value, num_heads=num_heads, bias=bias, allowed=allowed)


def slide_attention(query, key, value, kernel, bias, table, *, num_heads, scale):
    """Maps (B, H, W, M * D); kernel (3, 3, 1, 9 * D), bias (9 * D,), table (M, 9)."""
    batch, height, width, channels = query.shape
    head_width = channels // num_heads
    one_hot = np.zeros(kernel.shape)
    for c in range(head_width):
        for dy in range(3):
            for dx in range(3):
                one_hot[dy, dx, 0, 9 * c + 3 * dy + dx] = 1

    def convolve(x, weights):
        return lax.conv_general_dilated(
            x,
            weights,
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=head_width,
        )

    outs = []
    for head in range(num_heads):
        q, k, v = (x[..., head * head_width : (head + 1) * head_width] for x in (query, key, value))
        k, v = (
            (convolve(x, jnp.asarray(one_hot, x.dtype)) + convolve(x, kernel) + bias[None, None, None]).reshape(
                batch, height, width, head_width, 9
            )
            for x in (k, v)
        )
        k = k + table[head][None, None, None, None]
        weights = jnp.exp(jnp.einsum("bhwd,bhwdj->bhwj", q * scale, k))
        outs.append(jnp.einsum("bhwj,bhwdj->bhwd", weights / weights.sum(axis=-1, keepdims=True), v))
    return jnp.concatenate(outs, axis=-1)


def deformable_attention(query, key, value, points, table, *, num_heads):
    """Map (B, H, W, C) of queries, (B, N, C) x 2, (B, G, N, 2) in pixels, (M, 2 * H0 - 1, 2 * W0 - 1)."""
    batch, height, width, channels = query.shape
    positions = sampling.to_normalized(points, (height, width))
    bias = sampling.position_bias(table, positions, (height, width))
    flat = query.reshape(batch, height * width, channels)
    return attend(flat, key, value, num_heads=num_heads, bias=bias).reshape(query.shape)
