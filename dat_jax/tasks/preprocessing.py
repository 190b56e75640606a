"""Preprocessing of image batches on the devices."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dat_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # per channel, of images scaled to 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images: jax.Array, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> jax.Array:
    """Subtract the mean of each channel and divide by its standard deviation.

    Values of uint8 images are divided by 255 first, so that they are from 0 to 1. Other dtypes keep their values.

    Args:
      images: (B, H, W, C) uint8, uint16 or float32.
      mean: C numbers; by default those of ImageNet, for RGB.
      std: C numbers.

    Returns:
      (B, H, W, C) float32.
    """
    channel_mean, channel_std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    scale = 255 if images.dtype == jnp.uint8 else 1
    return (images.astype(jnp.float32) / scale - channel_mean) / channel_std


def repeat_for_channels(values: Sequence[float], *, channels: int, name: str) -> tuple[float, ...]:
    """A mean or standard deviation for each channel; a single number is repeated.

    Raises:
      UserError: there is neither one number nor one for each channel. The message calls them ``name``.
    """
    if len(values) not in (1, channels):
        raise UserError(
            f"{name} must be one number, or one for each channel of the images ({channels}), got {len(values)}: "
            f"{', '.join(map(str, values))}."
        )
    return tuple(values) * (channels // len(values))


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
