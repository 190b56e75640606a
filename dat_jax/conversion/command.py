"""The command ``python -m dat_jax.conversion``: published weights to a folder of weights, and back.

A folder of weights (an "export" of ``dat_jax.checkpoints.exports``) has model.json and params/.
"""

import functools
import json
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from rich.console import Console

from dat_jax.checkpoints.adaptation import kind_of
from dat_jax.checkpoints.class_names import read_class_names
from dat_jax.checkpoints.directory import fetch_weights
from dat_jax.checkpoints.exports import export_model, load_export
from dat_jax.checkpoints.hub import resolve_address
from dat_jax.checkpoints.inference_options import read_options
from dat_jax.checkpoints.integrity import hash_arrays
from dat_jax.checkpoints.loading import load_trained
from dat_jax.cli.console import make_console, print_table
from dat_jax.conversion import detectors, segmentors, selection
from dat_jax.conversion.classifier_settings import read_yaml_config
from dat_jax.conversion.files import SUFFIXES, read_checkpoint, read_weights, write_safetensors
from dat_jax.conversion.official import official_shapes, params_from_official, to_official
from dat_jax.conversion.python_config import read_python_config
from dat_jax.errors import UserError, name_some
from dat_jax.models.dat import DAT, DEFORMABLE_FORMS
from dat_jax.models.registry import Detector, create_model, list_models, name_detector
from dat_jax.models.segmentation import Segmentor
from dat_jax.storage import check_absent

Model = DAT | Segmentor | Detector

# Keys in the metadata of a .safetensors file. The values of the last two are JSON.
_FORM, _CLASS_NAMES, _OPTIONS = "deformable_form", "dat_jax.class_names", "dat_jax.options"
_FORM_ROW = "deformable form"
_LONGEST_ERROR = 600  # characters of a list of names in an error message


class _Family(NamedTuple):
    """Functions of this package for one kind of model around a backbone.

    Attributes:
      word: name of the kind for messages.
      members: names of its models for messages.
      has_names: published names -> whether they belong to such a model.
      guess: (state dict, backbone name) -> model.
      find: (state dict, backbones=) -> (backbone name, model), or None.
      to_variables: (model, state dict) -> variables.
      to_official: (model, variables) -> state dict.
      title: model -> its name.
      read_config: published configuration -> (model, options of inference).
    """

    word: str
    members: str
    has_names: Callable[..., bool]
    guess: Callable
    find: Callable
    to_variables: Callable
    to_official: Callable
    title: Callable[..., str]
    read_config: Callable[..., tuple]


_SEGMENTORS = _Family(
    "segmentor",
    "SemanticFPN or UperNet",
    segmentors.is_segmentor,
    segmentors.guess_segmentor,
    segmentors.find_segmentor,
    segmentors.segmentor_variables,
    segmentors.segmentor_to_official,
    lambda model: model.head,
    segmentors.read_segmentor,
)
_DETECTORS = _Family(
    "detector",
    "RetinaNet, Mask R-CNN or Cascade Mask R-CNN",
    detectors.is_detector,
    detectors.guess_detector,
    detectors.find_detector,
    detectors.detector_variables,
    detectors.detector_to_official,
    name_detector,
    detectors.read_detector_options,
)


def run(
    weights: str,
    out: str,
    *,
    model: str | None = None,
    yaml_file: str | None = None,
    which: str = "auto",
    form: str | None = None,
) -> None:
    """Convert in the direction that ``weights`` implies, a file or a folder, and print what was written.

    The arguments are those of ``convert_from_official``.

    Raises:
      UserError: as ``convert_from_official`` and ``convert_to_official``, or arguments for a file although ``weights`` is
        a folder.
    """
    if not fetch_weights(weights).is_dir():
        rows = convert_from_official(weights, out, model=model, yaml_file=yaml_file, which=which, form=form)
    elif model is None and yaml_file is None and which == "auto":
        rows = convert_to_official(weights, out, form=form)
    else:
        raise UserError(
            f"--model, --yaml and --weights are for a file of weights; the folder {weights} describes its model."
        )
    console = make_console()
    if console.is_terminal:
        width = max(map(len, rows.values())) + 20  # paths and checksums stay on one line, so that they can be copied
        console = Console(highlight=False, width=width)
    print_table(console, "Converted", rows)


def convert_from_official(
    weights: str,
    out: str,
    *,
    model: str | None = None,
    yaml_file: str | None = None,
    which: str = "auto",
    form: str | None = None,
) -> dict[str, str]:
    """Convert a file of published weights to a folder of weights, which is written atomically.

    The class names and inference options that the metadata of a .safetensors file records are stored in the folder; those of
    ``yaml_file`` take precedence.

    With neither ``model`` nor ``yaml_file`` the registry is searched for a model with the names and shapes of the weights.

    Args:
      weights: file that ``read_weights`` reads.
      out: folder to create.
      model: registered name of the model, or of the backbone of a segmentor or detector. The number of classes is that of
        the weights.
      yaml_file: published configuration: a YAML file for a classifier, a Python file (.py) for a segmentor or a detector.
      which: weights to take, "auto", "ema" or "raw", see ``read_weights``.
      form: form of deformable attention, see ``DAT.deformable_form``. None takes the form that the file records, or else
        that of the model or configuration: "cvpr2022" for DAT v1.

    Returns:
      Table rows that describe what was written.

    Raises:
      UserError: the file is damaged or has weights of another model, or ``out`` exists. Nothing is written then.
    """
    check_absent(out)
    if pathlib.Path(out).suffix in SUFFIXES:
        raise UserError(f"OUT must be the name of a new folder if WEIGHTS is a file, got {out}.")
    state_dict, source, metadata = read_checkpoint(weights, weights=which)
    family = next((family for family in (_SEGMENTORS, _DETECTORS) if family.has_names(state_dict)), None)
    prefix_note = "" if family else selection.describe_partial_prefix(state_dict)
    label = f"{weights} ({prefix_note})" if prefix_note else weights
    name, network, options = _choose_model(state_dict, family, weights=label, model=model, yaml_file=yaml_file)
    network = _set_form(network, requested=form, recorded=metadata.get(_FORM), weights=weights)
    try:
        variables = _to_variables(network, state_dict)
    except ValueError as error:
        reason = textwrap.shorten(str(error), _LONGEST_ERROR, placeholder=" ...")
        raise UserError(f"{label} and {name}: {reason}") from error
    classes = _read_metadata(metadata, _CLASS_NAMES, list, weights=weights)
    if classes and len(classes) != network.num_classes:
        raise UserError(f"{weights} records {len(classes)} class names, expected {network.num_classes}.")
    options = {**_read_metadata(metadata, _OPTIONS, dict, weights=weights), **options}
    export_model(out, model=network, variables=variables, classes=classes, options=options)
    restored, description = load_export(out)
    expected = variables["params"] if isinstance(network, DAT) else variables
    rows = _verify(name, network, restored, description["checksum"], expected=expected, path=out)
    if rows.get(_FORM_ROW, "").startswith("cvpr2022") and form is None and _FORM not in metadata:
        rows[_FORM_ROW] += "; for weights trained with the code published with DAT++, use --form=dat_pp"
    return {"taken from": source} | rows | _describe_stored(classes, options)


def convert_to_official(trained: str, out: str, *, form: str | None = None) -> dict[str, str]:
    """Convert a folder of weights or the work directory of a run to a .safetensors file with published names, float32.

    The metadata of the file has the class names and inference options that are stored with the weights.

    Args:
      trained: the folder.
      out: file to create, atomically.
      form: form of deformable attention, for a DAT v1 that does not record it, see ``load_pretrained``.

    Returns:
      Table rows that describe what was written.

    Raises:
      UserError: the folder is damaged, records another form, or ``out`` exists. Nothing is written then.
    """
    check_absent(out)
    if pathlib.Path(out).suffix != ".safetensors":
        raise UserError(f"OUT must end in .safetensors if WEIGHTS is a folder, got {out}.")
    source = resolve_address(trained)
    model, variables = load_trained(source, deformable_form=form)
    recorded = _get_backbone(model).deformable_form
    if form not in (None, recorded):
        raise UserError(f"{trained} records the form {recorded} of deformable attention, got --form={form}.")
    return write_official_weights(
        out,
        model=model,
        variables=variables,
        name=trained,
        classes=read_class_names(source, count=model.num_classes),
        options=read_options(source, kind=kind_of(variables["params"])),
    )


def write_official_weights(
    out: str,
    *,
    model: Model,
    variables: Mapping[str, Any],
    name: str,
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Write a trained model to a .safetensors file with published names, float32, atomically.

    Args:
      out: file to create.
      model: the model.
      variables: its variables.
      name: what the rows and errors call the model.
      classes: names of the classes, in the order of the outputs, for the metadata of the file.
      options: options of inference by name, for the metadata of the file.

    Returns:
      Table rows that describe what was written.

    Raises:
      UserError: ``out`` exists, or a module has no published name.
    """
    try:
        state_dict = _to_state_dict(model, variables)
    except KeyError as error:
        raise UserError(f"{name} has weights without a published name: {error.args[0]}") from error
    dat = _get_backbone(model)
    metadata = {_FORM: dat.deformable_form} if _has_deformable_blocks(dat) else {}
    metadata |= {_CLASS_NAMES: json.dumps(list(classes))} if classes else {}
    metadata |= {_OPTIONS: json.dumps(dict(options))} if options else {}
    write_safetensors(out, {**state_dict, **_make_fixed_kernels(state_dict)}, metadata=metadata)
    # Verify with the reader of published files, as users of the file will read it.
    restored = _to_variables(model, read_weights(out))
    if isinstance(model, DAT):
        restored, variables = restored["params"], variables["params"]
    rows = _verify(name, model, restored, _checksum(variables), expected=variables, path=out)
    return rows | _describe_stored(classes, options)


def _read_metadata(metadata: Mapping[str, str], key: str, expected: type, *, weights: str) -> Any:
    """Value of a key in the metadata of a .safetensors file, from JSON; empty if it is missing."""
    try:
        value = json.loads(metadata[key]) if key in metadata else expected()
    except ValueError:
        value = None
    if not isinstance(value, expected):
        kind = "list" if expected is list else "object"
        raise UserError(
            f"{weights} is damaged: expected a JSON {kind} as {key} of its metadata, got {metadata[key]!r}."
        )
    return value


def _describe_stored(classes: Sequence[str] | None, options: Mapping[str, Any] | None) -> dict[str, str]:
    """Table rows about the class names and the options of inference that are stored with weights."""
    rows = {"class names": name_some(list(map(str, classes or ())))}
    rows["inference options"] = ", ".join(f"{name} {value}" for name, value in (options or {}).items())
    return {name: row for name, row in rows.items() if row}


def _get_backbone(model: Model) -> DAT:
    return model if isinstance(model, DAT) else model.dat


def _get_family(model: Segmentor | Detector) -> _Family:
    return _SEGMENTORS if isinstance(model, Segmentor) else _DETECTORS


def _has_deformable_blocks(dat: DAT) -> bool:
    return "D" in "".join(dat.stages)


def _to_variables(model: Model, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if isinstance(model, DAT):
        return {"params": params_from_official(model, state_dict)}
    return _get_family(model).to_variables(model, state_dict)


def _to_state_dict(model: Model, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if isinstance(model, DAT):
        return to_official(model, variables["params"])
    return _get_family(model).to_official(model, variables)


def _choose_model(
    state_dict: Mapping[str, np.ndarray],
    family: _Family | None,
    *,
    weights: str,
    model: str | None,
    yaml_file: str | None,
) -> tuple[str, Model, dict[str, Any]]:
    """The model of published weights.

    Args:
      state_dict: the weights.
      family: kind of the model; None for a classifier.
      weights: what errors call the file.
      model: registered name, if the user specified one.
      yaml_file: published configuration, if the user specified one.

    Returns:
      Its name for messages, the model, and the options of inference that the configuration sets.
    """
    if yaml_file is not None:
        read = _read_classifier_config if family is None else functools.partial(_read_dense_config, family)
        network, options = read(yaml_file, weights)
        return yaml_file, network, options
    if family is None:
        name, network = _find_classifier(state_dict, weights) if model is None else (model, _create(state_dict, model))
    elif model is None:
        name, network = _find_dense(family, state_dict, weights)
    else:
        name, network = _guess_dense(family, state_dict, model)
    return name, network, {}


def _set_form(model: Model, *, requested: str | None, recorded: str | None, weights: str) -> Model:
    """The model with the form of deformable attention that the user requested or that the file records.

    Otherwise it keeps the form of its name or configuration, see ``DAT.deformable_form``.
    """
    if requested and recorded and requested != recorded:
        raise UserError(f"{weights} records the form {recorded} of deformable attention, got --form={requested}.")
    dat = _get_backbone(model)
    form = requested or recorded or dat.deformable_form
    if form not in DEFORMABLE_FORMS:
        raise UserError(
            f"{weights} records the unknown form {form!r} of deformable attention; known: {', '.join(DEFORMABLE_FORMS)}."
        )
    dat = dat.clone(deformable_form=form)
    return dat if isinstance(model, DAT) else model.clone(dat=dat)


def _describe_form(model: Model) -> dict[str, str]:
    """The table row about the form of deformable attention; empty for a model without D blocks."""
    dat = _get_backbone(model)
    if not _has_deformable_blocks(dat):
        return {}
    descriptions = {
        "cvpr2022": "cvpr2022, DAT v1 as it was released",
        "dat_pp": "dat_pp, as published with DAT++",
    }
    return {_FORM_ROW: descriptions[dat.deformable_form]}


def _read_classifier_config(path: str, weights: str) -> tuple[DAT, dict[str, Any]]:
    """The classifier of a published YAML file, and the options of inference that the file sets."""
    if pathlib.Path(path).suffix == ".py":
        raise UserError(f"{weights} has the weights of a classifier: expected a YAML file as --yaml, got {path}.")
    return read_yaml_config(path)


def _read_dense_config(family: _Family, path: str, weights: str) -> tuple[Segmentor | Detector, dict[str, Any]]:
    """The segmentor or detector of a published Python file, and the options of inference that the file sets."""
    if pathlib.Path(path).suffix != ".py":
        raise UserError(
            f"{weights} has the weights of a {family.word}: expected a Python configuration (.py) as --yaml, got {path}."
        )
    config = read_python_config(path)
    try:
        return family.read_config(config)
    except ValueError as error:
        raise UserError(f"{path} does not describe a supported {family.word}: {error}") from error


def _create(state_dict: Mapping[str, np.ndarray], name: str) -> DAT:
    """A registered classifier with the number of classes and of channels of the weights."""
    arrays = {"num_classes": ("cls_head.weight", 0), "in_channels": ("patch_proj.0.weight", 1)}
    sizes = {
        attribute: state_dict[array].shape[axis]
        for attribute, (array, axis) in arrays.items()
        if array in state_dict and state_dict[array].ndim > axis
    }
    try:
        return create_model(name, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from error


def _find_classifier(state_dict: Mapping[str, np.ndarray], weights: str) -> tuple[str, DAT]:
    """The first registered classifier with these names and shapes. Those with equal shapes differ only in drop path."""
    shapes = {name: array.shape for name, array in state_dict.items()}
    for name in list_models():
        model = _create(state_dict, name)
        # The width is compared first, as the shapes of all parameters of all models take seconds.
        if shapes.get("cls_norm.norm.weight") == (model.dims[-1],):
            expected = official_shapes(model)
            if all(shapes.get(key) == shape for key, shape in expected.items()):
                return name, model
    raise UserError(
        f"{weights} has names or shapes of no known model; set --yaml=FILE, the published configuration, or set --model=NAME, "
        f"one of {', '.join(list_models())}, to see the differences."
    )


def _guess_dense(
    family: _Family, state_dict: Mapping[str, np.ndarray], backbone: str
) -> tuple[str, Segmentor | Detector]:
    """The segmentor or detector of the weights on a registered backbone."""
    try:
        model = family.guess(state_dict, backbone)
    except ValueError as error:
        raise UserError(str(error)) from error
    return f"{family.title(model)} on {backbone}", model


def _find_dense(
    family: _Family, state_dict: Mapping[str, np.ndarray], weights: str
) -> tuple[str, Segmentor | Detector]:
    """The segmentor or detector with these names and shapes on any registered backbone."""
    match = family.find(state_dict, backbones={name: create_model(name) for name in list_models()})
    if match is None:
        raise UserError(
            f"{weights} has names or shapes of no known {family.word}: expected {family.members} on a known backbone; set "
            f"--model=NAME, one of {', '.join(list_models())}, to see the differences."
        )
    backbone, model = match
    return f"{family.title(model)} on {backbone}", model


def _make_fixed_kernels(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fixed kernels (9 D, 1, 3, 3) of slide attention, which the published files have and our parameters do not.

    Channel c * 9 + j selects tap j.
    """
    taps = np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3)
    suffix = ".dep_conv1.weight"
    return {
        f"{name.removesuffix(suffix)}.dep_conv.weight": np.tile(taps, (len(kernel) // 9, 1, 1, 1))
        for name, kernel in state_dict.items()
        if name.endswith(suffix)
    }


def _checksum(variables: Mapping[str, Any]) -> str:
    flat = flatten_dict(variables, sep="/")
    return hash_arrays({name: np.asarray(array) for name, array in flat.items()})


def _verify(name: str, model: Model, restored, restored_checksum: str, *, expected, path: str) -> dict[str, str]:
    """Table rows about a file, after a check that the arrays read back from it are the expected ones."""
    if not _checksum(restored) == restored_checksum == _checksum(expected):
        raise UserError(f"{path} was written, but reading it back gave different numbers; do not use it.")
    return {
        "model": name,
        "parameters": f"{sum(array.size for array in jax.tree.leaves(restored.get('params', restored))):,}",
        **_describe_form(model),
        "classes": str(model.num_classes),
        "checksum": restored_checksum,
        "written": path,
    }
