"""Reference of RoIAlign: the loop of the published operator, one sample at a time, forward and transposed."""

import math

import numpy as np


def bilinear(position, size):
    """[(pixel, weight), ...] of a position on a line of pixels; empty if more than one pixel outside."""
    if position < -1 or position > size:
        return []
    position = max(position, 0.0)
    lower = int(position)
    if lower >= size - 1:
        return [(size - 1, 1.0)]
    return [(lower, 1 - (position - lower)), (lower + 1, position - lower)]


def samples(box, size, spatial_scale, sampling_ratio, shape):
    """Yields (bin row, bin column, row, column, weight) for every pixel that a sample of a box reads."""
    x1, y1, x2, y2 = (float(side) * spatial_scale - 0.5 for side in box)
    sides = (y2 - y1) / size, (x2 - x1) / size
    counts = [sampling_ratio or max(math.ceil(side), 0) for side in sides]
    total = max(counts[0] * counts[1], 1)
    for i in range(size):
        for j in range(size):
            for u in range(counts[0]):
                for v in range(counts[1]):
                    y = y1 + i * sides[0] + (u + 0.5) * sides[0] / counts[0]
                    x = x1 + j * sides[1] + (v + 0.5) * sides[1] / counts[1]
                    for row, weight_y in bilinear(y, shape[0]):
                        for column, weight_x in bilinear(x, shape[1]):
                            yield i, j, row, column, weight_y * weight_x / total


def roi_align(features, boxes, *, size, spatial_scale=1.0, sampling_ratio=0):
    """(H, W, C), (K, 4) -> (K, P, P, C)."""
    out = np.zeros((len(boxes), size, size, features.shape[2]))
    for k, box in enumerate(boxes):
        for i, j, row, column, weight in samples(box, size, spatial_scale, sampling_ratio, features.shape):
            out[k, i, j] += weight * features[row, column]
    return out


def gradient(cotangents, boxes, shape, *, spatial_scale=1.0, sampling_ratio=0):
    """(K, P, P, C), (K, 4) -> (H, W, C): gradient of sum(out * cotangents) with respect to the features."""
    out = np.zeros(shape)
    for k, box in enumerate(boxes):
        for i, j, row, column, weight in samples(box, cotangents.shape[1], spatial_scale, sampling_ratio, shape):
            out[row, column] += weight * cotangents[k, i, j]
    return out
