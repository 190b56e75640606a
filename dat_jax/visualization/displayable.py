"""Images with any number of channels as RGB, to look at."""

import numpy as np


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image as RGB with 8 bits, to look at.

    The channels are the first three, or for one or two channels the first as gray. Values of uint8 are kept; others are scaled,
    so that the smallest is 0 and the largest 255.

    Args:
      image: uint8, uint16 or float32 (H, W, C).

    Returns:
      uint8 (H, W, 3).
    """
    image = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    if image.dtype == np.uint8:
        return image
    values = image.astype(np.float64) - float(image.min())
    return np.round(255 * values / max(values.max(), np.finfo(np.float64).tiny)).astype(np.uint8)
