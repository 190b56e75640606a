"""A trained model as an ONNX file, converted by the optional package jax2onnx (pip install -e ".[onnx]")."""

import functools
import logging
import os
from typing import Any

import jax

from dat_jax.errors import UserError
from dat_jax.exporting.programs import BATCH, describe_array, describe_images, make_branch
from dat_jax.inference import ObjectDetector, Predictor

_ALGORITHMS = "tpu"  # matrix products; jax2onnx does not support the gathers of other platforms


def write_onnx(
    path: str | os.PathLike,
    predictor: Predictor,
    *,
    image_shape: tuple[int, int],
    preprocessing: str = "inside",
    batch: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Write a classifier or a segmentor as one ONNX file with the input "images" and the output "logits".

    Args:
      path: file to write.
      predictor: a model from ``inference.load``.
      image_shape: see ``programs.make_program``.
      preprocessing: see ``programs.make_program``.
      batch: see ``programs.make_program``.

    Returns:
      Inputs and outputs, as in ``programs.describe_arrays``.

    Raises:
      UserError: the model is a detector, jax2onnx is not installed, or it does not support the model.
    """
    if isinstance(predictor, ObjectDetector):
        raise UserError(
            "ONNX export supports classifiers and segmentors; the box selection of a detector is not converted."
        )
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports] (an optional dependency)
    except ImportError as error:
        raise UserError('ONNX export requires jax2onnx, which is not installed: pip install -e ".[onnx]".') from error
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about every shape that it cannot infer
    compute_logits = functools.partial(
        make_branch(predictor, _ALGORITHMS, preprocessing=preprocessing), predictor.variables
    )
    size = BATCH if batch is None else batch
    images = describe_images(predictor.image_format, size, image_shape, preprocessing=preprocessing)
    try:
        jax2onnx.to_onnx(
            compute_logits,
            [images],
            model_name="dat_jax",
            return_mode="file",
            output_path=os.fspath(path),
            input_names=["images"],
            output_names=["logits"],
            export_mode="web",  # weights in the same file
        )
    except Exception as error:  # jax2onnx raises many types for what it does not support
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"jax2onnx does not support this model at {image_shape[0]} x {image_shape[1]} pixels ({reason})."
        ) from error
    # A symbolic batch size is only a name here, so shapes are computed for one image.
    single = jax.ShapeDtypeStruct((batch or 1, *images.shape[1:]), images.dtype)
    logits = jax.eval_shape(compute_logits, single)
    logits = jax.ShapeDtypeStruct((images.shape[0], *logits.shape[1:]), logits.dtype)
    return {"inputs": [describe_array("images", images)], "outputs": [describe_array("logits", logits)]}
