"""What `python -m dat_jax.conversion` does: files with published names to exports, and exports to files."""

import functools
import pathlib
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from dat_jax.checkpoints.exports import export_model, load_export
from dat_jax.checkpoints.integrity import hash_arrays
from dat_jax.checkpoints.loading import load_trained
from dat_jax.conversion import detectors, segmentors, selection
from dat_jax.conversion.classifier_settings import read_yaml_config
from dat_jax.conversion.files import SUFFIXES, read_checkpoint, read_weights, write_safetensors
from dat_jax.conversion.official import official_shapes, params_from_official, to_official
from dat_jax.conversion.python_config import read_python_config
from dat_jax.errors import UserError
from dat_jax.models.dat import DAT, DEFORMABLE_FORMS
from dat_jax.models.registry import Detector, create_model, list_models, name_detector
from dat_jax.models.segmentation import Segmentor
from dat_jax.storage import check_absent

_FORM = "deformable_form"  # in the metadata of a .safetensors file
_FORM_ROW = "deformable form"


class _Dense(NamedTuple):
    """Models around a backbone, one of which is called ``word``: the functions of ``conversion`` for them."""

    word: str
    known: str
    has_names: Callable[..., bool]
    guess: Callable
    find: Callable
    to_variables: Callable
    to_official: Callable
    title: Callable[..., str]
    read: Callable[..., tuple]


_SEGMENTORS = _Dense(
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
_DETECTORS = _Dense(
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


def import_weights(
    weights: str,
    out: str,
    *,
    model: str | None = None,
    yaml_file: str | None = None,
    which: str = "auto",
    form: str | None = None,
) -> dict[str, str]:
    """A file with published names -> an export.

    Args:
      weights: a file that ``read_weights`` reads.
      out: the folder to make.
      model: a name of the registry, of the backbone where there is one; the class count is that of the weights.
      yaml_file: a published configuration, instead: YAML for a classifier, Python (.py) for a segmentor or a detector. With
        neither the registry is searched for names and shapes.
      which: the weights to take, "auto", "ema" or "raw", see ``read_weights``.
      form: of deformable attention, see ``DAT.deformable_form``. None takes the form that the file records, or else that
        of the model or configuration: weights of DAT v1 are those of its release.

    Returns:
      Rows of a table: what was written.

    Raises:
      UserError: damage, weights of another model, or ``out`` exists. Nothing is written then.
    """
    check_absent(out)
    if pathlib.Path(out).suffix in SUFFIXES:
        raise UserError(f"OUT is the name of a folder where WEIGHTS is a file, got {out}.")
    state_dict, source, metadata = read_checkpoint(weights, weights=which)
    dense = next((kind for kind in (_SEGMENTORS, _DETECTORS) if kind.has_names(state_dict)), None)
    note = "" if dense else selection.describe_partial_prefix(state_dict)
    label = f"{weights} ({note})" if note else weights
    options: dict[str, Any] = {}
    if dense:
        if yaml_file is not None:
            name, (found, options) = yaml_file, _dense_from_python(dense, yaml_file, weights)
        else:
            name, found = _name_dense(dense, state_dict, model) if model else _find_dense(dense, state_dict, weights)
        found = _choose_form(found, asked=form, recorded=metadata.get(_FORM), weights=weights)
        convert = functools.partial(dense.to_variables, found)
    else:
        if yaml_file is not None:
            name, (found, options) = yaml_file, _model_from_yaml(yaml_file, weights)
        elif model is not None:
            name, found = model, _with_classes_of(state_dict, model)
        else:
            name, found = _find_model(state_dict, label)
        found = _choose_form(found, asked=form, recorded=metadata.get(_FORM), weights=weights)
        convert = lambda arrays: {"params": params_from_official(found, arrays)}  # noqa: E731
    try:
        variables = convert(state_dict)
    except ValueError as error:
        raise UserError(f"{label} and {name}: {textwrap.shorten(str(error), 600, placeholder=' ...')}") from error
    export_model(out, model=found, variables=variables, options=options)
    written, description = load_export(out)
    wanted = variables if dense else variables["params"]
    rows = _rows(name, found, written, description["checksum"], wanted=wanted, where=out)
    if rows.get(_FORM_ROW, "").startswith("cvpr2022") and form is None and _FORM not in metadata:
        rows[_FORM_ROW] += "; --form=dat_pp is for weights of the code published with DAT++"
    return {"taken from": source} | rows


def export_weights(trained: str, out: str, *, form: str | None = None) -> dict[str, str]:
    """An export, or a run's work directory -> a .safetensors file with published names, float32.

    ``form`` of deformable attention is for a DAT v1 that does not record it, see ``load_pretrained``.

    Returns:
      Rows of a table: what was written.

    Raises:
      UserError: damage, or ``out`` exists. Nothing is written then.
    """
    check_absent(out)
    if pathlib.Path(out).suffix != ".safetensors":
        raise UserError(f"OUT wants a name that ends in .safetensors where WEIGHTS is a folder, got {out}.")
    model, variables = load_trained(trained, deformable_form=form)
    dat = model if isinstance(model, DAT) else model.dat
    if form not in (None, dat.deformable_form):
        raise UserError(f"{trained} records the form {dat.deformable_form} of deformable attention, got --form={form}.")
    return write_weights(out, model=model, variables=variables, name=trained)


def write_weights(
    out: str, *, model: DAT | Segmentor | Detector, variables: Mapping[str, Any], name: str
) -> dict[str, str]:
    """A trained model -> a .safetensors file with published names, float32. ``name`` is what the rows call it.

    Returns:
      Rows of a table: what was written.

    Raises:
      UserError: ``out`` exists, or a module has no published name.
    """
    try:
        if not isinstance(model, DAT):
            dense = _SEGMENTORS if isinstance(model, Segmentor) else _DETECTORS
            state_dict, wanted = dense.to_official(model, variables), variables
            read = functools.partial(dense.to_variables, model)
        else:
            state_dict, wanted = to_official(model, variables["params"]), variables["params"]
            read = functools.partial(params_from_official, model)
    except KeyError as error:
        raise UserError(f"{name} has weights without a published name: {error.args[0]}") from error
    dat = model if isinstance(model, DAT) else model.dat
    metadata = {_FORM: dat.deformable_form} if "D" in "".join(dat.stages) else {}
    write_safetensors(out, {**state_dict, **_fixed_kernels(state_dict)}, metadata=metadata)
    # Read as anyone's weights are read.
    return _rows(name, model, read(read_weights(out)), _checksum(wanted), wanted=wanted, where=out)


def _choose_form(found, *, asked: str | None, recorded: str | None, weights: str) -> DAT | Segmentor | Detector:
    """The model with the form of deformable attention that was asked for or that the file records.

    Otherwise the model keeps the form of its name or configuration, see ``DAT.deformable_form``.
    """
    if asked and recorded and asked != recorded:
        raise UserError(f"{weights} records the form {recorded} of deformable attention, got --form={asked}.")
    dat = found if isinstance(found, DAT) else found.dat
    form = asked or recorded or dat.deformable_form
    if form not in DEFORMABLE_FORMS:
        raise UserError(
            f"{weights} records the unknown form {form!r} of deformable attention; known: {', '.join(DEFORMABLE_FORMS)}."
        )
    dat = dat.clone(deformable_form=form)
    return dat if isinstance(found, DAT) else found.clone(dat=dat)


def _describe_form(model: DAT | Segmentor | Detector) -> dict[str, str]:
    """The row about the form of D blocks, if there are any."""
    dat = model if isinstance(model, DAT) else model.dat
    if "D" not in "".join(dat.stages):
        return {}
    what = {
        "cvpr2022": "cvpr2022, DAT v1 as it was released",
        "dat_pp": "dat_pp, as published with DAT++",
    }
    return {_FORM_ROW: what[dat.deformable_form]}


def _model_from_yaml(path: str, weights: str) -> tuple[DAT, dict[str, Any]]:
    """The classifier of a published YAML file, and the options of inference that the file sets."""
    if pathlib.Path(path).suffix == ".py":
        raise UserError(f"{weights} has the weights of a classifier: expected a YAML file as --yaml, got {path}.")
    return read_yaml_config(path)


def _dense_from_python(dense: _Dense, path: str, weights: str) -> tuple[Segmentor | Detector, dict[str, Any]]:
    """The segmentor or detector of a published Python file, and the options of inference that the file sets."""
    if pathlib.Path(path).suffix != ".py":
        raise UserError(
            f"{weights} has the weights of a {dense.word}: expected a Python configuration (.py) as --yaml, got {path}."
        )
    config = read_python_config(path)
    try:
        return dense.read(config)
    except ValueError as error:
        raise UserError(f"{path} does not describe a supported {dense.word}: {error}") from error


def _with_classes_of(state_dict: Mapping[str, np.ndarray], name: str) -> DAT:
    head = np.shape(state_dict.get("cls_head.weight"))
    try:
        return create_model(name, **({"num_classes": head[0]} if head else {}))
    except ValueError as error:
        raise UserError(str(error)) from error


def _find_model(state_dict: Mapping[str, np.ndarray], weights: str) -> tuple[str, DAT]:
    """The first of the registry with these names and shapes. Those of the same shapes differ in drop path only."""
    shapes = {name: array.shape for name, array in state_dict.items()}
    for name in list_models():
        model = _with_classes_of(state_dict, name)
        if shapes.get("cls_norm.norm.weight") == (model.dims[-1],):  # shapes of all take seconds
            wanted = official_shapes(model)
            if all(shapes.get(key) == shape for key, shape in wanted.items()):
                return name, model
    raise UserError(
        f"{weights} has names or shapes of no known model; say --yaml=FILE, the published configuration, or --model=NAME, "
        f"one of {', '.join(list_models())}, to see what differs."
    )


def _name_dense(dense: _Dense, state_dict: Mapping[str, np.ndarray], backbone: str) -> tuple[str, Segmentor | Detector]:
    try:
        found = dense.guess(state_dict, backbone)
    except ValueError as error:
        raise UserError(str(error)) from error
    return f"{dense.title(found)} on {backbone}", found


def _find_dense(dense: _Dense, state_dict: Mapping[str, np.ndarray], weights: str) -> tuple[str, Segmentor | Detector]:
    found = dense.find(state_dict, backbones={name: create_model(name) for name in list_models()})
    if found is None:
        raise UserError(
            f"{weights} has names or shapes of no known {dense.word}: wanted {dense.known} on a known model; say "
            f"--model=NAME, one of {', '.join(list_models())}, to see what differs."
        )
    return f"{dense.title(found[1])} on {found[0]}", found[1]


def _fixed_kernels(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Slide attention's first convolution, (9 D, 1, 3, 3): channel c * 9 + j takes tap j. Ours has no array for it."""
    taps = np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3)
    suffix = ".dep_conv1.weight"
    return {
        f"{name.removesuffix(suffix)}.dep_conv.weight": np.tile(taps, (len(kernel) // 9, 1, 1, 1))
        for name, kernel in state_dict.items()
        if name.endswith(suffix)
    }


def _checksum(params) -> str:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return hash_arrays({name: np.asarray(array) for name, array in flat.items()})


def _rows(
    name: str, model: DAT | Segmentor | Detector, written, written_checksum: str, *, wanted: Any, where: str
) -> dict[str, str]:
    """What the table says, once what was read back is what was meant."""
    if not _checksum(written) == written_checksum == _checksum(wanted):
        raise UserError(f"{where} was written, but other numbers were read back; do not use it.")
    return {
        "model": name,
        "parameters": f"{sum(array.size for array in jax.tree.leaves(written.get('params', written))):,}",
        **_describe_form(model),
        "classes": str(model.num_classes),
        "checksum": written_checksum,
        "written": where,
    }
