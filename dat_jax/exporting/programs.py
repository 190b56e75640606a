"""A trained model as one StableHLO program for several platforms, with its weights inside, by jax.export."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp

from dat_jax.data.buckets import MAX_SIDE
from dat_jax.errors import UserError
from dat_jax.exporting.preprocessing import get_statistics
from dat_jax.inference import Classifier, ObjectDetector, Predictor, Segmenter
from dat_jax.models.dat import MIN_IMAGE_SIDE
from dat_jax.ops.dispatch import compiling_for
from dat_jax.tasks.detection.objective import detect
from dat_jax.tasks.preprocessing import normalize

PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu", "rocm": "gpu"}  # name in jax.export -> name in ``ops.dispatch``
PREPROCESSING = ("inside", "outside")
SYMBOLIC = "symbolic"
BATCH = "b"  # name of a symbolic batch size in shapes
_MAX_BATCH = 2**16


def make_program(
    predictor: Predictor,
    *,
    image_shape: tuple[int, int],
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    preprocessing: str = "inside",
    batch: int | None = None,
    is_bucket: bool = False,
) -> jax.export.Exported:
    """Export a trained model as a program for images of one size, or of all sizes up to one. No platform has to be attached.

    The program contains the algorithms that ``ops.dispatch`` chooses for each platform; a platform compiles only its own.
    The weights are stored once. Matrix products are computed in float32 on every platform, while a TPU or GPU would round
    their operands by default.

    Args:
      predictor: a model from ``inference.load``.
      image_shape: (height, width) of the images in pixels.
      platforms: one or more of ``PLATFORMS``.
      preprocessing: "inside" for images of the predictor's dtype, which the program normalizes; "outside" for normalized
        float32 images.
      batch: batch size; None for a symbolic one, which accepts any number of images. Detectors require a number.
      is_bucket: whether the program takes images of all sizes up to ``image_shape``. Each image is then the top left of its
        array, and its results are those of the image alone, see ``ops.sizes``.

    Returns:
      A program of images (B, H, W, C), by default RGB. For a detector or a bucket it also takes sizes, int32 (B, 2): the
      height and width of each image without its padding. Outputs:
        classifier: logits, float32 (B, K).
        segmentor: logits, float32 (B, H / 4, W / 4, K), with sides rounded up. In a bucket, those of an image of (h, w) are the
          top left (h / 4, w / 4), with sides rounded up.
        detector: the detections of ``tasks.detection.objective``, with boxes in pixels of these images.

    Raises:
      UserError: unknown platforms or preprocessing, an impossible image or batch size, or no batch size for a detector.
    """
    check_program(
        predictor,
        image_shape=image_shape,
        platforms=platforms,
        preprocessing=preprocessing,
        batch=batch,
        is_bucket=is_bucket,
    )
    size = jax.export.symbolic_shape(BATCH)[0] if batch is None else batch
    inputs = [describe_images(predictor, size, image_shape, preprocessing=preprocessing)]
    if isinstance(predictor, ObjectDetector) or is_bucket:
        inputs.append(jax.ShapeDtypeStruct((size, 2), jnp.int32))
    branches = {
        name: make_branch(predictor, PLATFORMS[name], preprocessing=preprocessing, is_bucket=is_bucket)
        for name in platforms
    }

    def program(images, *sizes):
        # Weights are operands, which all branches share. As constants of the branches they would be stored once for each.
        if len(branches) == 1:
            return next(iter(branches.values()))(predictor.variables, images, *sizes)
        return jax.lax.platform_dependent(predictor.variables, images, *sizes, **branches)

    return jax.export.export(jax.jit(program), platforms=tuple(platforms))(*inputs)


def check_program(
    predictor: Predictor,
    *,
    image_shape: tuple[int, int],
    platforms: Sequence[str],
    preprocessing: str,
    batch: int | None,
    is_bucket: bool = False,
) -> None:
    """Check the arguments of ``make_program``.

    Raises:
      UserError: see ``make_program``.
    """
    if set(platforms) - set(PLATFORMS) or not platforms or len(set(platforms)) < len(platforms):
        raise UserError(
            f"platforms must be one or more of {', '.join(PLATFORMS)}, each at most once, got "
            f"{','.join(platforms) or 'none'}."
        )
    if preprocessing not in PREPROCESSING:
        raise UserError(f"preprocessing must be one of {', '.join(PREPROCESSING)}, got {preprocessing}.")
    height, width = image_shape
    name = "buckets" if is_bucket else "image_size"
    if min(image_shape) < MIN_IMAGE_SIDE:
        raise UserError(f"{name} must be at least {MIN_IMAGE_SIDE} pixels per side, got {height} x {width}.")
    if isinstance(predictor, Classifier) and height != width and not is_bucket:
        raise UserError(f"image_size must be a single SIDE for a classifier, got {height} x {width}.")
    if max(image_shape) > MAX_SIDE:
        raise UserError(f"{name} must be at most {MAX_SIDE} pixels per side, got {height} x {width}.")
    if is_bucket and isinstance(predictor, ObjectDetector):
        multiple = predictor.options["multiple"]
        if height % multiple or width % multiple:
            raise UserError(
                f"buckets of this detector must have sides that are multiples of {multiple}, got {height}x{width}."
            )
    if batch is None and isinstance(predictor, ObjectDetector):
        raise UserError(
            f"batch must be a number for a detector, whose box selection has loops of fixed length, got {SYMBOLIC}."
        )
    if batch is not None and not 1 <= batch <= _MAX_BATCH:
        raise UserError(f"batch must be {SYMBOLIC} or a number from 1 to {_MAX_BATCH:,}, got {batch}.")


def make_branch(
    predictor: Predictor, platform: str, *, preprocessing: str = "inside", is_bucket: bool = False
) -> Callable:
    """Function (variables, images, *sizes) -> outputs of ``make_program``, with the algorithms of one platform.

    Args:
      predictor: a model from ``inference.load``.
      platform: "cpu", "tpu" or "gpu", as in ``ops.dispatch``.
      preprocessing: see ``make_program``.
      is_bucket: see ``make_program``.
    """
    mean, std = get_statistics(predictor)

    def branch(variables: Mapping[str, Any], images: jax.Array, *sizes: jax.Array):
        with compiling_for(platform), jax.default_matmul_precision("float32"):
            images = normalize(images, mean=mean, std=std) if preprocessing == "inside" else images
            return _compute_outputs(predictor, variables, images, *sizes, is_bucket=is_bucket)

    return branch


def _compute_outputs(
    predictor: Predictor, variables: Mapping[str, Any], images: jax.Array, *sizes: jax.Array, is_bucket: bool
):
    if isinstance(predictor, ObjectDetector):
        (valid,) = sizes
        batch = {"valid": valid, "scale": jnp.ones((images.shape[0], 4), jnp.float32)}
        if is_bucket:  # the result is that of the image padded to a multiple
            multiple = predictor.options["multiple"]
            batch["sizes"] = -(-valid // multiple) * multiple
        return detect(predictor.model, variables, images, batch, settings=predictor.settings)
    model = predictor.model
    outputs = cast(Any, model.apply(variables, images, train=False, sizes=sizes[0] if is_bucket else None))
    return (outputs if isinstance(predictor, Classifier) else outputs["logits"]).astype(jnp.float32)


def describe_images(
    predictor: Predictor, size: Any, image_shape: tuple[int, int], *, preprocessing: str
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the images that a program takes, in batches of a number or a symbolic size."""
    channels, dtype = dataclasses.astuple(predictor.image_format)
    return jax.ShapeDtypeStruct((size, *image_shape, channels), dtype if preprocessing == "inside" else "float32")


_INPUTS = ("images", "sizes")  # in order
_MEANINGS = {
    "images": "images, preprocessed as described under preprocessing",
    "sizes": "height and width in pixels of the part of each image that is not padding",
    "logits": "one logit per class, in the order of classes",
    "boxes": "x1, y1, x2, y2 in pixels of the input images",
    "scores": "scores in descending order",
    "labels": "class indices, from 0",
    "valid": "whether an entry is a detection; other entries are 0",
    "masks": "mask probabilities within each box",
}


def describe_arrays(exported: jax.export.Exported) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs of a program, as the manifest lists them.

    Returns:
      {"inputs": [...], "outputs": [...]}, in order, each array as in ``describe_array``. A symbolic size is its name.
    """
    outputs = exported.out_tree.unflatten(exported.out_avals)
    outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}
    return {
        "inputs": [describe_array(*item) for item in zip(_INPUTS, exported.in_avals, strict=False)],
        "outputs": [describe_array(name, array) for name, array in outputs.items()],
    }


def describe_array(name: str, array: Any) -> dict[str, Any]:
    """{"name", "shape", "dtype", "meaning"} of an array or a ``ShapeDtypeStruct``, as JSON can hold it."""
    shape = [side if isinstance(side, int) else str(side) for side in array.shape]
    return {"name": name, "shape": shape, "dtype": array.dtype.name, "meaning": _MEANINGS[name]}


def choose_image_shape(predictor: Predictor) -> tuple[int, int]:
    """Default (height, width) of a program's images in pixels.

    A classifier has its image size, a segmentor a square of its short side, and a detector its short and long side, each
    padded to the multiple that the model requires.
    """
    options = predictor.options
    if isinstance(predictor, Classifier):
        return options["image_size"], options["image_size"]
    if isinstance(predictor, Segmenter):
        return options["short_side"], options["short_side"]
    short, long = sorted(options[name] for name in ("short_side", "long_side"))
    return tuple(-(-side // options["multiple"]) * options["multiple"] for side in (short, long))
