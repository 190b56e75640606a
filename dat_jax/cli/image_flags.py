"""Flags that the commands for images share: the output folder, and how a trained model preprocesses images."""

from typing import Any

from absl import flags

from dat_jax.errors import UserError

# Title -> flags, for ``format_help``.
IMAGE_FLAGS = {
    "Input": ("recursive",),
    "Preprocessing and classes": ("classes=FILE",),
    "Classifiers": ("image_size=PIXELS", "resize=PIXELS", "top=N"),
    "Segmentors and detectors": ("long_side=PIXELS", "short_side=PIXELS", "buckets=CHOICE"),
    "Segmentors": ("ratios=RATIO,...", "flip"),
    "Detectors": ("min_score=SCORE", "max_detections=N"),
}
# Flags that are options of ``inference.load``; ``batch_size`` only of commands that define it.
_OPTIONS = (
    *("classes", "image_size", "resize", "top", "batch_size", "long_side", "short_side", "flip"),
    *("min_score", "max_detections", "buckets"),
)


def define_image_flags(values: flags.FlagValues) -> None:
    """Define ``output``, ``overwrite`` and the flags of ``IMAGE_FLAGS``."""
    flags.DEFINE_bool("recursive", False, "Also read subfolders.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder for the figures, one PNG per image.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace existing files.", flag_values=values)
    flags.DEFINE_string("classes", None, "Text file with the class names, one per line.", flag_values=values)
    help_text = "Side of the square that the network sees, in pixels."
    flags.DEFINE_integer("image_size", None, help_text, flag_values=values)
    help_text = "Side in pixels that images are resized to before the central square is cropped."
    flags.DEFINE_integer("resize", None, help_text, flag_values=values)
    flags.DEFINE_integer("top", None, "Number of classes to report (5 by default).", flag_values=values)
    help_text = "Images are resized to fit into this long side, in pixels."
    flags.DEFINE_integer("long_side", None, help_text, flag_values=values)
    help_text = "Images are resized to fit into this short side, in pixels."
    flags.DEFINE_integer("short_side", None, help_text, flag_values=values)
    help_text = "Shapes of the arrays that hold images: auto (default), exact, or a list such as 512x704,704x512."
    flags.DEFINE_string("buckets", None, help_text, flag_values=values)
    help_text = "Scales of test-time augmentation, such as 0.5,1.0, whose probabilities are averaged."
    flags.DEFINE_list("ratios", None, help_text, flag_values=values)
    flags.DEFINE_bool("flip", None, "Also average over horizontally flipped images.", flag_values=values)
    help_text = "Lowest score of the objects that are drawn and listed (0.3 by default)."
    flags.DEFINE_float("min_score", None, help_text, flag_values=values)
    flags.DEFINE_integer("max_detections", None, "Maximum number of detections per image.", flag_values=values)


def read_image_options(values: flags.FlagValues) -> dict[str, Any]:
    """Options of ``inference.load`` from the flags of ``define_image_flags``; None where a flag is not set.

    Raises:
      UserError: ``ratios`` are not numbers.
    """
    ratios = values.ratios
    try:
        ratios = None if ratios is None else tuple(map(float, ratios))
    except ValueError as error:
        raise UserError(f"--ratios must be numbers separated by commas, got {','.join(ratios or ())}.") from error
    return {"ratios": ratios, **{name: values[name].value for name in _OPTIONS if name in values}}
