"""Augmentation of a batch on the devices, inside the training step: random erasing, mixup and cutmix.

Every draw is a function of the key, so of the seed, the step and the example's place in the batch. Images are (B, H, W, C),
normalized.
"""

import math

import jax
import jax.numpy as jnp

_ERASED_AREA = (0.02, 1 / 3)  # of the image
_MAX_ERASED_ASPECT = 1 / 0.3
_ERASING_TRIES = 10


def erase_randomly(images: jax.Array, key: jax.Array, *, probability: float) -> jax.Array:
    """Fills one box of an image with standard normal noise, each pixel and channel by itself, with a probability.

    The box is the first of ten draws that is smaller than the image: area uniform from 2 % to a third, height / width
    log-uniform from 0.3 to 1 / 0.3, place uniform. Without a fitting one the image stays. Source: 1708.04896, as timm's
    RandomErasing in "pixel" mode.
    """
    height, width = images.shape[1:3]

    def erase(image, key):
        chosen, box, noise = jax.random.split(key, 3)
        top, left, h, w = draw_erased_box(box, height=height, width=width)
        h = jnp.where(jax.random.uniform(chosen) < probability, h, 0)
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
        inside = (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)
        return jnp.where(inside[..., None], jax.random.normal(noise, image.shape, image.dtype), image)

    return jax.vmap(erase)(images, jax.random.split(key, images.shape[0]))


def draw_erased_box(key: jax.Array, *, height: int, width: int) -> tuple[jax.Array, ...]:
    """(top, left, box height, box width) in pixels, int32; the box's height is 0 where no draw fits."""
    areas, aspects, y, x = jax.random.split(key, 4)
    area = jax.random.uniform(areas, (_ERASING_TRIES,), minval=_ERASED_AREA[0], maxval=_ERASED_AREA[1]) * height * width
    bound = math.log(_MAX_ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspects, (_ERASING_TRIES,), minval=-bound, maxval=bound))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    h, w = jnp.where(fits[first], h[first], 0), w[first]
    return jax.random.randint(y, (), 0, height - h + 1), jax.random.randint(x, (), 0, width - w + 1), h, w


def mix(
    images: jax.Array, targets: jax.Array, key: jax.Array, *, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image with its neighbor in the batch, by mixup or cutmix, evenly; images and targets (B, K) alike.

    One draw for the whole batch, over all devices (one for each part where steps are accumulated). An alpha of 0 leaves
    that kind out. Source: 1710.09412 and 1905.04899, as timm's Mixup in "batch" mode with probability 1, but for the partner,
    which is there the batch of a device reversed: the order is random either way, and a neighbor lies on the same device,
    on whatever mesh. The last of an odd number stays as it is.

    Args:
      images: (B, H, W, C).
      targets: (B, K) probabilities.
      mixup_alpha, cutmix_alpha: of the Beta(alpha, alpha) that the weight of the batch itself comes from.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    kind, mixup_key, cutmix_key = jax.random.split(key, 3)
    height, width = images.shape[1:3]
    use_cutmix = jax.random.uniform(kind) < (0.5 if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0))
    top, bottom, left, right = draw_cutmix_box(cutmix_key, height=height, width=width, alpha=cutmix_alpha or 1.0)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    outside = (rows < top) | (rows >= bottom) | (columns < left) | (columns >= right)
    uncovered = 1 - (bottom - top) * (right - left) / (height * width)
    weight = jax.random.beta(mixup_key, mixup_alpha or 1.0, mixup_alpha or 1.0)
    own = jnp.where(use_cutmix, outside.astype(weight.dtype), weight)[None, :, :, None].astype(images.dtype)
    own_target = jnp.where(use_cutmix, uncovered, weight).astype(targets.dtype)
    return own * images + (1 - own) * _neighbors(images), own_target * targets + (1 - own_target) * _neighbors(targets)


def _neighbors(x: jax.Array) -> jax.Array:
    """The second, the first, the fourth, the third, ..."""
    even = len(x) // 2 * 2
    swapped = x[:even].reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(even, *x.shape[1:])
    return jnp.concatenate([swapped, x[even:]])


def draw_cutmix_box(key: jax.Array, *, height: int, width: int, alpha: float) -> tuple[jax.Array, ...]:
    """(top, bottom, left, right) in pixels, int32: sides of sqrt(1 - lambda), centre uniform, cut at the border."""
    size, y, x = jax.random.split(key, 3)
    part = jnp.sqrt(1 - jax.random.beta(size, alpha, alpha))
    half_height = (height * part).astype(jnp.int32) // 2
    half_width = (width * part).astype(jnp.int32) // 2
    y, x = jax.random.randint(y, (), 0, height), jax.random.randint(x, (), 0, width)
    return (
        *(jnp.clip(y + side, 0, height) for side in (-half_height, half_height)),
        *(jnp.clip(x + side, 0, width) for side in (-half_width, half_width)),
    )
