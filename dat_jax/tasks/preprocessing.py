"""Preprocessing of image batches on the devices."""

import jax
import jax.numpy as jnp

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # per channel, of images scaled to 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array) -> jax.Array:
    """Scale images to 0..1, subtract the ImageNet mean and divide by its standard deviation.

    Args:
      images: (B, H, W, 3) uint8, RGB.

    Returns:
      (B, H, W, 3) float32.
    """
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.astype(jnp.float32) / 255 - mean) / std


def clear_padding(images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Set the pixels beyond each image's size to zero.

    Args:
      images: (B, H, W, 3).
      sizes: (B, 2) int, height and width of each image in its top left corner.

    Returns:
      (B, H, W, 3).
    """
    rows, columns = (jnp.arange(side)[None, :] < sizes[:, axis, None] for axis, side in enumerate(images.shape[1:3]))
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], images, 0)
