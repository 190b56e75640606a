"""Trained weights: loaded as a model, or as the start of another training.

They come from a folder of weights, which ``dat_jax.export_model`` and ``python -m dat_jax.conversion`` write, or from the work
directory of a run.
"""

import functools
import json
import operator
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.checkpoints.adaptation import (
    adapt_backbone,
    adapt_dense,
    adapt_params,
    count_channels,
    count_classes,
    kind_of,
    reorder_classes,
    replace_class_layers,
)
from dat_jax.checkpoints.adapters import apply_adapter
from dat_jax.checkpoints.arrays import read_arrays
from dat_jax.checkpoints.averages import find_weights
from dat_jax.checkpoints.class_names import describe_difference, read_class_names
from dat_jax.checkpoints.directory import fetch_weights, find_best_step, read_meta
from dat_jax.checkpoints.exports import load_export
from dat_jax.checkpoints.hub import resolve_address
from dat_jax.checkpoints.integrity import check_digests, compute_fingerprints, name_leaves
from dat_jax.checkpoints.model_description import (
    Model,
    add_deformable_form,
    create_dat,
    create_described,
    describe_model,
    get_backbone,
    name_model,
)
from dat_jax.checkpoints.orbax_messages import ORBAX_ERRORS, describe_error
from dat_jax.errors import UserError
from dat_jax.models.dat import DAT
from dat_jax.models.lora import GROUP, merge_adapters
from dat_jax.models.registry import VARIANTS
from dat_jax.storage import as_path, exists


def load_pretrained(
    path: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    ema_decay: float | None = None,
    **overrides,
) -> tuple[Model, dict[str, Any]]:
    """Load a trained model. Use it as ``model.apply(variables, images, train=False)``.

    Args:
      path: a folder of weights, as ``python -m dat_jax.conversion`` writes it, an export on the Hugging Face Hub,
        hf://USER/REPOSITORY or hf://USER/REPOSITORY@REVISION, or the work directory of a run. From the latter the best
        checkpoint is loaded, with the averaged weights if the run has them.
      adapter: file of adapters that were trained on these weights, adapter.safetensors in the work directory of a run with
        ``config.lora``. The model has its classes.
      ema_decay: decay of the average of the weights to load, ``config.ema_decay`` or one of ``config.ema_decays`` of the run. By
        default the weights that the run evaluates.
      **overrides: attributes of ``DAT`` (the backbone of a segmentor or detector) that replace those of the trained model,
        such as num_classes, in_channels, image_size or dtype (float32 by default). If they change shapes, the weights are
        adapted, see ``adapt_params``; the head of a classifier with another number of classes is initialized from a fixed key.
        ``deformable_form`` is required for a DAT v1 whose file does not record it.

    Returns:
      The model, and its variables {"params": ...}, with "batch_stats" for a model with BatchNorm, on the default device.

    Raises:
      UserError: there is nothing to load at ``path``, it is damaged, it has no average with this decay, or an attribute is
        unknown or does not fit the weights.
    """
    trained_model, variables = load_trained(path, deformable_form=overrides.get("deformable_form"), ema_decay=ema_decay)
    if adapter is not None:
        variables = apply_adapter(adapter, variables)
        trained_model = trained_model.clone(num_classes=count_classes(variables["params"]))
    trained_dat = get_backbone(trained_model)
    dat = create_dat({**describe_model(trained_dat), **overrides}, source=path)
    model = dat if isinstance(trained_model, DAT) else trained_model.clone(dat=dat, dtype=dat.dtype)
    images = jnp.zeros((1, 64, 64, dat.in_channels))
    try:
        abstract_variables = jax.eval_shape(model.init, jax.random.key(0), images)
    except (ValueError, TypeError) as error:  # attributes that do not fit together
        raise UserError(f"{path} cannot be loaded with these attributes: {str(error).splitlines()[0]}") from error
    fixed_stages = _find_fixed_stages(trained_dat)
    if not isinstance(model, DAT):
        variables, _ = adapt_dense(variables, abstract_variables=abstract_variables, fixed_stages=fixed_stages)
        return model, jax.tree.map(jnp.asarray, variables)
    abstract_params = abstract_variables["params"]
    if model.num_classes != trained_model.num_classes:
        head = jax.jit(lambda key: model.init(key, images)["params"]["cls_head"])(jax.random.key(0))
        abstract_params = {**abstract_params, "cls_head": head}
    params, _ = adapt_params(variables["params"], abstract_params=abstract_params, fixed_stages=fixed_stages)
    return model, {"params": jax.tree.map(jnp.asarray, params)}


load = load_pretrained  # dat_jax.load


def load_for_finetuning(
    path: str | os.PathLike,
    *,
    fresh_variables: Mapping[str, Any],
    deformable_form: str,
    model_name: str | None = None,
    class_names: Sequence[str] | None = None,
    head_rows: np.ndarray | None = None,
    same_classes: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Load trained weights as the start of another training.

    A classifier starts from a classifier. A segmentor or a detector starts from another one of the same kind, or from a
    classifier, which becomes its backbone. If the weights record the names of their classes, the outputs are assigned to the
    classes of the data by name; for other classes, the layers that depend on them are those of ``fresh_variables``.

    Args:
      path: a folder of weights or a work directory, as in ``load_pretrained``.
      fresh_variables: initialized variables of the model to train, on the host or on devices of this process.
      deformable_form: form of attention of the model to train, see ``DAT``.
      model_name: name of the model to train, for errors.
      class_names: names of the classes of the data, in the order of their labels; None if they are unknown.
      head_rows: see ``adapt_params``; only for classifiers. The names of the classes are not compared.
      same_classes: raise a UserError if the weights were trained on other classes.

    Returns:
      Variables as numpy arrays with the structure, shapes and dtypes of ``fresh_variables``, and sentences that describe how
      the weights were adapted.

    Raises:
      UserError: there is nothing to load at ``path``, it is damaged, or its weights are of another kind of model, of the
        other form of attention, or of other shapes; the model of the weights is named if it is another one than
        ``model_name``, and otherwise the first arrays. With ``same_classes``, also weights of other classes; the names are
        listed.
    """
    source = resolve_address(path)
    model, variables = load_trained(source)
    dat = get_backbone(model)
    trained_kind, kind = kind_of(variables["params"]), kind_of(fresh_variables["params"])
    if trained_kind not in ("classifier", kind):
        alternative = "" if kind == "classifier" else f", or of another {kind}"
        raise UserError(
            f"{path} has the weights of a {trained_kind}; a {kind} starts from those of a classifier{alternative}."
        )
    difference, class_notes = "", []
    if kind == trained_kind and class_names is not None and head_rows is None:
        params, difference, class_notes = _match_classes(source, variables["params"], class_names)
        variables = {**variables, "params": params}
    if difference and same_classes:
        raise UserError(
            f"{path} has the weights of other classes: {difference}. Evaluate on data with the same classes."
        )
    try:
        _check_form(path, dat, deformable_form)
        variables, notes = _adapt(variables, fresh_variables, head_rows=head_rows, fixed_stages=_find_fixed_stages(dat))
    except UserError as error:
        trained_name = name_model(dat)
        if None in (trained_name, model_name) or trained_name == model_name:
            raise
        raise UserError(f"{path} holds {trained_name}: set --config.model.name={trained_name}.") from error
    if difference and count_classes(fresh_variables["params"]) == model.num_classes:  # otherwise the shapes differ
        variables = {**variables, "params": replace_class_layers(variables["params"], fresh_variables["params"])}
        class_notes = [f"The layers for the classes are initialized, since the names differ: {difference}."]
    return jax.tree.map(np.asarray, variables), class_notes + notes


def _check_form(path: str | os.PathLike, dat: DAT, deformable_form: str) -> None:
    """Raise a UserError if trained weights are for another form of deformable attention."""
    if "D" in "".join(dat.stages) and dat.deformable_form != deformable_form:
        raise UserError(
            f"{path} has the weights of a model with deformable_form {dat.deformable_form!r}, got a model with "
            f"{deformable_form!r}: set --config.model.deformable_form={dat.deformable_form}."
        )


def _adapt(
    variables: dict[str, Any],
    fresh_variables: Mapping[str, Any],
    *,
    head_rows: np.ndarray | None,
    fixed_stages: Collection[int],
) -> tuple[dict[str, Any], list[str]]:
    """Adapt trained variables to a model of the same kind, or those of a classifier to a model with it as the backbone."""
    params, options = variables["params"], {"fixed_stages": fixed_stages}
    if kind_of(fresh_variables["params"]) == "classifier":
        fresh_params = fresh_variables["params"]
        adapted, notes = adapt_params(params, abstract_params=fresh_params, head_rows=head_rows, **options)
        return {"params": adapted}, notes
    if kind_of(params) == "classifier":
        return adapt_backbone(params, fresh_variables=fresh_variables, **options)
    return adapt_dense(variables, abstract_variables=fresh_variables, **options)


def _match_classes(
    path: str | os.PathLike, params: Mapping[str, Any], class_names: Sequence[str]
) -> tuple[Mapping[str, Any], str, list[str]]:
    """Compare the classes of trained weights with those of the data, and reorder them by name if only the order differs.

    Returns:
      The parameters; how the classes differ, "" if they do not; and sentences that describe what was adapted.
    """
    count = count_classes(params)
    recorded = read_class_names(path, count=count)
    if recorded is None:
        difference = "" if count == len(class_names) else f"expected {len(class_names)}, got {count}"
        return params, difference, []
    difference = describe_difference(recorded, class_names)
    if difference and sorted(set(recorded)) == sorted(class_names):  # every name occurs once in both
        order = [recorded.index(name) for name in class_names]
        return reorder_classes(params, order), "", [f"The classes are reordered by name: {difference}."]
    return params, difference, []


def check_exists(path: str | os.PathLike) -> None:
    """Check that there are trained weights at a path, without reading them. Those on the Hugging Face Hub are downloaded.

    Raises:
      UserError: the path is neither a folder of weights nor the work directory of a run, or ``resolve_address`` fails.
    """
    path = as_path(resolve_address(path))
    try:
        if exists(path / "model.json") or exists(path / "checkpoints"):
            return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if str(path) in VARIANTS:
        raise UserError(
            f"{path} is the name of a model, and weights are not downloaded: convert published weights with python -m "
            "dat_jax.conversion WEIGHTS.pth OUT_DIR and load OUT_DIR, or create a model without weights with "
            f"dat_jax.create_model({str(path)!r})."
        )
    raise UserError(
        "Expected a folder of weights (with model.json) or the work directory of a run (with checkpoints), got "
        f"{path}; python -m dat_jax.conversion makes a folder of weights from published ones."
    )


def load_trained(
    path: str | os.PathLike, *, deformable_form: str | None = None, ema_decay: float | None = None
) -> tuple[Model, dict[str, Any]]:
    """Load a trained model as it was trained, with its variables as numpy arrays.

    Args:
      path: a folder of weights or a work directory, as in ``load_pretrained``.
      deformable_form: form of attention of a model whose file does not record it.
      ema_decay: see ``load_pretrained``.

    Raises:
      UserError: there is nothing to load at ``path``, it is damaged or incomplete, or it has no average with this decay.
    """
    path = resolve_address(path)
    check_exists(path)
    path = fetch_weights(path)
    if os.path.isfile(path / "model.json"):
        if ema_decay is not None:
            raise UserError(
                f"ema_decay {ema_decay} needs the work directory of a run; the weights in {path} are one average."
            )
        variables, description = load_export(path)
        kind = next((kind for kind in ("segmentor", "detector") if kind in description), "classifier")
        settings, head = description.get("model"), description.get(kind)
        variables = {"params": variables} if kind == "classifier" else variables
    else:
        config = _read_config(path / "config.json")
        variables, _ = read_best_variables(path / "checkpoints", ema_decay=ema_decay)
        variables["params"] = _merge_adapters(variables["params"], config)
        kind = kind_of(variables["params"])
        settings = {key: value for key, value in config["model"].items() if key != "dtype"}
        head = config.get("head")
        if kind != "classifier" and not isinstance(head, dict):
            raise UserError(f"{path / 'config.json'} does not describe the head of the checkpoints beside it.")
        described = settings if kind == "classifier" or head is None else head
        described["num_classes"] = count_classes(variables["params"])
        settings["in_channels"] = count_channels(variables["params"])
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not record which model its weights belong to.")
    settings = add_deformable_form(settings, deformable_form, source=path)
    return create_described(kind, settings, head, source=path), variables


def _merge_adapters(params: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a run with its adapters, if it has any, in the kernels of their layers."""
    if GROUP not in params:
        return dict(params)
    keys = config["lora"]
    return jax.tree.map(np.asarray, merge_adapters(params, scale=keys["alpha"] / keys["rank"]))


def read_best_variables(directory: str | os.PathLike, *, ema_decay: float | None = None) -> tuple[dict[str, Any], int]:
    """Read the variables that the best checkpoint is evaluated with, without the arrays of the optimizer.

    Args:
      directory: the directory of the checkpoints, which is only read.
      ema_decay: decay of a further average to read, see ``config.ema_decays``.

    Returns:
      {"params": ...}, the averaged weights if the checkpoint has them, and the collections of the model state, as nested
      dictionaries of numpy arrays; and the step of the checkpoint.

    Raises:
      UserError: there is no complete checkpoint, it has no average with this decay, or it is damaged; the arrays are named.
    """
    directory = pathlib.Path(directory)
    step = find_best_step(directory)
    if step is None:
        raise UserError(f"There is no complete checkpoint in {directory}.")
    path = directory / str(step)
    try:
        meta = read_meta(path)
        fingerprints, metadata = meta["digests"], meta.get("metadata", {})
    except ORBAX_ERRORS as error:
        raise UserError(f"The checkpoint {path} cannot be read: {describe_error(error)}.") from error
    group = find_weights(fingerprints, metadata, ema_decay)
    try:
        saved = {name: value for name, value in fingerprints.items() if name.startswith((f"{group}/", "model_state/"))}
        arrays = read_arrays(path / "state", names=saved, partial=True)
    except ORBAX_ERRORS as error:
        raise UserError(f"The checkpoint {path} cannot be read: {describe_error(error)}.") from error
    actual = name_leaves(jax.jit(compute_fingerprints)(arrays))
    actual = {name: int(value) for name, value in actual.items()}
    check_digests(f"The checkpoint {path}", saved=saved, actual=actual)
    params = functools.reduce(operator.getitem, group.split("/"), arrays)
    return {"params": params, **arrays.get("model_state", {})}, step


def _find_fixed_stages(dat: DAT) -> set[int]:
    """Indices of the stages whose position bias is a number for each query and key, which cannot be resized."""
    return {stage for stage, kind in enumerate(dat.position_bias) if kind == "fixed"}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """The configuration of a run, with the groups that describe its model.

    Raises:
      UserError: the file cannot be read, or lacks them.
    """
    try:
        config = json.loads(path.read_text())
        if isinstance(config["model"], dict) and isinstance(config.get("head", {}), dict):
            return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe the model of the checkpoints beside it.") from error
    raise UserError(f"{path} does not describe the model of the checkpoints beside it.")
