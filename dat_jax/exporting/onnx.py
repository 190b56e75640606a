"""A trained model as an ONNX file, by jax2onnx, which is an extra: pip install -e ".[onnx]"."""

import functools
import logging
import os
from typing import Any

import jax

from dat_jax.errors import UserError
from dat_jax.exporting.programs import BATCH, choose_dtype, describe_array, make_branch
from dat_jax.inference import Looker, ObjectDetector

_ALGORITHMS = "tpu"  # products instead of gathers, which the converter does not take


def write_onnx(
    path: str | os.PathLike,
    looker: Looker,
    *,
    image_shape: tuple[int, int],
    preprocessing: str = "inside",
    batch: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Writes one file, of what ``programs.make_program`` says, with an input "images" and an output "logits".

    Returns:
      Inputs and outputs as ``programs.describe_arrays``.

    Raises:
      UserError: a detector, jax2onnx is not installed, or it does not take the model.
    """
    if isinstance(looker, ObjectDetector):
        raise UserError("ONNX is written of classifiers and segmentors; a detector's choice of boxes is not converted.")
    try:
        import jax2onnx
    except ImportError as error:
        raise UserError('ONNX is written by jax2onnx, which is not installed: pip install -e ".[onnx]".') from error
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # names every shape that it does not know
    branch = make_branch(looker, _ALGORITHMS, preprocessing=preprocessing)
    images = jax.ShapeDtypeStruct((BATCH if batch is None else batch, *image_shape, 3), choose_dtype(preprocessing))
    try:
        jax2onnx.to_onnx(
            functools.partial(branch, looker.variables),
            [images],
            model_name="dat_jax",
            return_mode="file",
            output_path=os.fspath(path),
            input_names=["images"],
            output_names=["logits"],
            export_mode="web",  # one file
        )
    except Exception as error:  # whatever the converter raises for what it does not know
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"jax2onnx does not take this model at {image_shape[0]} x {image_shape[1]} pixels ({words})."
        ) from error
    one = jax.ShapeDtypeStruct((batch or 1, *image_shape, 3), images.dtype)
    logits = jax.eval_shape(functools.partial(branch, looker.variables), one)
    logits = jax.ShapeDtypeStruct((images.shape[0], *logits.shape[1:]), logits.dtype)
    return {"inputs": [describe_array("images", images)], "outputs": [describe_array("logits", logits)]}
