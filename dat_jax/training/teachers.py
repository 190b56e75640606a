"""Teachers of a student, see ``tasks.classification.distillation``: trained models of this project, or programs of any."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dat_jax.checkpoints.adaptation import count_classes, reorder_classes
from dat_jax.checkpoints.class_names import describe_difference, read_class_names
from dat_jax.checkpoints.hub import resolve_address
from dat_jax.checkpoints.inference_options import read_options
from dat_jax.checkpoints.loading import load_pretrained
from dat_jax.errors import UserError
from dat_jax.models.dat import DAT
from dat_jax.ops.dispatch import target_platform
from dat_jax.storage import fetch
from dat_jax.tasks.classification.distillation import KINDS, model_outputs

logger = logging.getLogger(__name__)
_KEY = "config.distillation.teacher"
_SUFFIX = ".stablehlo"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained classifier.

    Attributes:
      outputs: (variables, normalized images) -> outputs, see ``model_outputs``.
      variables: arrays of the host.
    """

    outputs: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    variables: Any


def load_teacher(
    path: str,
    *,
    kind: str,
    class_names: Sequence[str],
    data: ConfigDict,
    batch_size: int = 2,
    tokens: tuple[int, int] | None = None,
    dtype: Any = jnp.float32,
) -> Teacher:
    """Load a teacher, and check that it fits the student.

    Args:
      path: an export, a run or converted weights, as for ``dat_jax.load``; or a program NAME.stablehlo of ``jax.export``,
        that maps images (B, S, S, C) to logits (B, K), or to a dict with "logits". Float images are normalized as for training;
        for a program with uint8 images, they are rounded to it.
      kind: what is learned, one of ``KINDS``.
      class_names: names of the classes of the student. If the teacher records its names in another order, its outputs are
        reordered. A teacher of features may have any classes.
      data: the group ``data`` of the configuration, with the size S of the images, their channels C and how they are normalized.
      batch_size: B, number of images per call.
      tokens: (height, width) of the last map of the student, which the teacher of tokens must have too; None: any.
      dtype: of the computation of a model of this project.

    Raises:
      UserError: there is no teacher at ``path``, or it has other classes, other images, or no outputs of this kind.
    """
    if path.endswith(_SUFFIX):
        if KINDS[kind] != "logits":
            kinds = " or ".join(name for name, output in KINDS.items() if output == "logits")
            raise UserError(f"{_KEY} {path} has logits only: expected config.distillation.kind {kinds}, got {kind}.")
        program = _load_program(path)
        if program.in_avals[0].dtype == jnp.uint8 and data.dtype != "uint8":
            raise UserError(f"{_KEY} {path} is a program of uint8 images, but config.data.dtype is {data.dtype}.")
        teacher = Teacher(functools.partial(_call_program, program, data.mean, data.std), {})
    else:
        try:
            path = str(resolve_address(path))
            model, variables = load_pretrained(path, dtype=dtype)
        except UserError as error:
            raise UserError(f"{_KEY}: {error}") from error
        if not isinstance(model, DAT):
            raise UserError(f"{_KEY} {path} is no classifier.")
        _check_statistics(path, data)
        params = variables["params"] if kind == "features" else _order_classes(path, variables["params"], class_names)
        teacher = Teacher(functools.partial(model_outputs, model), jax.tree.map(np.asarray, {"params": params}))
    for side in data.get("train_sizes") or (data.image_size,):
        images = jax.ShapeDtypeStruct((batch_size, side, side, data.channels), jnp.float32)
        try:
            shapes = jax.eval_shape(teacher.outputs, teacher.variables, images)
            shape = shapes[KINDS[kind]].shape
        except (ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            images_text = f"{batch_size} images of {side} x {side} with {data.channels} channels"
            raise UserError(f"{_KEY} {path} cannot be used with {images_text}: {reason}") from error
    if KINDS[kind] == "logits" and shape != (batch_size, len(class_names)):
        raise UserError(
            f"{_KEY} {path}: expected logits of {len(class_names)} classes, got an array {shape} for {batch_size} images."
        )
    if kind == "tokens" and tokens is not None and shape[1:3] != tokens:
        raise UserError(
            f"{_KEY} {path}: expected a last map of {tokens[0]} x {tokens[1]} positions, as that of the student, got "
            f"{shape[1]} x {shape[2]}."
        )
    logger.info("Learning from the teacher %s.", path)
    return teacher


def _order_classes(path: str, params: Mapping[str, Any], class_names: Sequence[str]) -> Mapping[str, Any]:
    """The parameters with the classes in the order of the student."""
    count = count_classes(params)
    recorded = read_class_names(path, count=count)
    if recorded is None:
        return params
    if sorted(recorded) == sorted(class_names):
        return reorder_classes(params, [recorded.index(name) for name in class_names])
    raise UserError(f"{_KEY} {path} has other classes: {describe_difference(recorded, class_names)}.")


def _check_statistics(path: str, data: ConfigDict) -> None:
    """Check that a teacher was trained on images that were normalized as those of the student."""
    recorded = read_options(path, kind="classifier")
    for name in ("mean", "std"):
        trained = recorded.get(name)
        if isinstance(trained, list) and tuple(trained) != tuple(data[name]):
            raise UserError(
                f"{_KEY} {path} was trained with config.data.{name}={','.join(map(str, trained))}, and this run has "
                f"{','.join(map(str, data[name]))}: set the same."
            )


def _load_program(path: str) -> jax.export.Exported:
    try:
        program = jax.export.deserialize(bytearray(fetch(path).read_bytes()))
    except OSError as error:
        raise UserError(f"{_KEY} {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # jax raises several types for a format that it does not know
        raise UserError(f"{_KEY} {path} is not a program that jax {jax.__version__} can read.") from error
    if len(program.in_avals) != 1:
        raise UserError(
            f"{_KEY} {path}: expected a program of images only, got one with {len(program.in_avals)} arguments."
        )
    platform = target_platform()
    if not {"gpu": {"cuda", "rocm"}}.get(platform, {platform}) & set(program.platforms):
        raise UserError(f"{_KEY} {path} is a program for {', '.join(program.platforms)}, but the run is on {platform}.")
    dtype = program.in_avals[0].dtype
    if dtype != jnp.uint8 and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"{_KEY} {path}: expected a program of images that are uint8 or floats, got {dtype}.")
    output = _get_logits(jax.tree.unflatten(program.out_tree, program.out_avals))
    if not hasattr(output, "shape"):
        raise UserError(f'{_KEY} {path}: expected a program that returns logits, or a dict with "logits".')
    return program


def _get_logits(outputs: Any) -> Any:
    return outputs.get("logits") if isinstance(outputs, Mapping) else outputs


def _call_program(
    program: jax.export.Exported, mean: Sequence[float], std: Sequence[float], variables: Any, images: jax.Array
) -> dict[str, jax.Array]:
    del variables
    dtype = program.in_avals[0].dtype
    if dtype == jnp.uint8:
        scale, shift = (jnp.asarray(x, images.dtype).reshape(1, 1, 1, -1) for x in (std, mean))
        images = jnp.clip(jnp.round((images * scale + shift) * 255), 0, 255)
    return {"logits": _get_logits(program.call(images.astype(dtype)))}
