"""Description of the preprocessing that an exported program expects, in words and in numbers."""

from typing import Any

from dat_jax.inference import Classifier, Predictor, Segmenter
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD

_BILINEAR = "bilinear, not antialiased (OpenCV)"


def describe_preprocessing(predictor: Predictor, *, image_shape: tuple[int, int], inside: bool) -> dict[str, Any]:
    """Preprocessing of an exported program, as values that JSON can hold.

    Args:
      predictor: a model from ``inference.load``.
      image_shape: (height, width) of the program's images in pixels.
      inside: whether the program normalizes images itself.

    Returns:
      "steps", sentences in order; the numbers of these steps by name; and layout, dtype and normalization of the images.
    """
    if isinstance(predictor, Classifier):
        steps, numbers = _describe_classifier(predictor, image_shape)
    elif isinstance(predictor, Segmenter):
        steps, numbers = _describe_segmentor(image_shape)
    else:
        steps, numbers = _describe_detector(predictor, image_shape)
    normalize = "divide by 255, subtract the mean and divide by the standard deviation (std) of each channel"
    return {
        "steps": [
            "decode to RGB with 8 bits per value, and turn upright as the EXIF orientation tag says",
            *steps,
            f"done by the program: {normalize}" if inside else normalize,
        ],
        **numbers,
        "channels": "RGB",
        "layout": "NHWC",
        "dtype": "uint8" if inside else "float32",
        "value_range": [0, 255] if inside else "[0, 1], minus mean, divided by std",
        "normalized_in_the_program": inside,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


def _describe_classifier(predictor: Classifier, image_shape: tuple[int, int]) -> tuple[list[str], dict[str, Any]]:
    height, width = image_shape
    resize = round(predictor.options["resize"] * height / predictor.options["image_size"])
    steps = [
        f"resize to {resize} x {resize} pixels without keeping the aspect ratio, bicubic with antialiasing (Pillow)",
        f"crop the central {height} x {width} pixels",
    ]
    numbers = {
        "resize": [resize, resize],
        "interpolation": "bicubic, antialiased (Pillow)",
        "crop": [height, width],
    }
    return steps, numbers


def _describe_segmentor(image_shape: tuple[int, int]) -> tuple[list[str], dict[str, Any]]:
    height, width = image_shape
    steps = [f"resize to {height} x {width} pixels (height x width), bilinear without antialiasing (OpenCV)"]
    return steps, {"resize": [height, width], "interpolation": _BILINEAR}


def _describe_detector(predictor: Predictor, image_shape: tuple[int, int]) -> tuple[list[str], dict[str, Any]]:
    height, width = image_shape
    long_side = min(predictor.options["long_side"], max(image_shape))
    short_side = min(predictor.options["short_side"], min(image_shape))
    steps = [
        f"resize, keeping the aspect ratio, by the largest factor for which the long side is at most {long_side} pixels and "
        f"the short side at most {short_side}; round sides half up; bilinear without antialiasing (OpenCV)",
        f"pad with 0 at the bottom and right to {height} x {width} pixels (height x width); the input sizes holds the height "
        "and width before padding",
    ]
    if height != width:
        shape, other_shape = ("landscape", "portrait") if width > height else ("portrait", "landscape")
        steps.append(
            f"this program is for {shape} images; {other_shape} images need one exported with height and width exchanged"
        )
    numbers = {
        "long_side": long_side,
        "short_side": short_side,
        "interpolation": _BILINEAR,
        "pad_to": [height, width],
        "padding": 0,
    }
    return steps, numbers
