"""The folder of an exported model: its files, and a manifest with the digest of each."""

import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from dat_jax import __version__
from dat_jax.checkpoints.backbone import extract_backbone
from dat_jax.checkpoints.exports import write_model
from dat_jax.checkpoints.integrity import check_digests, hash_file
from dat_jax.checkpoints.model_description import describe_model, get_backbone, name_model
from dat_jax.conversion.command import write_official_weights
from dat_jax.data.buckets import Shape
from dat_jax.errors import UserError
from dat_jax.exporting.manifest import MANIFEST, PROGRAM_SUFFIX, choose_program, list_shapes, read_manifest
from dat_jax.exporting.onnx import write_onnx
from dat_jax.exporting.preprocessing import describe_preprocessing, get_statistics
from dat_jax.exporting.programs import (
    check_program,
    check_settings,
    choose_image_shape,
    describe_arrays,
    make_features_program,
    make_program,
)
from dat_jax.inference import Classifier, ObjectDetector, Predictor, Segmenter
from dat_jax.models.backbone import Backbone
from dat_jax.models.dat import DAT
from dat_jax.models.registry import Detector
from dat_jax.models.segmentation import Segmentor
from dat_jax.storage import as_path, atomic_path, check_absent, fetch, list_objects

FORMATS = ("orbax", "stablehlo", "safetensors", "onnx")
DEFAULT_FORMATS = FORMATS[:3]  # onnx needs an optional package
WEIGHTS, ONNX = "model.safetensors", "model.onnx"
PROGRAM, PROGRAM_OF_BUCKET = f"model{PROGRAM_SUFFIX}", f"model_{{0}}x{{1}}{PROGRAM_SUFFIX}"  # height and width


def write_exported(
    directory: str | os.PathLike,
    predictor: Predictor,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    image_shape: tuple[int, int] | None = None,
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    preprocessing: str = "inside",
    batch: int | None = None,
    buckets: Sequence[Shape] | None = None,
    features: Sequence[int] | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Export a trained model: write its files and their manifest into a new folder, atomically.

    Args:
      directory: folder to create.
      predictor: a model from ``inference.load``.
      formats: one or more of ``FORMATS``:
        "orbax": model.json and params/, which ``dat_jax.load`` reads, with the class names and the inference options.
        "stablehlo": model.stablehlo, or model_HxW.stablehlo for each bucket, see ``make_program`` and ``make_features_program``.
        "safetensors": model.safetensors, weights with their published names.
        "onnx": model.onnx, see ``write_onnx``.
      image_shape: (height, width) of the program's images in pixels; None for ``choose_image_shape``.
      platforms: see ``make_program``.
      preprocessing: see ``make_program``.
      batch: see ``make_program``.
      buckets: (height, width) of one or more buckets in pixels, for programs that take images of many sizes; None for a program
        for images of one size.
      features: indices of the stages whose feature maps the programs return instead of predictions; None for predictions. The
        maps have the output norms of a segmentor or detector, and none of a classifier. The weights are those of the whole model.
      training: what the manifest records about the training, see ``read_training``; None for nothing.

    Returns:
      Content of manifest.json. "program" describes the program for images of one size, and "programs" those of buckets, the
      smallest first.

    Raises:
      UserError: unknown formats, buckets together with an image shape or ONNX, features together with ONNX or of stages that the
        model does not use, arguments that ``make_program`` refuses, or the folder exists or cannot be written.
    """
    directory = as_path(directory)
    if set(formats) - set(FORMATS) or not formats:
        raise UserError(f"formats must be one or more of {', '.join(FORMATS)}, got {','.join(formats) or 'none'}.")
    check_absent(directory)
    if buckets:
        _check_buckets(buckets, formats, image_shape)
        buckets = sorted(buckets, key=math.prod)
    image_shape = image_shape or choose_image_shape(predictor)
    if features is None:
        make, check = functools.partial(make_program, predictor), functools.partial(check_program, predictor)
    else:
        backbone, variables = _get_backbone(predictor, features, formats)
        mean, std = get_statistics(predictor)
        options = dict(image_format=predictor.image_format, mean=mean, std=std)
        make, check = functools.partial(make_features_program, backbone, variables, **options), check_settings
    shapes = {PROGRAM_OF_BUCKET.format(*bucket): bucket for bucket in buckets} if buckets else {PROGRAM: image_shape}
    settings: dict[str, Any] = dict(preprocessing=preprocessing, batch=batch, is_bucket=bool(buckets))
    for shape in shapes.values():
        check(image_shape=shape, platforms=platforms, **settings)
    programs, onnx = [], None
    with atomic_path(directory) as unfinished:
        unfinished.mkdir()
        if "stablehlo" in formats:
            programs = _write_programs(unfinished, make, shapes, platforms=platforms, **settings)
        _write_weights(unfinished, predictor, formats, name=directory.name)
        if "onnx" in formats:
            arrays = write_onnx(
                unfinished / ONNX, predictor, image_shape=image_shape, preprocessing=preprocessing, batch=batch
            )
            onnx = {"file": ONNX, **arrays}
        manifest = {
            "dat_jax": __version__,
            "jax": jax.__version__,
            "task": _name_task(predictor) if features is None else "features",
            "model": _describe_model(predictor.model),
            "backbone": name_model(get_backbone(predictor.model)),
            "training": training,
            "classes": list(predictor.class_names),
            **({"category_ids": list(predictor.category_ids)} if isinstance(predictor, ObjectDetector) else {}),
            "preprocessing": describe_preprocessing(
                predictor,
                image_shape=image_shape,
                buckets=buckets,
                inside=preprocessing == "inside",
                is_for_features=features is not None,
            ),
            "program": programs[0] if programs and not buckets else None,
            "programs": programs if buckets else [],
            "onnx": onnx,
            "files": {name: _make_record(unfinished / name) for name in list_objects(unfinished)},
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _get_backbone(
    predictor: Predictor, features: Sequence[int], formats: Sequence[str]
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone of a trained model with the output norms that it was trained with, and its variables."""
    if "stablehlo" not in formats or "onnx" in formats:
        raise UserError(f"features are for the format stablehlo and not for onnx, got the formats {','.join(formats)}.")
    has_norms = not isinstance(predictor, Classifier)
    backbone, variables = extract_backbone(
        predictor.model, predictor.variables, out_indices=features, output_norms=has_norms
    )
    untrained = has_norms and set(variables["params"]) - set(predictor.variables["params"]["backbone"])
    if untrained:
        index = min(untrained).removeprefix("norms_")
        raise UserError(
            f"This detector does not use the map of stage {index}, which has no norm: leave it out of features."
        )
    return backbone, variables


def _write_programs(
    directory: pathlib.Path,
    make: Callable[..., jax.export.Exported],
    shapes: Mapping[str, Shape],
    *,
    is_bucket: bool,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Make and write a program for each file name and image shape, and return their descriptions."""
    described = []
    for name, shape in shapes.items():
        program = make(image_shape=shape, is_bucket=is_bucket, **settings)
        (directory / name).write_bytes(program.serialize())
        bucket = {"bucket": list(shape)} if is_bucket else {}
        described.append({**bucket, "file": name, **_describe_program(program)})
    return described


def _write_weights(directory: pathlib.Path, predictor: Predictor, formats: Sequence[str], *, name: str) -> None:
    """Write the weights in the formats "orbax" and "safetensors", as far as these are wanted."""
    model, variables = predictor.model, predictor.variables
    described: dict[str, Any] = dict(classes=predictor.class_names, options=predictor.options)
    if "orbax" in formats:
        write_model(directory, model=model, variables=variables, **described)
    if "safetensors" in formats:
        arrays = jax.tree.map(np.asarray, variables)
        write_official_weights(str(directory / WEIGHTS), model=model, variables=arrays, name=name, **described)


def _check_buckets(buckets: Sequence[Shape], formats: Sequence[str], image_shape: Shape | None) -> None:
    if image_shape is not None:
        raise UserError("buckets and image_size cannot be combined: a bucket is the largest size of its images.")
    if "stablehlo" not in formats:
        raise UserError(f"buckets are for the format stablehlo, got the formats {','.join(formats)}.")
    if "onnx" in formats:
        raise UserError("An ONNX file takes images of one size: leave out onnx or buckets.")
    if len(set(buckets)) < len(buckets):
        raise UserError(f"buckets must differ, got {list_shapes(buckets)}.")


def check_files(directory: str | os.PathLike) -> dict[str, Any]:
    """Check every file of a folder that ``write_exported`` wrote against its manifest.

    Returns:
      Content of manifest.json.

    Raises:
      UserError: the manifest is missing or damaged, or files are missing or differ; the files are named.
    """
    directory = fetch(directory)
    manifest = read_manifest(directory)
    records = {
        name: {"bytes": record["bytes"], "sha256": record["sha256"]} for name, record in manifest["files"].items()
    }
    check_digests(str(directory), saved=records, actual={name: _make_record(directory / name) for name in records})
    return manifest


def load_program(directory: str | os.PathLike, size: Shape | None = None) -> jax.export.Exported:
    """Load a program of a folder that ``write_exported`` wrote.

    Call it as ``jax.jit(program.call)(images)``, or with ``(images, sizes)`` for a detector or a bucket. A detector's features
    take no sizes.

    Args:
      directory: the folder.
      size: (height, width) of an image in pixels, for which the smallest bucket is chosen. None is possible if there is only one
        program.

    Raises:
      UserError: the manifest is missing or damaged, there is no program for this size, or the installed jax cannot read it; the
        version that wrote it is named.
    """
    directory = fetch(directory)
    manifest = read_manifest(directory)
    described = choose_program(directory, manifest, size)
    path = directory / described["file"]
    try:
        program = jax.export.deserialize(bytearray(path.read_bytes()))
        oldest, newest = _get_calling_conventions()
        if not oldest <= program.calling_convention_version <= newest:
            raise ValueError(f"its calling convention is version {program.calling_convention_version}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # jax raises several types for a format that it does not know
        if manifest.get("jax") == jax.__version__:
            raise UserError(f"{path} is damaged: jax {jax.__version__}, which wrote it, cannot read it.") from error
        raise UserError(
            f"{path} was written by jax {manifest.get('jax', 'of an unknown version')} and cannot be read by the installed jax "
            f"{jax.__version__}: install the version that wrote it or a slightly newer one, or export again with the installed "
            "one."
        ) from error
    if [list(map(str, array.shape)) for array in program.in_avals] != [
        list(map(str, array["shape"])) for array in described["inputs"]
    ]:
        raise UserError(f"{directory} is damaged: the program of {path.name} is not the one that {MANIFEST} describes.")
    return program


def _get_calling_conventions() -> tuple[int, int]:
    """The oldest and the newest version of the calling convention of programs that the installed jax reads."""
    return (
        jax.export.minimum_supported_calling_convention_version,
        jax.export.maximum_supported_calling_convention_version,
    )


def _make_record(path: pathlib.Path) -> dict[str, Any] | None:
    """Size and digest of a file, as the manifest has them; None if it cannot be read."""
    try:
        return {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    except OSError:
        return None


def _name_task(predictor: Predictor) -> str:
    if isinstance(predictor, Classifier):
        return "classification"
    return "segmentation" if isinstance(predictor, Segmenter) else "detection"


def _describe_model(model: DAT | Segmentor | Detector) -> dict[str, Any]:
    """Attributes of the model, with those of its backbone if it has one."""
    if isinstance(model, DAT):
        return describe_model(model)
    return {**describe_model(model), "backbone": describe_model(model.dat)}


def _describe_program(program: jax.export.Exported) -> dict[str, Any]:
    return {
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
        "calling_convention_versions_read": list(_get_calling_conventions()),
        "products": "float32 on every platform",
        **describe_arrays(program),
    }
