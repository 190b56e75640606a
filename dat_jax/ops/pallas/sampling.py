"""Bilinear sampling as a product with weights that are computed in the kernel and never written to memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dat_jax.ops.pallas.call import MAX_UNROLLED_PIXELS, KernelCall, Result, dot
from dat_jax.ops.pallas.weights import add_point_gradient, load_weights


def grid_sample(features: jax.Array, points: jax.Array) -> jax.Array:
    """See ``ops.attention.grid_sample``.

    Args:
      features: (B, H, W, C).
      points: (B, G, N, 2), float32 or better, (y, x) in pixels.

    Returns:
      (B, N, C), of the dtype of ``features``.
    """
    batch, height, width, channels = features.shape
    flat = points.swapaxes(1, 2).reshape(batch, points.shape[2], -1)  # (B, N, 2 * G): one row per key
    return _sample(points.shape[1], (height, width), features.reshape(batch, height * width, channels), flat)


def fits(shape: tuple[int, ...], dtype, *, groups: int, keys: int) -> bool:
    """Whether one example fits in VMEM and the map is small.

    Larger maps have no kernel. The compiler took 103 s for 144 points on 96 x 96 x 128, and there gathers of few points are
    cheap: they and their scatter move 71 MB for two such images, 184 MB for 1,050 points on 200 x 336 x 64 (v5e, gradient).

    Args:
      shape: (B, H, W, C), the shape of the features.
      dtype: of the features.
      groups: G.
      keys: N.
    """
    batch, height, width, channels = shape
    if height * width > MAX_UNROLLED_PIXELS:
        return False
    features = jax.ShapeDtypeStruct((batch, height * width, channels), dtype)
    points = jax.ShapeDtypeStruct((batch, keys, 2 * groups), jnp.promote_types(dtype, jnp.float32))
    out = jax.ShapeDtypeStruct((batch, keys, channels), dtype)
    forward = _forward_call(groups, (height, width), features, points)
    return forward.fits and _backward_call(groups, (height, width), features, points, out).fits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sample(groups, map_shape, features, points):
    return _run_forward(groups, map_shape, features, points)


def _sample_forward(groups, map_shape, features, points):
    return _run_forward(groups, map_shape, features, points), (features, points)


def _sample_backward(groups, map_shape, residuals, gradient):
    features, points = residuals
    return tuple(_backward_call(groups, map_shape, features, points, gradient).run())


_sample.defvjp(_sample_forward, _sample_backward)


def _backward_call(groups, map_shape, features, points, gradient):
    results = [Result(features.shape, features.dtype, True), Result(points.shape, points.dtype, True)]
    kernel = functools.partial(_backward_kernel, groups, map_shape)
    operands = [(x, True) for x in (features, points, gradient)]
    products = 2 * _products(features, points)
    return _call(kernel, operands, results, products, "grid_sample_backward")


def _run_forward(groups, map_shape, features, points):
    return _forward_call(groups, map_shape, features, points).run()[0]


def _forward_call(groups, map_shape, features, points):
    results = [Result((*points.shape[:2], features.shape[2]), features.dtype, True)]
    kernel = functools.partial(_forward_kernel, groups, map_shape)
    operands = [(features, True), (points, True)]
    return _call(kernel, operands, results, _products(features, points), "grid_sample_forward")


def _call(kernel, operands, results, flops, name):
    pixels, keys = operands[0][0].shape[1], operands[1][0].shape[1]
    weights = 4 * pixels * keys
    return KernelCall(kernel, operands, results, flops=flops, exponentials=0, work_bytes=8 * weights, name=name)


def _products(features, points):
    return 2 * points.shape[1] * features.shape[1] * features.shape[2]


def _channels(ref, groups, group):
    width = ref.shape[2] // groups
    return slice(group * width, (group + 1) * width)


def _forward_kernel(groups, map_shape, features_ref, points_ref, out_ref):
    for group in range(groups):
        at = _channels(features_ref, groups, group)
        weights = load_weights(points_ref, group, map_shape)
        features = features_ref[0, :, at].astype(weights.dtype)
        out_ref[0, :, at] = dot(weights, features, 1, 0, precision=lax.Precision.HIGHEST).astype(out_ref.dtype)


def _backward_kernel(groups, map_shape, features_ref, points_ref, gradient_ref, to_features_ref, to_points_ref):
    to_points_ref[...] = jnp.zeros_like(to_points_ref)
    highest = lax.Precision.HIGHEST
    for group in range(groups):
        at = _channels(features_ref, groups, group)
        weights = load_weights(points_ref, group, map_shape)
        gradient = gradient_ref[0, :, at].astype(weights.dtype)
        to_features_ref[0, :, at] = dot(weights, gradient, 0, 0, precision=highest).astype(to_features_ref.dtype)
        to_weights = dot(gradient, features_ref[0, :, at].astype(weights.dtype), 1, 1, precision=highest)
        add_point_gradient(to_points_ref, points_ref, group, map_shape, to_weights)
