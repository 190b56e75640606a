"""References of bilinear sampling and position biases, from their definitions."""

import jax.numpy as jnp


def hat(positions, size):
    """(...,) -> (..., size): weight of each pixel of a line at each position, in pixels."""
    pixels = jnp.arange(size).reshape((1,) * positions.ndim + (size,))
    return jnp.maximum(0, 1 - jnp.abs(pixels - positions[..., None]))


def grid_sample(features, points):
    """(B, H, W, C), (B, G, N, 2) in pixels -> (B, N, C)."""
    _, height, width, _ = features.shape
    sampled = []
    for group, channels in enumerate(jnp.split(features, points.shape[1], axis=-1)):
        rows, columns = hat(points[:, group, :, 0], height), hat(points[:, group, :, 1], width)
        sampled.append(jnp.einsum("bny,bnx,byxc->bnc", rows, columns, channels))
    return jnp.concatenate(sampled, axis=-1)


def to_normalized(points, map_shape):
    """(..., 2) in pixels -> normalized, -1 and 1 at the centers of the first and last pixel; 0 on a side of one pixel."""
    sides = [2 * points[..., i] / (n - 1) - 1 if n > 1 else 0 * points[..., i] for i, n in enumerate(map_shape)]
    return jnp.stack(sides, axis=-1)


def query_positions(map_shape, released=False):
    """(H * W, 2): pixels of a map in normalized coordinates; with ``released`` at half pixels, as in the released DAT v1."""
    pixels = [(float(i), float(j)) for i in range(map_shape[0]) for j in range(map_shape[1])]
    if released:
        return (jnp.asarray(pixels) + 0.5) / jnp.asarray(map_shape, float)[None] * 2 - 1
    return to_normalized(jnp.asarray(pixels), map_shape)


def displacements(positions, map_shape, released=False):
    """(B, G, N, 2) -> (B, G, H * W, N, 2): query minus key, normalized."""
    return query_positions(map_shape, released)[None, None, :, None] - positions[:, :, None]


def position_bias(table, positions, map_shape, released=False):
    """(M, ., .), normalized (B, G, N, 2) -> (B, M, H * W, N): the table sampled at half of every displacement."""
    heads, rows, columns = table.shape
    groups = positions.shape[1]
    half = 0.5 * displacements(positions, map_shape, released)
    weights_y = hat((half[..., 0] + 1) / 2 * (rows - 1), rows)
    weights_x = hat((half[..., 1] + 1) / 2 * (columns - 1), columns)
    biases = []
    for head in range(heads):
        group = head // (heads // groups)
        biases.append(jnp.einsum("bqny,bqnx,yx->bqn", weights_y[:, group], weights_x[:, group], table[head]))
    return jnp.stack(biases, axis=1)


def log_displacements(positions, map_shape):
    """Normalized (B, G, N, 2) -> (B, G, H * W, N, 2): sign(d) * log2(|d| + 1) / log2(8) of d = 4 * displacement."""
    d = 4 * displacements(positions, map_shape)
    return jnp.where(d < 0, -1, 1) * jnp.log(jnp.where(d < 0, -d, d) + 1) / jnp.log(8.0)


def reference_points(key_shape, released=False):
    """(Hk, Wk, 2)."""
    points = []
    if released:
        lines = [[(i + 0.5) / keys * 2 - 1 for i in range(keys)] for keys in key_shape]
        return jnp.asarray([[(y, x) for x in lines[1]] for y in lines[0]])
    for i in range(key_shape[0]):
        for j in range(key_shape[1]):
            y = (i + 0.5) / (key_shape[0] - 1) * 2 - 1 if key_shape[0] > 1 else 0.0
            x = (j + 0.5) / (key_shape[1] - 1) * 2 - 1 if key_shape[1] > 1 else 0.0
            points.append((y, x))
    return jnp.asarray(points).reshape(*key_shape, 2)


def released_key_positions(offsets, range_factor):
    """(B, G, Hk, Wk, 2) raw offsets -> positions, normalized, as in the released DAT v1."""
    reference = reference_points(offsets.shape[2:4], released=True)[None, None]
    if range_factor < 0:
        return jnp.tanh(offsets + reference)
    if range_factor > 0:
        step = jnp.stack([jnp.float32(1.0 / keys) for keys in offsets.shape[2:4]]).astype(offsets.dtype)
        offsets = jnp.tanh(offsets) * step[None, None, None, None] * range_factor
    return offsets + reference


def key_positions(offsets, range_factor):
    """(B, G, Hk, Wk, 2) raw offsets -> positions, normalized."""
    key_shape = offsets.shape[2:4]
    reference = reference_points(key_shape)
    sides = []
    for axis, keys in enumerate(key_shape):
        raw, start = offsets[..., axis], reference[None, None, ..., axis]
        if range_factor >= 0:
            step = jnp.float32(1.0 / max(keys - 1, 1)).astype(offsets.dtype)  # rounded, as published
            sides.append(start + jnp.tanh(raw) * step * range_factor)
        else:
            free = start + raw
            sides.append(jnp.where(free < -1, -1, jnp.where(free > 1, 1, free)))
    return jnp.stack(sides, axis=-1)
