"""The folder of an exported model: files, a manifest with their digests, and what says whether they are whole."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dat_jax import __version__
from dat_jax.checkpoints.exports import write_model
from dat_jax.checkpoints.integrity import check_digests, hash_file, list_files
from dat_jax.checkpoints.model_description import describe_model
from dat_jax.conversion.command import write_weights
from dat_jax.errors import UserError
from dat_jax.exporting.onnx import write_onnx
from dat_jax.exporting.preprocessing import describe_preprocessing
from dat_jax.exporting.programs import check_program, choose_image_shape, describe_arrays, make_program
from dat_jax.inference import Classifier, Looker, Segmenter
from dat_jax.models.dat import DAT
from dat_jax.storage import atomic_path, check_absent

FORMATS = ("orbax", "stablehlo", "safetensors", "onnx")  # the last one is an extra
MANIFEST, PROGRAM, WEIGHTS, ONNX = "manifest.json", "model.stablehlo", "model.safetensors", "model.onnx"


def write_exported(
    directory: str | os.PathLike,
    looker: Looker,
    *,
    formats: Sequence[str] = FORMATS[:3],
    image_shape: tuple[int, int] | None = None,
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    preprocessing: str = "inside",
    batch: int | None = None,
) -> dict[str, Any]:
    """Writes a new folder, which appears when it is whole.

    Args:
      directory: must not exist.
      looker: of ``inference.load``.
      formats: of ``FORMATS``: "orbax", model.json and params/, which ``load`` reads, with the names of the classes and the
        options; "stablehlo", model.stablehlo, see ``make_program``; "safetensors", model.safetensors, published names;
        "onnx", model.onnx, see ``write_onnx``.
      image_shape: (H, W) of the program's images; None for those that the model is made for, see ``choose_image_shape``.
      platforms, preprocessing, batch: of ``make_program``.

    Returns:
      What manifest.json has.

    Raises:
      UserError: unknown formats, what ``make_program`` refuses, the folder exists already, or cannot be written.
    """
    directory = pathlib.Path(directory)
    if set(formats) - set(FORMATS) or not formats:
        raise UserError(f"formats wants some of {', '.join(FORMATS)}, got {','.join(formats) or 'none'}.")
    check_absent(directory)
    shape, program, onnx = image_shape or choose_image_shape(looker), None, None
    settings = dict(image_shape=shape, preprocessing=preprocessing, batch=batch)
    check_program(looker, platforms=platforms, **settings)
    with atomic_path(directory) as unfinished:
        unfinished.mkdir()
        if "stablehlo" in formats:
            program = make_program(looker, platforms=platforms, **settings)
            (unfinished / PROGRAM).write_bytes(program.serialize())
        if "orbax" in formats:
            options = dict(classes=looker.class_names, options=looker.options)
            write_model(unfinished, model=looker.model, variables=looker.variables, **options)
        if "safetensors" in formats:
            variables = jax.tree.map(np.asarray, looker.variables)
            write_weights(str(unfinished / WEIGHTS), model=looker.model, variables=variables, name=directory.name)
        if "onnx" in formats:
            onnx = {"file": ONNX, **write_onnx(unfinished / ONNX, looker, **settings)}
        manifest = {
            "dat_jax": __version__,
            "jax": jax.__version__,
            "task": _name_task(looker),
            "model": _describe(looker.model),
            "classes": list(looker.class_names),
            "preprocessing": describe_preprocessing(looker, image_shape=shape, inside=preprocessing == "inside"),
            "program": None if program is None else _describe_program(program, looker),
            "onnx": onnx,
            "files": {name: _make_record(unfinished / name) for name in list_files(unfinished)},
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def check_files(directory: str | os.PathLike) -> dict[str, Any]:
    """Check every file of a folder that ``write_exported`` wrote against its manifest.

    Returns:
      Content of manifest.json.

    Raises:
      UserError: the manifest is missing or damaged, or files are missing or differ; the files are named.
    """
    directory = pathlib.Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        records = {
            name: {"bytes": record["bytes"], "sha256": record["sha256"]} for name, record in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{MANIFEST} is damaged"
        raise UserError(f"{directory} is not a folder written by dat_jax.export, or is damaged: {reason}.") from error
    check_digests(str(directory), saved=records, actual={name: _make_record(directory / name) for name in records})
    return manifest


def _make_record(path: pathlib.Path) -> dict[str, Any] | None:
    """Size and digest of a file, as the manifest has them; None if it cannot be read."""
    try:
        return {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    except OSError:
        return None


def _name_task(looker):
    if isinstance(looker, Classifier):
        return "classification"
    return "segmentation" if isinstance(looker, Segmenter) else "detection"


def _describe(model):
    if isinstance(model, DAT):
        return describe_model(model)
    return {**describe_model(model), "backbone": describe_model(model.dat)}


def _describe_program(program, looker):
    return {
        "file": PROGRAM,
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
        "products": "float32 on every platform",
        **describe_arrays(program, looker),
    }
