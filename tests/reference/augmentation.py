"""Reference of the augmentation: operations of Pillow, and random draws written out with numpy."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)


def apply_with_pillow(image: Image.Image, name: str, magnitude: float, sign: int) -> Image.Image:
    """Applies one RandAugment operation with functions of Pillow."""
    m = magnitude
    resampled = dict(resample=Image.Resampling.BICUBIC, fillcolor=FILL)

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **resampled)

    match name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return image.rotate(sign * 3 * m, **resampled)
        case "Posterize":
            bits = 4 - int(0.4 * m)
            return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)
        case "Solarize":
            return ImageOps.solarize(image, 256 - min(256, int(25.6 * m)))
        case "SolarizeAdd":
            pixels = np.asarray(image).astype(int)
            added = np.minimum(pixels + min(128, int(11 * m)), 255)
            return Image.fromarray(np.where(pixels < 128, added, pixels).astype(np.uint8))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return getattr(ImageEnhance, name)(image).enhance(max(0.1, 1 + sign * 0.09 * m))
        case "ShearX":
            return affine(1, sign * 0.03 * m, 0, 0, 1, 0)
        case "ShearY":
            return affine(1, 0, 0, sign * 0.03 * m, 1, 0)
        case "TranslateX":
            return affine(1, 0, sign * 0.045 * m * image.width, 0, 1, 0)
        case "TranslateY":
            return affine(1, 0, 0, 0, 1, sign * 0.045 * m * image.height)
    raise KeyError(name)


def draw_boxes(rng, count, *, height, width, area, log_aspect, fits):
    """Draws ``count`` boxes (h, w): the first fitting one of ten attempts each, without those that never fit.

    The aspect ratio is width / height: h = sqrt(area / aspect), w = sqrt(area * aspect).
    """
    areas = rng.uniform(*area, (count, 10)) * height * width
    aspects = np.exp(rng.uniform(*log_aspect, (count, 10)))
    h, w = np.round(np.sqrt(areas / aspects)), np.round(np.sqrt(areas * aspects))
    good = fits(h, w)
    first = good.argmax(axis=1)
    rows = np.flatnonzero(good.any(axis=1))
    return h[rows, first[rows]], w[rows, first[rows]]
