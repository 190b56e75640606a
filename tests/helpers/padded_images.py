"""Images of several sizes in one array, with garbage beyond their sizes."""

import jax
import jax.numpy as jnp
import numpy as np


def padded_images(sizes, bucket, *, seed=0):
    """Return random images (B, H, W, 3), with NaN below and 1e30 beside them in a bucket (H, W), and their sizes (B, 2)."""
    images = np.random.default_rng(seed).normal(size=(len(sizes), *bucket, 3))
    for image, (height, width) in zip(images, sizes, strict=True):
        image[height:], image[:, width:] = np.nan, 1e30
    return images, jnp.asarray(sizes, jnp.int32)


def surround(images, *, rows=40, columns=64):
    """Return images (B, H, W, 3) at the top left of larger arrays, with NaN below and 1e30 beside them, and their sizes."""
    images = np.asarray(images)
    count, height, width, channels = images.shape
    arrays = np.full((count, height + rows, width + columns, channels), 1e30, images.dtype)
    arrays[:, height:] = np.nan
    arrays[:, :height, :width] = images
    return arrays, np.array([[height, width]] * count, np.int32)


def crop(x, index, shape):
    """Return the top left of one example of maps (B, H, W, C), with the batch axis."""
    return np.asarray(x[index : index + 1, : shape[0], : shape[1]])


def largest_difference(padded, alone, index):
    """Return the largest difference of trees of maps (B, H, W, C) or vectors (B, C), relative to the largest value of each array.

    Args:
      padded: tree of arrays of the whole batch.
      alone: the same tree for the example by itself.
      index: index of the example in the batch.
    """

    def difference(whole, one):
        same = crop(whole, index, one.shape[1:3]) if one.ndim == 4 else np.asarray(whole[index : index + 1])
        assert same.shape == one.shape
        return np.abs(same - one).max() / max(np.abs(one).max(), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(difference, padded, alone)))
