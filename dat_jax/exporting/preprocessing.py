"""Description of the preprocessing that an exported program expects, in words and in numbers."""

from collections.abc import Sequence
from typing import Any

from dat_jax.data.image_format import RGB
from dat_jax.inference import Classifier, Predictor, Segmenter
from dat_jax.models.dat import MIN_IMAGE_SIDE
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD

_BILINEAR = "bilinear, not antialiased (OpenCV)"


def describe_preprocessing(
    predictor: Predictor,
    *,
    image_shape: tuple[int, int],
    buckets: Sequence[tuple[int, int]] | None = None,
    inside: bool,
    is_for_features: bool = False,
) -> dict[str, Any]:
    """Preprocessing of an exported program, as values that JSON can hold.

    Args:
      predictor: a model from ``inference.load``.
      image_shape: (height, width) of the program's images in pixels. With buckets it has no effect.
      buckets: (height, width) of the buckets in pixels, if the programs take images of many sizes.
      inside: whether the program normalizes images itself.
      is_for_features: whether the program returns feature maps, for which images need not be resized in a certain way.

    Returns:
      "steps", sentences in order; the numbers of these steps by name; and layout, dtype and normalization of the images.
    """
    if buckets:
        steps, numbers = _describe_bucketed(predictor, buckets)
    elif is_for_features:
        height, width = image_shape
        steps, numbers = [f"resize or crop to {height} x {width} pixels (height x width)"], {"size": [height, width]}
    elif isinstance(predictor, Classifier):
        steps, numbers = _describe_classifier(predictor, image_shape)
    elif isinstance(predictor, Segmenter):
        steps, numbers = _describe_segmentor(image_shape)
    else:
        steps, numbers = _describe_detector(predictor, image_shape)
    image_format, (mean, std) = predictor.image_format, get_statistics(predictor)
    is_rgb, is_uint8 = image_format == RGB, image_format.dtype == "uint8"
    colors = "RGB with 8 bits per value" if is_rgb else f"{image_format}, with values as they are stored"
    scale = "divide by 255, " if is_uint8 else ""
    normalize = f"{scale}subtract the mean and divide by the standard deviation (std) of each channel"
    stored, scaled = ([0, 255], "[0, 1]") if is_uint8 else ("as stored", "as stored")
    return {
        "steps": [
            f"decode to {colors}, and turn upright as the EXIF orientation tag says",
            *steps,
            f"done by the program: {normalize}" if inside else normalize,
        ],
        **numbers,
        "channels": "RGB" if is_rgb else image_format.channels,
        "layout": "NHWC",
        "dtype": image_format.dtype if inside else "float32",
        "value_range": stored if inside else f"{scaled}, minus mean, divided by std",
        "normalized_in_the_program": inside,
        "mean": list(mean),
        "std": list(std),
    }


def get_statistics(predictor: Predictor) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the channels that images are normalized with."""
    options = predictor.options
    return (options["mean"], options["std"]) if isinstance(predictor, Classifier) else (IMAGENET_MEAN, IMAGENET_STD)


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
        _describe_resizing(long_side, short_side),
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


def _describe_bucketed(predictor: Predictor, buckets: Sequence[tuple[int, int]]) -> tuple[list[str], dict[str, Any]]:
    numbers: dict[str, Any] = {"buckets": [list(bucket) for bucket in buckets], "smallest_side": MIN_IMAGE_SIDE}
    if isinstance(predictor, Classifier):
        side = predictor.options["image_size"]
        steps = [f"resize, if needed; the model was trained at {side} x {side} pixels"]
    else:
        numbers |= {name: predictor.options[name] for name in ("long_side", "short_side")}
        numbers["interpolation"] = _BILINEAR
        steps = [_describe_resizing(numbers["long_side"], numbers["short_side"])]
    listed = ", ".join(f"{height} x {width}" for height, width in buckets)
    steps.append(
        f"put the image, with sides of at least {MIN_IMAGE_SIDE} pixels, at the top left of an array of the smallest bucket that "
        f"holds it (height x width: {listed}); the input sizes holds its height and width, and the rest of the array has no "
        "effect"
    )
    return steps, numbers


def _describe_resizing(long_side: int, short_side: int) -> str:
    return (
        f"resize, keeping the aspect ratio, by the largest factor for which the long side is at most {long_side} pixels and "
        f"the short side at most {short_side}; round sides half up; bilinear without antialiasing (OpenCV)"
    )
