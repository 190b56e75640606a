"""Trained weights: an export or a run's work directory as a model, or as the start of another training."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.errors import UserError
from dat_jax.evaluation import classification, segmentation
from dat_jax.models.dat import DAT
from dat_jax.models.registry import create_model, create_segmentor
from dat_jax.models.segmentation import Segmentor
from dat_jax.training.checkpoint import load_export, read_best_variables, save_export

# Attributes that are of flax, or change how the function is computed but not which.
_NOT_DESCRIBED = {"parent", "name", "dtype", "implementation", "remat", "scan_blocks", "dat"}
CLASS_NAMES = "classes.txt"  # of a work directory: a name a line
_HEAD = "cls_head"
_PIXEL_HEADS = ("decode_head/classifier/", "auxiliary_head/classifier/")
_BACKBONE = "backbone/dat/"  # of a segmentor's parameters: those of its DAT
_METRICS = {"classification": classification.METRIC, "segmentation": segmentation.METRIC}


def load_pretrained(path: str | os.PathLike, **overrides) -> tuple[DAT | Segmentor, dict[str, Any]]:
    """A trained model. Use as ``model.apply(variables, images, train=False)``.

    Args:
      path: an export, as ``python -m dat_jax.conversion`` writes, or a run's work directory, of which the best
        checkpoint is taken, with the averaged weights where there are any.
      **overrides: attributes of ``DAT`` (of a segmentor's backbone), such as num_classes, image_size or dtype (float32
        unless given). Where they change shapes, weights are adapted as ``adapt_params`` says; a classifier's head of other
        classes is initialised from a fixed key.

    Returns:
      The model, and variables {"params": ...}, of a segmentor with "batch_stats", on the default device.

    Raises:
      UserError: nothing to load there, damage, unknown attributes, or ones that the weights do not fit.
    """
    saved_model, variables = load_trained(path)
    images = jnp.zeros((1, 64, 64, 3))
    if isinstance(saved_model, Segmentor):
        dat = _create_model(path, {**describe_model(saved_model.dat), **overrides})
        model = saved_model.clone(dat=dat, dtype=dat.dtype)
    else:
        model = _create_model(path, {**describe_model(saved_model), **overrides})
    try:
        wanted = jax.eval_shape(model.init, jax.random.key(0), images)
    except (ValueError, TypeError) as error:  # settings that do not fit together
        raise UserError(f"{path} cannot be loaded so: {str(error).splitlines()[0]}") from error
    if isinstance(saved_model, Segmentor):
        variables, _ = adapt_segmentor(
            variables, abstract_variables=wanted, fixed_stages=_fixed_stages(saved_model.dat)
        )
        return model, jax.tree.map(jnp.asarray, variables)
    wanted = wanted["params"]
    if model.num_classes != saved_model.num_classes:
        head = jax.jit(lambda key: model.init(key, images)["params"][_HEAD])(jax.random.key(0))
        wanted = {**wanted, _HEAD: head}
    params, _ = adapt_params(variables["params"], abstract_params=wanted, fixed_stages=_fixed_stages(saved_model))
    return model, {"params": jax.tree.map(jnp.asarray, params)}


def load_for_finetuning(
    path: str | os.PathLike, *, fresh_variables: Mapping[str, Any], head_rows: np.ndarray | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Trained weights to start another training from.

    A segmentor starts from another one, or from a classifier, of which it takes the backbone.

    Args:
      path: an export, or a run's work directory, as in ``load_pretrained``.
      fresh_variables: of the model to train, initialised; on the host or on devices that this process sees.
      head_rows: see ``adapt_params``.

    Returns:
      Variables as numpy arrays with the structure, shapes and dtypes of ``fresh_variables``, and sentences that say what
      was adapted.

    Raises:
      UserError: nothing to load there, damage, or weights of another model, each named.
    """
    model, variables = load_trained(path)
    wants_segmentor = "backbone" in fresh_variables["params"]
    if isinstance(model, Segmentor) and not wants_segmentor:
        raise UserError(f"{path} has the weights of a segmentor; a classifier starts from those of a classifier.")
    if not wants_segmentor:
        params, notes = adapt_params(
            variables["params"],
            abstract_params=fresh_variables["params"],
            head_rows=head_rows,
            fixed_stages=_fixed_stages(model),
        )
        variables = {"params": params}
    elif isinstance(model, Segmentor):
        stages = _fixed_stages(model.dat)
        variables, notes = adapt_segmentor(variables, abstract_variables=fresh_variables, fixed_stages=stages)
    else:
        stages = _fixed_stages(model)
        variables, notes = adapt_backbone(variables["params"], fresh_variables=fresh_variables, fixed_stages=stages)
    return jax.tree.map(np.asarray, variables), notes


def adapt_params(
    params: Mapping[str, Any],
    *,
    abstract_params: Mapping[str, Any],
    head_rows: np.ndarray | None = None,
    fixed_stages: Collection[int] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Parameters made to fit a model of another image size, window size or class count.

    Position tables (``rpe_table`` of the kind "table", and ``relative_position_bias_table`` of windows) are resized
    bicubically, each head by itself. A head of another class count is taken from ``abstract_params``, or picks rows of
    the given one. Dtypes become those of ``abstract_params``.

    Args:
      params: nested dictionaries of arrays.
      abstract_params: what is wanted: initialised arrays, or ShapeDtypeStructs.
      head_rows: int (K,): class i of the new head is class head_rows[i] of the given one, such as the ImageNet-1k
        classes among those of ImageNet-22k.
      fixed_stages: whose ``rpe_table`` is of the kind "fixed", a number for each query and key, which is not resized.

    Returns:
      Nested dictionaries with the structure of ``abstract_params``: numpy arrays, but the head is that of
      ``abstract_params`` where it is not taken over. And sentences that say what was adapted.

    Raises:
      UserError: names every parameter that differs in another way; or the rows do not fit the heads.

    Source: the published code for fine-tuning.
    """
    given, wanted = _flatten(params), _flatten(abstract_params)
    classes, wanted_classes = _classes(params), _classes(abstract_params)
    notes = []
    if head_rows is not None:
        given |= _pick_rows(params[_HEAD], np.asarray(head_rows), wanted_classes)
        notes.append(f"The head takes {wanted_classes} of the {classes} classes of the loaded one.")
    elif classes != wanted_classes:
        notes.append(f"The head of {wanted_classes} classes is new: the loaded one has {classes}.")
    adapted, more = _adapt(given, wanted, fixed_stages, is_head=lambda name: name.startswith(f"{_HEAD}/"))
    return _unflatten(adapted), notes + more


def adapt_segmentor(
    variables: Mapping[str, Any], *, abstract_variables: Mapping[str, Any], fixed_stages: Collection[int] = ()
) -> tuple[dict[str, Any], list[str]]:
    """``adapt_params`` for the variables of a segmentor, "params" and "batch_stats"."""
    given, wanted = (_flatten(tree["params"]) for tree in (variables, abstract_variables))
    name = f"{_PIXEL_HEADS[0]}conv_seg/kernel"
    classes, wanted_classes = (tree[name].shape[-1] if name in tree else None for tree in (given, wanted))
    notes = []
    if classes != wanted_classes:
        notes.append(f"The classifiers of {wanted_classes} classes are new: the loaded ones have {classes}.")
    params, more = _adapt(given, wanted, fixed_stages, is_head=lambda name: name.startswith(_PIXEL_HEADS))
    given, wanted = (_flatten(tree["batch_stats"]) for tree in (variables, abstract_variables))
    statistics, _ = _adapt(given, wanted, (), is_head=lambda name: False)
    return {"params": _unflatten(params), "batch_stats": _unflatten(statistics)}, notes + more


def adapt_backbone(
    params: Mapping[str, Any], *, fresh_variables: Mapping[str, Any], fixed_stages: Collection[int] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Variables of a segmentor whose backbone has a classifier's parameters, as ``adapt_params`` fits them; the rest stays."""
    given = {f"{_BACKBONE}{name}": array for name, array in _flatten(params).items() if not name.startswith("cls_")}
    fresh = _flatten(fresh_variables["params"])
    wanted = {name: leaf for name, leaf in fresh.items() if name.startswith(_BACKBONE)}
    adapted, notes = _adapt(given, wanted, fixed_stages, is_head=lambda name: False)
    notes = ["The backbone is that of a classifier; norms of its maps, and heads, are new.", *notes]
    return {**fresh_variables, "params": _unflatten({**fresh, **adapted})}, notes


def _adapt(
    given: Mapping[str, Any],
    wanted: Mapping[str, Any],
    fixed_stages: Collection[int],
    *,
    is_head: Callable[[str], bool],
) -> tuple[dict[str, Any], list[str]]:
    """Arrays by name for ``wanted``; of a head whose last axis differs the wanted array is taken itself."""
    adapted, problems, resized = {}, [], collections.Counter()
    for name, leaf in wanted.items():
        if name not in given:
            problems.append(f"{name} is missing, wanted {tuple(leaf.shape)}")
            continue
        array = np.asarray(given[name])
        sides = [_table_sides(name, shape, fixed_stages) for shape in (array.shape, leaf.shape)]
        if array.shape == leaf.shape:
            adapted[name] = array.astype(leaf.dtype, copy=False)
        elif is_head(name) and array.shape[:-1] == leaf.shape[:-1]:
            adapted[name] = leaf
        elif None not in sides and sides[0][0] == sides[1][0]:
            adapted[name] = _resize_table(array, sides[0], sides[1]).astype(leaf.dtype)
            resized["{1} x {2} to {4} x {5}".format(*sides[0], *sides[1])] += 1
        else:
            problems.append(f"{name} is {array.shape}, wanted {tuple(leaf.shape)}")
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    if problems:
        raise UserError(f"These weights are of another model: {'; '.join(problems)}.")
    return adapted, [f"Position tables resized from {change}: {count}." for change, count in resized.items()]


def _flatten(tree) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _unflatten(flat) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def load_trained(path: str | os.PathLike) -> tuple[DAT | Segmentor, dict[str, Any]]:
    """The model and the variables, as numpy arrays, of an export or a work directory; see ``load_pretrained``."""
    path = pathlib.Path(path)
    if (path / "model.json").is_file():
        arrays, description = load_export(path)
        settings, head = description.get("model"), description.get("segmentor")
        variables = {"params": arrays} if head is None else arrays
    elif (path / "checkpoints").is_dir():
        config = _read_config(path / "config.json")
        variables, _ = read_best_variables(path / "checkpoints", metric=_METRICS[config["task"]])
        settings = {key: value for key, value in config["model"].items() if key != "dtype"}
        head = None
        if config["task"] == "segmentation":
            classes = variables["params"]["decode_head"]["classifier"]["conv_seg"]["bias"].shape[0]
            head = {**config["head"], "num_classes": classes}
            head["head"] = head.pop("name")
        else:
            settings["num_classes"] = _classes(variables["params"])
    else:
        raise UserError(
            f"Wanted an export (with model.json) or the work directory of a run (with checkpoints), got {path}; "
            "python -m dat_jax.conversion makes an export of published weights."
        )
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not say which model its weights are of.")
    dat = _create_model(path, settings)
    if head is None:
        return dat, variables
    try:
        attributes = {key: tuple(value) if isinstance(value, list) else value for key, value in head.items()}
        return create_segmentor(attributes.pop("head"), backbone=dat, **attributes), variables
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error


def export_model(directory: str | os.PathLike, *, model: DAT | Segmentor, variables: Mapping[str, Any]) -> str:
    """Writes an export that ``load_pretrained`` reads, into a folder that must not exist; returns its checksum."""
    if isinstance(model, Segmentor):
        description = {"model": describe_model(model.dat), "segmentor": describe_model(model)}
        arrays = {name: variables[name] for name in ("params", "batch_stats")}
    else:
        description, arrays = {"model": describe_model(model)}, variables["params"]
    return save_export(directory, params=arrays, description=description)


def describe_model(model: DAT | Segmentor) -> dict[str, Any]:
    """Every attribute that determines the function, as JSON can hold it; not how it is computed, nor a backbone."""
    names = [field.name for field in dataclasses.fields(model) if field.name not in _NOT_DESCRIBED]
    return {name: getattr(model, name) for name in names}


def read_class_names(path: str | os.PathLike, *, count: int) -> tuple[str, ...] | None:
    """Of a work directory; None where the names are not known, as in an export. UserError as ``read_names``."""
    file = pathlib.Path(path) / CLASS_NAMES
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


def resize_bicubic(tables: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(..., H, W) -> (..., H', W') in float64, as PyTorch's ``interpolate`` (bicubic, corners not aligned, no antialias).

    Cubic convolution with a = -0.75, border pixels repeated. jax.image.resize has a = -0.5, and other borders.
    """
    rows, columns = (_cubic_weights(old, new) for old, new in zip(tables.shape[-2:], shape, strict=True))
    return rows @ tables.astype(np.float64) @ columns.T


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """(new, old): how much each old pixel adds to a new one."""
    a = -0.75
    center = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(center)[:, None] + np.arange(-1, 3)
    t = np.abs(center[:, None] - taps)
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), np.where(t <= 1, near, far))
    return weights


def _table_sides(name: str, shape: tuple[int, ...], fixed_stages: Collection[int]) -> tuple[int, int, int] | None:
    """(heads, height, width) of a position table; None for other parameters."""
    name, leaf = name.removeprefix(_BACKBONE), name.rsplit("/", 1)[-1]
    if leaf == "rpe_table" and len(shape) == 3 and int(name.split("/")[0].removeprefix("stages_")) not in fixed_stages:
        return tuple(shape)
    if leaf == "relative_position_bias_table" and len(shape) == 2 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return shape[1], math.isqrt(shape[0]), math.isqrt(shape[0])
    return None


def _resize_table(table, old, new):
    if table.ndim == 3:
        return resize_bicubic(table, new[1:])
    return resize_bicubic(table.T.reshape(old), new[1:]).reshape(new[0], -1).T  # windows: (height * width, heads)


def _pick_rows(head, rows: np.ndarray, wanted: int) -> dict[str, np.ndarray]:
    classes = head["kernel"].shape[-1]
    if rows.shape != (wanted,) or rows.dtype.kind not in "iu":
        raise UserError(f"The rows of the head want one integer for each of {wanted} classes, got {rows.shape}.")
    if rows.min() < 0 or rows.max() >= classes:
        raise UserError(f"The rows of the head want numbers from 0 to {classes - 1}, got {rows.min()} to {rows.max()}.")
    return {f"{_HEAD}/{name}": np.asarray(array)[..., rows] for name, array in head.items()}


def _classes(params) -> int:
    try:
        return params[_HEAD]["kernel"].shape[-1]
    except (KeyError, TypeError):
        raise UserError(f"These weights have no {_HEAD}: they are not a classifier's.") from None


def _fixed_stages(model: DAT) -> set[int]:
    return {stage for stage, kind in enumerate(model.position_bias) if kind == "fixed"}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """Of a run: its task, and the model's settings, a name and attributes."""
    try:
        config = {"task": "classification", **json.loads(path.read_text())}
        if config["task"] in _METRICS and isinstance(config["model"], dict):
            return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not say which model the weights beside it are of.") from error
    raise UserError(f"{path} does not say which model the weights beside it are of.")


def _create_model(path, settings: Mapping[str, Any]) -> DAT:
    """``dat_pp_tiny`` where the settings have no name: they are all attributes then."""
    attributes = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return create_model(attributes.pop("name", "dat_pp_tiny"), **attributes)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
