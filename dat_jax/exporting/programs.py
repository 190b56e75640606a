"""A trained model as one program for several platforms, its weights inside: StableHLO, by jax.export."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from dat_jax.errors import UserError
from dat_jax.inference import Classifier, Looker, ObjectDetector, Segmenter
from dat_jax.models.dat import MIN_IMAGE_SIDE
from dat_jax.ops.dispatch import compiling_for
from dat_jax.tasks.detection.objective import detect
from dat_jax.tasks.preprocessing import normalize

PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu", "rocm": "gpu"}  # of jax.export -> of ``ops.dispatch``
PREPROCESSING = ("inside", "outside")
SYMBOLIC = "symbolic"
_MAX_SIDE = 2**14
BATCH = "b"  # what a symbolic batch size is called


def make_program(
    looker: Looker,
    *,
    image_shape: tuple[int, int],
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    preprocessing: str = "inside",
    batch: int | None = None,
) -> jax.export.Exported:
    """What a trained model computes of images of one size, for platforms that need not be there.

    The program has the algorithms that ``ops.dispatch`` takes on each platform, of which a platform compiles its own alone,
    and the weights once. Products are of float32 on every platform, where a TPU or a GPU would otherwise round their operands.

    Args:
      looker: of ``inference.load``.
      image_shape: (H, W) of the images.
      platforms: of ``PLATFORMS``.
      preprocessing: "inside" for uint8 images, which are normalised in the program; "outside" for float32, normalised.
      batch: how many images; None for any number, which detectors do not take.

    Returns:
      A program of images (B, H, W, 3) RGB, and of a detector of sizes int32 (B, 2), the height and width of each image, beyond
      which is padding. It gives logits float32 (B, K) of a classifier, (B, H / 4, W / 4, K), rounded up, of a segmentor; of a
      detector the detections of ``tasks.detection.detector``, boxes in pixels of these images.

    Raises:
      UserError: unknown platforms or preprocessing, impossible sizes, or no batch size for a detector.
    """
    check_program(looker, image_shape=image_shape, platforms=platforms, preprocessing=preprocessing, batch=batch)
    dtype = choose_dtype(preprocessing)
    size = jax.export.symbolic_shape(BATCH)[0] if batch is None else batch
    inputs = [jax.ShapeDtypeStruct((size, *image_shape, 3), dtype)]
    if isinstance(looker, ObjectDetector):
        inputs.append(jax.ShapeDtypeStruct((size, 2), jnp.int32))
    branches = {name: make_branch(looker, PLATFORMS[name], preprocessing=preprocessing) for name in platforms}

    def program(images, *sizes):
        # Operands of the choice, weights are there once; what belongs to one branch would be there for each.
        if len(branches) == 1:
            return next(iter(branches.values()))(looker.variables, images, *sizes)
        return jax.lax.platform_dependent(looker.variables, images, *sizes, **branches)

    return jax.export.export(jax.jit(program), platforms=tuple(platforms))(*inputs)


def check_program(
    looker: Looker,
    *,
    image_shape: tuple[int, int],
    platforms: Sequence[str],
    preprocessing: str,
    batch: int | None,
) -> None:
    """UserError where ``make_program`` would raise one."""
    if set(platforms) - set(PLATFORMS) or not platforms or len(set(platforms)) < len(platforms):
        raise UserError(f"platforms wants some of {', '.join(PLATFORMS)}, got {','.join(platforms) or 'none'}.")
    choose_dtype(preprocessing)
    if min(image_shape) < MIN_IMAGE_SIDE:
        raise UserError("image_size wants sides of at least {}, got {} x {}.".format(MIN_IMAGE_SIDE, *image_shape))
    if isinstance(looker, Classifier) and image_shape[0] != image_shape[1]:
        raise UserError("A classifier looks at squares: image_size wants SIDE, got {} x {}.".format(*image_shape))
    if max(image_shape) > _MAX_SIDE:
        raise UserError("image_size wants sides of at most {}, got {} x {}.".format(_MAX_SIDE, *image_shape))
    if batch is None and isinstance(looker, ObjectDetector):
        raise UserError("A detector chooses boxes of each image with loops of fixed sizes: batch wants a number.")
    if batch is not None and batch < 1:
        raise UserError(f"batch wants {SYMBOLIC} or a number of at least 1, got {batch}.")


def make_branch(looker: Looker, platform: str, *, preprocessing: str = "inside") -> Callable:
    """A function of variables and of what ``make_program`` says, with the algorithms of a platform of ``ops.dispatch``."""

    def branch(variables: Mapping[str, Any], images: jax.Array, *sizes: jax.Array):
        with compiling_for(platform), jax.default_matmul_precision("float32"):
            images = normalize(images) if preprocessing == "inside" else images
            return _compute(looker, variables, images, *sizes)

    return branch


def _compute(looker, variables, images, *sizes):
    model = looker.model
    if isinstance(looker, Classifier):
        return model.apply(variables, images, train=False).astype(jnp.float32)
    if isinstance(looker, Segmenter):
        return model.apply(variables, images, train=False)["logits"].astype(jnp.float32)
    (valid,) = sizes
    batch = {"valid": valid, "scale": jnp.ones((images.shape[0], 4), jnp.float32)}
    return detect(model, variables, images, batch, settings=looker.settings)


def choose_dtype(preprocessing: str) -> jnp.dtype:
    """Of the images that a program takes; UserError as ``make_program``."""
    if preprocessing not in PREPROCESSING:
        raise UserError(f"preprocessing wants one of {', '.join(PREPROCESSING)}, got {preprocessing}.")
    return jnp.dtype(jnp.uint8 if preprocessing == "inside" else jnp.float32)


def name_inputs(looker: Looker) -> tuple[str, ...]:
    """Of a program, in order."""
    return ("images", "sizes") if isinstance(looker, ObjectDetector) else ("images",)


_MEANINGS = {
    "images": "RGB, as preprocessing says",
    "sizes": "height and width of the part of each image that is not padding, pixels",
    "logits": "of the classes in their order",
    "boxes": "x1, y1, x2, y2 in pixels of these images",
    "scores": "descending",
    "labels": "numbers of classes, from 0",
    "valid": "which are detections; what is not is 0",
    "masks": "probabilities within each box",
}


def describe_arrays(exported: jax.export.Exported, looker: Looker) -> dict[str, list[dict[str, Any]]]:
    """{"inputs": of each {"name", "shape", "dtype", "meaning"} in order, "outputs": likewise}; a symbolic size is its name."""
    outputs = exported.out_tree.unflatten(exported.out_avals)
    outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}
    return {
        "inputs": [describe_array(*item) for item in zip(name_inputs(looker), exported.in_avals, strict=True)],
        "outputs": [describe_array(name, array) for name, array in outputs.items()],
    }


def describe_array(name: str, array: Any) -> dict[str, Any]:
    """Of an array or what stands for one, as JSON can hold it."""
    shape = [side if isinstance(side, int) else str(side) for side in array.shape]
    return {"name": name, "shape": shape, "dtype": array.dtype.name, "meaning": _MEANINGS[name]}


def choose_image_shape(looker: Looker) -> tuple[int, int]:
    """(H, W) that a program is made for where none is asked for."""
    options = looker.options
    if isinstance(looker, Classifier):
        return options["image_size"], options["image_size"]
    if isinstance(looker, Segmenter):
        return options["short_side"], options["short_side"]
    short, long = sorted(options[name] for name in ("short_side", "long_side"))
    return tuple(-(-side // options["multiple"]) * options["multiple"] for side in (short, long))
