"""Trained weights: an export or a run's work directory as a model, or as the start of another training."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.checkpoints.adaptation import adapt_backbone, adapt_dense, adapt_params, count_classes, kind_of
from dat_jax.checkpoints.exports import load_export, save_export, write_export
from dat_jax.checkpoints.manager import read_best_variables
from dat_jax.errors import UserError
from dat_jax.evaluation import classification, detection, segmentation
from dat_jax.models.dat import DAT, LATER_STAGE_TYPES
from dat_jax.models.registry import (
    VARIANTS,
    Detector,
    create_detector,
    create_model,
    create_segmentor,
    name_detector,
)
from dat_jax.models.segmentation import Segmentor

# Attributes that are of flax, or change how the function is computed but not which.
_NOT_DESCRIBED = {"parent", "name", "dtype", "implementation", "remat", "scan_blocks", "dat"}
CLASS_NAMES = "classes.txt"  # of a work directory: a name a line
_TASKS = {  # what a run trains, and what its best checkpoint is best in
    "classification": ("classifier", classification.METRIC),
    "segmentation": ("segmentor", segmentation.METRIC),
    "detection": ("detector", detection.METRIC),
}
_AROUND_A_BACKBONE = {"segmentor": create_segmentor, "detector": create_detector}


def load_pretrained(path: str | os.PathLike, **overrides) -> tuple[DAT | Segmentor | Detector, dict[str, Any]]:
    """A trained model. Use as ``model.apply(variables, images, train=False)``.

    Args:
      path: an export, as ``python -m dat_jax.conversion`` writes, or a run's work directory, of which the best
        checkpoint is taken, with the averaged weights where there are any.
      **overrides: attributes of ``DAT`` (of a segmentor's or detector's backbone), such as num_classes, image_size or dtype
        (float32 unless given). Where they change shapes, weights are adapted as ``adapt_params`` says; a classifier's head of
        other classes is initialized from a fixed key. ``deformable_form`` is required for a DAT v1 that was saved before
        this attribute existed.

    Returns:
      The model, and variables {"params": ...}, of a model with BatchNorm with "batch_stats", on the default device.

    Raises:
      UserError: nothing to load there, damage, unknown attributes, or ones that the weights do not fit.
    """
    saved_model, variables = load_trained(path, deformable_form=overrides.get("deformable_form"))
    saved_dat = _dat(saved_model)
    dat = _create_model(path, {**describe_model(saved_dat), **overrides})
    model = dat if saved_model is saved_dat else saved_model.clone(dat=dat, dtype=dat.dtype)
    images = jnp.zeros((1, 64, 64, 3))
    try:
        wanted = jax.eval_shape(model.init, jax.random.key(0), images)
    except (ValueError, TypeError) as error:  # settings that do not fit together
        raise UserError(f"{path} cannot be loaded so: {str(error).splitlines()[0]}") from error
    stages = _fixed_stages(saved_dat)
    if model is not dat:
        variables, _ = adapt_dense(variables, abstract_variables=wanted, fixed_stages=stages)
        return model, jax.tree.map(jnp.asarray, variables)
    wanted = wanted["params"]
    if model.num_classes != saved_model.num_classes:
        head = jax.jit(lambda key: model.init(key, images)["params"]["cls_head"])(jax.random.key(0))
        wanted = {**wanted, "cls_head": head}
    params, _ = adapt_params(variables["params"], abstract_params=wanted, fixed_stages=stages)
    return model, {"params": jax.tree.map(jnp.asarray, params)}


load = load_pretrained  # what programs call it


def load_for_finetuning(
    path: str | os.PathLike,
    *,
    fresh_variables: Mapping[str, Any],
    deformable_form: str,
    head_rows: np.ndarray | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Trained weights to start another training from.

    A segmentor starts from another one, a detector from another one, and both from a classifier, of which they take the
    backbone.

    Args:
      path: an export, or a run's work directory, as in ``load_pretrained``.
      fresh_variables: of the model to train, initialized; on the host or on devices that this process sees.
      deformable_form: of the model to train, see ``DAT``. Weights of the other form are refused.
      head_rows: see ``adapt_params``.

    Returns:
      Variables as numpy arrays with the structure, shapes and dtypes of ``fresh_variables``, and sentences that say what
      was adapted.

    Raises:
      UserError: nothing to load there, damage, or weights of another model, each named.
    """
    model, variables = load_trained(path)
    dat = _dat(model)
    if "D" in "".join(dat.stages) and dat.deformable_form != deformable_form:
        raise UserError(
            f"{path} has the weights of a model with deformable_form {dat.deformable_form!r}, got a model with "
            f"{deformable_form!r}: set --config.model.deformable_form={dat.deformable_form}."
        )
    stages = _fixed_stages(dat)
    given, wanted = (kind_of(tree["params"]) for tree in (variables, fresh_variables))
    if given not in ("classifier", wanted):
        others = "" if wanted == "classifier" else f", or of another {wanted}"
        raise UserError(f"{path} has the weights of a {given}; a {wanted} starts from those of a classifier{others}.")
    if wanted == "classifier":
        params, notes = adapt_params(
            variables["params"],
            abstract_params=fresh_variables["params"],
            head_rows=head_rows,
            fixed_stages=stages,
        )
        variables = {"params": params}
    elif given == "classifier":
        variables, notes = adapt_backbone(variables["params"], fresh_variables=fresh_variables, fixed_stages=stages)
    else:
        variables, notes = adapt_dense(variables, abstract_variables=fresh_variables, fixed_stages=stages)
    return jax.tree.map(np.asarray, variables), notes


def load_trained(
    path: str | os.PathLike, *, deformable_form: str | None = None
) -> tuple[DAT | Segmentor | Detector, dict[str, Any]]:
    """The model and the variables, as numpy arrays, of an export or a work directory; see ``load_pretrained``.

    ``deformable_form`` is that of a model that was saved before this attribute existed.
    """
    path = pathlib.Path(path)
    if os.path.isfile(path / "model.json"):
        variables, description = load_export(path)
        kind = next((kind for kind in _AROUND_A_BACKBONE if kind in description), "classifier")
        settings, around = description.get("model"), description.get(kind)
        variables = {"params": variables} if kind == "classifier" else variables
    elif os.path.isdir(path / "checkpoints"):
        config = _read_config(path / "config.json")
        kind, metric = _TASKS[config["task"]]
        variables, _ = read_best_variables(path / "checkpoints", metric=metric)
        settings = {key: value for key, value in config["model"].items() if key != "dtype"}
        around = config.get("head")
        (settings if kind == "classifier" else around)["num_classes"] = count_classes(variables["params"])
    elif str(path) in VARIANTS:
        raise UserError(
            f"{path} is the name of a model, and weights are not downloaded: python -m dat_jax.conversion WEIGHTS.pth "
            f"OUT_DIR makes an export of published ones to load, and dat_jax.create_model({str(path)!r}) a model without any."
        )
    else:
        raise UserError(
            f"Wanted an export (with model.json) or the work directory of a run (with checkpoints), got {path}; "
            "python -m dat_jax.conversion makes an export of published weights."
        )
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not say which model its weights are of.")
    dat = _create_model(path, _complete_form(path, settings, deformable_form))
    if kind == "classifier":
        return dat, variables
    try:
        attributes = _to_attributes(around)
        name = attributes.pop("name", attributes.get("head"))  # exports of segmentors have the attribute
        return _AROUND_A_BACKBONE[kind](name, backbone=dat, **attributes), variables
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error


def export_model(
    directory: str | os.PathLike,
    *,
    model: DAT | Segmentor | Detector,
    variables: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Writes an export that ``load_pretrained`` reads.

    Args:
      directory: must not exist.
      model, variables: of any task.
      classes: their names.
      options: how ``inference.load`` looks at images with it, by name.

    Returns:
      Its checksum.
    """
    return save_export(directory, **_describe_export(model, variables, classes, options))


def write_model(
    directory: pathlib.Path,
    *,
    model: DAT | Segmentor | Detector,
    variables: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """What ``export_model`` does, into a folder that is there; OSError where it cannot be written."""
    return write_export(directory, **_describe_export(model, variables, classes, options))


def _describe_export(model, variables, classes, options) -> dict[str, Any]:
    """What ``save_export`` wants beside the place."""
    description, arrays = {"model": describe_model(_dat(model))}, variables["params"]
    given = {"classes": classes and list(classes), "options": options and dict(options)}
    description |= {key: value for key, value in given.items() if value}
    if not isinstance(model, DAT):
        description[kind_of(arrays)] = describe_model(model)
        arrays = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    return {"params": arrays, "description": description}


def describe_model(model: DAT | Segmentor | Detector) -> dict[str, Any]:
    """Every attribute that determines the function, as JSON can hold it; not how it is computed, nor a backbone.

    Of a detector with its name.
    """
    names = [field.name for field in dataclasses.fields(model) if field.name not in _NOT_DESCRIBED]
    attributes = {name: getattr(model, name) for name in names}
    return {"name": name_detector(model), **attributes} if isinstance(model, Detector) else attributes


def read_class_names(path: str | os.PathLike, *, count: int) -> tuple[str, ...] | None:
    """Of a work directory or an export; None where the names are not known. UserError as ``read_names``."""
    file = pathlib.Path(path) / CLASS_NAMES
    if (description := pathlib.Path(path) / "model.json").is_file():
        names = tuple(map(str, json.loads(description.read_text()).get("classes") or ()))
        if names and len(names) != count:
            raise UserError(f"{description} has {len(names)} names of classes, wanted {count}.")
        return names or None
    return read_names(file, count=count) if file.is_file() else None


def read_names(file: str | os.PathLike, *, count: int) -> tuple[str, ...]:
    """The names of classes in a file, one a line.

    Raises:
      UserError: it cannot be read, or has not ``count`` names.
    """
    try:
        names = tuple(pathlib.Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if len(names) != count:
        raise UserError(f"{file} has {len(names)} names, wanted {count}, one a line.")
    return names


def _dat(model: DAT | Segmentor | Detector) -> DAT:
    return model if isinstance(model, DAT) else model.dat


def _fixed_stages(dat: DAT) -> set[int]:
    return {stage for stage, kind in enumerate(dat.position_bias) if kind == "fixed"}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """Of a run: its task, and the settings of the model and of what is around it, a name and attributes each."""
    try:
        config = {"task": "classification", **json.loads(path.read_text())}
        groups = ("model",) if config["task"] == "classification" else ("model", "head")
        if config["task"] in _TASKS and all(isinstance(config[name], dict) for name in groups):
            return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not say which model the weights beside it are of.") from error
    raise UserError(f"{path} does not say which model the weights beside it are of.")


def _complete_form(path, settings: Mapping[str, Any], form: str | None) -> dict[str, Any]:
    """The settings with "deformable_form", which files have only since both published forms are supported.

    Before, only "dat_pp" was computed. Weights of DAT v1 may nevertheless be the released ones, which are for the other
    form, and nothing in the file shows which. A DAT++ exists in one form only.
    """
    if "deformable_form" in settings:
        return dict(settings)
    dat = _create_model(path, settings)
    kinds = set("".join(dat.stages))
    fits_both = "D" in kinds and not kinds & LATER_STAGE_TYPES and not any(dat.lpu)
    if fits_both and form is None:
        raise UserError(
            f"{path} was saved before dat_jax distinguished the two published forms of deformable attention, and its weights "
            "fit both. Name the form with dat_jax.load(..., deformable_form=FORM), or write a file that records it: python -m "
            f"dat_jax.conversion {path} NEW.safetensors --form=FORM. FORM is cvpr2022 for weights that the authors released "
            "for DAT v1, and dat_pp for a model that dat_jax trained."
        )
    return {**settings, "deformable_form": form or "dat_pp"}


def _create_model(path, settings: Mapping[str, Any]) -> DAT:
    """``dat_pp_tiny`` where the settings have no name: they are all attributes then."""
    attributes = _to_attributes(settings)
    try:
        return create_model(attributes.pop("name", "dat_pp_tiny"), **attributes)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error


def _to_attributes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of JSON, which has no tuples."""

    def to_tuple(value):
        return tuple(map(to_tuple, value)) if isinstance(value, list | tuple) else value

    return {key: to_tuple(value) for key, value in settings.items()}
