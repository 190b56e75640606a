"""A trained model or its backbone as one StableHLO program for several platforms, with its weights inside, by jax.export."""

import functools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp

from dat_jax.data.buckets import MAX_SIDE
from dat_jax.data.image_format import RGB, ImageFormat
from dat_jax.errors import UserError
from dat_jax.exporting.preprocessing import get_statistics
from dat_jax.inference import Classifier, ObjectDetector, Predictor, Segmenter
from dat_jax.models.backbone import Backbone
from dat_jax.models.dat import MIN_IMAGE_SIDE
from dat_jax.ops.dispatch import compiling_for
from dat_jax.tasks.detection.objective import detect
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, normalize

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
    settings: dict[str, Any] = dict(
        image_shape=image_shape, platforms=platforms, preprocessing=preprocessing, batch=batch
    )
    check_program(predictor, is_bucket=is_bucket, **settings)
    compute = functools.partial(_compute_outputs, predictor, is_bucket=is_bucket)
    return _export(
        compute,
        predictor.variables,
        images=describe_images(predictor.image_format, _choose_size(batch), image_shape, preprocessing=preprocessing),
        normalization=choose_normalization(preprocessing, *get_statistics(predictor)),
        platforms=platforms,
        takes_sizes=is_bucket or isinstance(predictor, ObjectDetector),
    )


def make_features_program(
    backbone: Backbone,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int],
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    preprocessing: str = "inside",
    batch: int | None = None,
    is_bucket: bool = False,
    image_format: ImageFormat = RGB,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> jax.export.Exported:
    """Export a backbone as a program, as ``make_program`` does a whole model.

    Args:
      backbone: a backbone, such as that of ``load_backbone``.
      variables: its variables.
      image_shape: see ``make_program``; images need not be square.
      platforms: see ``make_program``.
      preprocessing: see ``make_program``.
      batch: see ``make_program``.
      is_bucket: see ``make_program``. The maps of an image of (h, w) are then the top left (h / stride, w / stride), with sides
        rounded up (down for a DAT without ``conv_patches``).
      image_format: channels and dtype of the images that the program normalizes.
      mean, std: of each channel, see ``tasks.preprocessing.normalize``.

    Returns:
      A program of images (B, H, W, C), by default RGB, and for a bucket of sizes, see ``make_program``. Its outputs are a
      dictionary: for each stage i of ``backbone.out_indices``, "features_i", float32 (B, H_i, W_i, C_i).

    Raises:
      UserError: unknown platforms or preprocessing, an impossible image or batch size, or wrong ``out_indices``.
    """
    settings: dict[str, Any] = dict(
        image_shape=image_shape, platforms=platforms, preprocessing=preprocessing, batch=batch
    )
    check_settings(is_bucket=is_bucket, **settings)
    try:
        indices = backbone.dat.resolve_out_indices(backbone.out_indices)
    except ValueError as error:
        raise UserError(str(error)) from error

    def compute(variables, images, *sizes):
        maps = cast(Any, backbone.apply(variables, images, sizes=sizes[0] if is_bucket else None))
        return {f"{_FEATURES}{index}": x.astype(jnp.float32) for index, x in zip(indices, maps, strict=True)}

    return _export(
        compute,
        variables,
        images=describe_images(image_format, _choose_size(batch), image_shape, preprocessing=preprocessing),
        normalization=choose_normalization(preprocessing, mean, std),
        platforms=platforms,
        takes_sizes=is_bucket,
    )


def _export(
    compute: Callable,
    variables: Mapping[str, Any],
    *,
    images: jax.ShapeDtypeStruct,
    normalization: Callable,
    platforms: Sequence[str],
    takes_sizes: bool,
) -> jax.export.Exported:
    """Export ``compute(variables, images, *sizes)``, a function of normalized images."""
    inputs = [images]
    if takes_sizes:
        inputs.append(jax.ShapeDtypeStruct((images.shape[0], 2), jnp.int32))
    branches = {name: _make_branch(compute, PLATFORMS[name], normalization) for name in platforms}

    def program(images, *sizes):
        # Weights are operands, which all branches share. As constants of the branches they would be stored once for each.
        if len(branches) == 1:
            return next(iter(branches.values()))(variables, images, *sizes)
        return jax.lax.platform_dependent(variables, images, *sizes, **branches)

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
    check_settings(
        image_shape=image_shape, platforms=platforms, preprocessing=preprocessing, batch=batch, is_bucket=is_bucket
    )
    height, width = image_shape
    if isinstance(predictor, Classifier) and height != width and not is_bucket:
        raise UserError(f"image_size must be a single SIDE for a classifier, got {height} x {width}.")
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


def check_settings(
    *,
    image_shape: tuple[int, int],
    platforms: Sequence[str],
    preprocessing: str,
    batch: int | None,
    is_bucket: bool = False,
) -> None:
    """Check the arguments of ``make_features_program`` other than the backbone.

    Raises:
      UserError: see ``make_features_program``.
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
    if max(image_shape) > MAX_SIDE:
        raise UserError(f"{name} must be at most {MAX_SIDE} pixels per side, got {height} x {width}.")
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
    normalization = choose_normalization(preprocessing, *get_statistics(predictor))
    return _make_branch(functools.partial(_compute_outputs, predictor, is_bucket=is_bucket), platform, normalization)


def choose_normalization(preprocessing: str, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """The function that a program applies to its images: it normalizes them, or returns them as they are."""
    return functools.partial(normalize, mean=mean, std=std) if preprocessing == "inside" else lambda images: images


def _make_branch(compute: Callable, platform: str, normalization: Callable) -> Callable:
    """``compute`` with the algorithms of one platform, after a normalization of the images."""

    def branch(variables: Mapping[str, Any], images: jax.Array, *sizes: jax.Array):
        with compiling_for(platform), jax.default_matmul_precision("float32"):
            return compute(variables, normalization(images), *sizes)

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


def _choose_size(batch: int | None) -> Any:
    return jax.export.symbolic_shape(BATCH)[0] if batch is None else batch


def describe_images(
    image_format: ImageFormat, size: Any, image_shape: tuple[int, int], *, preprocessing: str
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the images that a program takes, in batches of a number or a symbolic size."""
    dtype = image_format.dtype if preprocessing == "inside" else "float32"
    return jax.ShapeDtypeStruct((size, *image_shape, image_format.channels), dtype)


_INPUTS = ("images", "sizes")  # in order
_FEATURES = "features_"  # and the index of the stage
_MEANINGS = {
    "images": "images, preprocessed as described under preprocessing",
    "sizes": "height and width in pixels of the part of each image that is not padding",
    "logits": "one logit per class, in the order of classes",
    "boxes": "x1, y1, x2, y2 in pixels of the input images",
    "scores": "scores in descending order",
    "labels": "class indices, from 0",
    "valid": "whether an entry is a detection; other entries are 0",
    "masks": "mask probabilities within each box",
    _FEATURES: "feature map of the stage with this index, from 0: batch, height, width, channels",
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
    meaning = _MEANINGS[name.rstrip(string.digits)]
    return {"name": name, "shape": shape, "dtype": array.dtype.name, "meaning": meaning}


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
