"""What is done to an image before an exported program takes it, in words and in numbers."""

from typing import Any

from dat_jax.inference import Classifier, Looker, Segmenter
from dat_jax.tasks.classification import IMAGENET_MEAN, IMAGENET_STD


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
        numbers |= {
            "resize_to_fit": [height, width],
            "interpolation": "bilinear, not antialiased (OpenCV)",
            "padding": 0,
        }
        steps.append(
            f"resize to fit into {height} x {width} pixels (height, width), ratio kept, bilinear without antialiasing (OpenCV's)"
        )
        steps.append(
            "pad with 0 at the bottom and at the right; sizes are the height and width of the part that is image"
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
