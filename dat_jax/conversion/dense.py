"""Shared conversion code for segmentors and detectors: a backbone with output norms, and heads described by tables of names."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dat_jax.conversion.official import (
    CONV,
    IDENTITY,
    Entries,
    Entry,
    Transform,
    assemble,
    is_ignored,
    model_from_official,
    name_parameter,
)
from dat_jax.conversion.settings import COUNT, Settings
from dat_jax.models.dat import DAT

INITIAL_WEIGHTS = "the weights come from the checkpoint that is converted"
_MEMORY = "it saves memory in training and leaves the function unchanged; the attribute remat does the same here"
_LATER_GENERATION = "It belongs to MMDetection 3 or MMSegmentation 1; supported are MMDetection 2 and MMSegmentation 0."
_NORMS = ("BN", "SyncBN")  # SyncBN normalizes as BN does; only training on several devices differs
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm; it has no effect with a momentum
# Our name of an array in a module -> the published one.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Rows of (pattern, published name, optional transform of the kernel). The name is formatted with the groups of the pattern. If
# it ends in .weight or .bias, the pattern is that of a single parameter; otherwise it is that of a module.
Table = tuple[tuple[Any, ...], ...]


def open_config(config: Mapping[str, Any]) -> Settings:
    """Settings of a published ``model`` mapping, after the keys that all kinds of models share are read.

    Raises:
      ValueError: the configuration belongs to MMDetection 3 or MMSegmentation 1.
    """
    settings = Settings(config)
    for key in ("data_preprocessor", "preprocess_cfg"):
        settings.refuse(key, _LATER_GENERATION)
    settings.ignore(INITIAL_WEIGHTS, "pretrained", "init_cfg")
    return settings


def read_backbone(settings: Settings, *, out_indices: tuple[int, ...], **overrides) -> DAT:
    """Read the section ``backbone``.

    Args:
      settings: settings of the whole model.
      out_indices: indices of the feature maps that the heads use.
      **overrides: attributes of ``DAT`` that replace the configured ones.

    Returns:
      The backbone.

    Raises:
      ValueError: a key is unknown or its value is not supported; the key is named.
    """
    backbone = settings.section("backbone")
    backbone.check("type", "DAT")
    backbone.check("out_indices", out_indices, default=(0, 1, 2, 3))
    backbone.ignore(_MEMORY, "use_checkpoint")
    backbone.ignore(INITIAL_WEIGHTS, "init_cfg", "pretrained")
    return model_from_official(backbone, **overrides)


def read_neck(settings: Settings, dat: DAT, *, levels: int, start_level: int = 0, extra: Any = False) -> int:
    """Read the section ``neck``, a feature pyramid.

    Args:
      settings: settings of the whole model.
      dat: the backbone.
      levels: expected number of output maps.
      start_level: expected index of the first backbone map that is used.
      extra: expected value of add_extra_convs.

    Returns:
      Number of channels of the output maps.

    Raises:
      ValueError: a key is missing or its value is not supported; the key is named.
    """
    neck = settings.section("neck")
    neck.check("type", "FPN")
    neck.match("in_channels", dat.dims, "backbone.dims")
    neck.check("num_outs", levels)
    neck.check("start_level", start_level, default=0)
    neck.check("end_level", -1, default=-1)
    neck.check("add_extra_convs", extra, default=False)
    neck.check("upsample_cfg", {"mode": "nearest"}, default={"mode": "nearest"})
    check_plain(neck, "relu_before_extra_convs", "no_norm_on_lateral", value=False)
    check_plain(neck, "conv_cfg", "norm_cfg", "act_cfg", value=None)
    neck.ignore(INITIAL_WEIGHTS, "init_cfg")
    return neck.take("out_channels", COUNT)


def check_plain(settings: Settings, *keys: str, value: Any) -> None:
    """Check that keys are missing or have ``value``, the default of the published code."""
    for key in keys:
        settings.check(key, value, default=value)


def check_batch_norm(settings: Settings) -> None:
    """Check that the section ``norm_cfg`` is a batch normalization with PyTorch's defaults."""
    norm = settings.section("norm_cfg")
    norm.check("type", *_NORMS)
    norm.check("eps", 1e-5, default=1e-5)
    norm.check("momentum", 0.1, default=0.1)
    norm.check("requires_grad", True, default=True)


def check_loss(
    settings: Settings, key: str, *, kind: str, weight: float = 1.0, reason: str = "", **values: Any
) -> None:
    """Check that the section of a loss is the published one, which the training task computes.

    Args:
      settings: settings of the head.
      key: key of the loss.
      kind: expected type.
      weight: expected loss_weight.
      reason: sentence appended to the error message about the type.
      **values: other required keys with their expected values.

    Raises:
      ValueError: a key is missing or its value is not supported; the key is named.
    """
    loss = settings.section(key)
    loss.check("type", kind, reason=reason)
    loss.check("loss_weight", weight, default=1.0)
    for name, value in values.items():
        loss.check(name, value)
    check_plain(loss, "reduction", value="mean")


def to_variables(model, table: Table, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert published weights to variables.

    Args:
      model: segmentor or detector that the weights belong to.
      table: names of its heads.
      state_dict: published name -> array, in PyTorch's layouts. Buffers and counters of BatchNorm may be missing.

    Returns:
      {"params": ...}, with "batch_stats" if the model has BatchNorm, in float32 or float64.

    Raises:
      ValueError: weights do not fit the model. One message names all unknown, missing and mis-shaped weights.
    """

    def is_ignored_name(name: str) -> bool:
        if name.endswith(f".bn.{_COUNTER}"):
            return True
        return name.startswith("backbone.") and is_ignored(name.removeprefix("backbone."), model.dat)

    return assemble(state_dict, make_entries(model, table), is_ignored=is_ignored_name)


def to_official(model, table: Table, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert variables to a state dict with published names and layouts.

    Counters of BatchNorm, which our variables do not have, are 0.
    """
    flat = flatten_dict(dict(variables))
    entries = make_entries(model, table)
    state_dict = {entry.name: entry.transform.to_official(np.asarray(flat[entry.path])) for entry in entries}
    counters = [name for name in state_dict if name.endswith(".running_var")]
    return state_dict | {name.replace("running_var", _COUNTER): np.zeros((), np.int64) for name in counters}


def official_shapes(model, table: Table) -> dict[str, tuple[int, ...]]:
    """Published name -> published shape, for every parameter and statistic of a model."""
    return {entry.name: entry.official_shape() for entry in make_entries(model, table)}


def read_width(state_dict: Mapping[str, np.ndarray], layer: str, *, axis: int, default: int) -> int:
    """Length of an axis of the weights of a published layer; ``default`` if the weights or the axis are missing or empty."""
    array = state_dict.get(f"{layer}.weight")
    shape = () if array is None else np.shape(array)
    return shape[axis] if len(shape) > axis and shape[axis] else default


def find(
    state_dict: Mapping[str, np.ndarray], *, backbones: Mapping[str, DAT], guess: Callable, shapes_of: Callable
) -> tuple[str, Any] | None:
    """Find the model whose parameters have the names and shapes of published weights.

    Args:
      state_dict: published name -> array.
      backbones: registered name -> backbone, the candidates in order.
      guess: (state_dict, backbone name) -> model whose widths agree with the weights.
      shapes_of: model -> its published names and shapes.

    Returns:
      Name of the backbone, and the model; None if no model fits.
    """
    shapes = {name: np.shape(array) for name, array in state_dict.items()}
    width = shapes.get("backbone.norms.3.norm.weight")
    for name, dat in backbones.items():
        if (dat.dims[-1],) == width:  # compared first, as the shapes of all parameters take seconds
            model = guess(state_dict, name)
            if all(shapes.get(key) == shape for key, shape in shapes_of(model).items()):
                return name, model
    return None


@functools.lru_cache(maxsize=8)  # tracing a large model takes seconds
def make_entries(model, table: Table) -> Entries:
    """Entries of all parameters and statistics of a model, in a fixed order."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    flat = flatten_dict(variables)
    return [Entry(path, leaf.shape, *name_entry(path[1:], model.dat, table)) for path, leaf in sorted(flat.items())]


def name_entry(path: tuple[str, ...], dat: DAT, table: Table) -> tuple[str, Transform]:
    """Published name and transform of an array.

    Args:
      path: path of the array in the variables, without the collection.
      dat: the backbone of the model.
      table: names of the heads of the model.

    Raises:
      KeyError: the module is not in the table.
    """
    *module, leaf = path
    if module[:2] == ["backbone", "dat"]:
        name, transform = name_parameter((*module[2:], leaf), dat)
        return f"backbone.{name}", transform
    module = "/".join(module)
    if match := re.fullmatch(r"backbone/norms_(\d+)", module):
        return f"backbone.norms.{match[1]}.norm.{_LEAVES[leaf]}", IDENTITY
    for pattern, template, *transform in table:
        is_parameter = template.endswith((".weight", ".bias"))
        match = re.fullmatch(pattern, f"{module}/{leaf}" if is_parameter else module)
        if match:
            name = template.format(**match.groupdict())
            kernel = transform[0] if transform else CONV
            return name if is_parameter else f"{name}.{_LEAVES[leaf]}", kernel if leaf == "kernel" else IDENTITY
    raise KeyError(f"No published name for {module}/{leaf}.")  # the tests check that the tables are complete
