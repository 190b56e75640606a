"""What is done to an image before an exported program takes it, in words and in numbers."""

from typing import Any

from dat_jax.inference import Classifier, Looker, Segmenter
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def describe_preprocessing(looker: Looker, *, image_shape: tuple[int, int], inside: bool) -> dict[str, Any]:
    """As JSON can hold it.

    Args:
      looker: of ``inference.load``.
      image_shape: (H, W) of the program's images.
      inside: whether the program itself normalises.
    """
    height, width = image_shape
    steps = ["decode to RGB, 8 bits a value, orientation tags not applied"]
    numbers: dict[str, Any] = {}
    if isinstance(looker, Classifier):
        resize = round(looker.options["resize"] * height / looker.options["image_size"])
        numbers |= {
            "resize": [resize, resize],
            "interpolation": "bicubic, antialiased (Pillow)",
            "crop": [height, width],
        }
        steps.append(
            f"resize to {resize} x {resize} pixels whatever the ratio is, bicubic with antialiasing (Pillow's)"
        )
        steps.append(f"take the {height} x {width} pixels in the middle")
    elif isinstance(looker, Segmenter):
        numbers |= {"resize": [height, width], "interpolation": "bilinear, not antialiased (OpenCV)"}
        steps.append(f"resize to {height} x {width} pixels (height, width), bilinear without antialiasing (OpenCV's)")
    else:
        long_side = min(looker.options["long_side"], max(image_shape))
        short_side = min(looker.options["short_side"], min(image_shape))
        numbers |= {
            "long_side": long_side,
            "short_side": short_side,
            "interpolation": "bilinear, not antialiased (OpenCV)",
            "pad_to": [height, width],
            "padding": 0,
        }
        steps.append(
            f"resize, ratio kept, by the largest factor with which the longer side is at most {long_side} pixels and the shorter "
            f"one at most {short_side}, sides rounded half up, bilinear without antialiasing (OpenCV's)"
        )
        steps.append(
            f"pad with 0 at the bottom and at the right to {height} x {width} pixels (height, width); sizes are the height and "
            "width of the part that is image"
        )
        if height != width:
            lying, other = ("wide", "high") if width > height else ("high", "wide")
            steps.append(
                f"this is for images that are {lying}: {other} ones want a program with height and width exchanged"
            )
    normalizing = "divide by 255, subtract the mean and divide by the deviation (std) of each channel"
    steps.append(f"the program does this itself: {normalizing}" if inside else normalizing)
    return {
        "steps": steps,
        **numbers,
        "channels": "RGB",
        "layout": "NHWC",
        "dtype": "uint8" if inside else "float32",
        "value_range": [0, 255] if inside else "0..1, less mean, over std",
        "normalized_in_the_program": inside,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
