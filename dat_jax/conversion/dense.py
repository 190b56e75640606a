"""What published segmentors and detectors have in common: a backbone with output norms, and heads by tables of names."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.conversion.official import (
    CONV,
    SAME,
    Entries,
    Entry,
    Transform,
    assemble,
    is_ignored,
    model_from_official,
    published,
)
from dat_jax.conversion.settings import COUNT, Settings
from dat_jax.models.dat import DAT

INITIAL_WEIGHTS = "the weights come from the checkpoint that is converted"
_MEMORY = "it saves memory in training and leaves the function unchanged; ours is the attribute remat"
_LATER_GENERATION = "It belongs to MMDetection 3 or MMSegmentation 1; supported are MMDetection 2 and MMSegmentation 0."
_NORMS = ("BN", "SyncBN")  # SyncBN normalizes as BN does; only training on several devices differs
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm, without effect where it has a momentum
# Our leaf -> the published one.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# A row: a pattern of our module, or of a parameter that is no module's, and the published name with the pattern's groups.
# Names that end in .weight or .bias are those of a parameter. A transform for kernels may follow.
Table = tuple[tuple[Any, ...], ...]


def open_config(config: Mapping[str, Any]) -> Settings:
    """A published ``model`` mapping to read, its keys that every kind of model has read already."""
    settings = Settings(config)
    for key in ("data_preprocessor", "preprocess_cfg"):
        settings.refuse(key, _LATER_GENERATION)
    settings.ignore(INITIAL_WEIGHTS, "pretrained", "init_cfg")
    return settings


def read_backbone(settings: Settings, *, out_indices: tuple[int, ...], **overrides) -> DAT:
    """The DAT of the section ``backbone``.

    Args:
      settings: the whole model's.
      out_indices: the feature maps that the heads use.
      **overrides: attributes of ``DAT``.

    Raises:
      ValueError: names the key that is unknown or whose value is not supported.
    """
    backbone = settings.section("backbone")
    backbone.check("type", "DAT")
    backbone.check("out_indices", out_indices, default=(0, 1, 2, 3))
    backbone.ignore(_MEMORY, "use_checkpoint")
    backbone.ignore(INITIAL_WEIGHTS, "init_cfg", "pretrained")
    return model_from_official(backbone, **overrides)


def read_neck(settings: Settings, dat: DAT, *, levels: int, start_level: int = 0, extra: Any = False) -> int:
    """Width of the feature pyramid in the section ``neck``.

    Args:
      settings: the whole model's.
      dat: the backbone.
      levels: number of maps that come out.
      start_level: the first map of the backbone that goes in.
      extra: supported value of add_extra_convs.

    Raises:
      ValueError: names the key that is missing or whose value is not supported.
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
    """Checks that keys are missing or have the value that the published code has by default."""
    for key in keys:
        settings.check(key, value, default=value)


def check_batch_norm(settings: Settings) -> None:
    """Checks that the section ``norm_cfg`` is a batch normalization as PyTorch has it by default."""
    norm = settings.section("norm_cfg")
    norm.check("type", *_NORMS)
    norm.check("eps", 1e-5, default=1e-5)
    norm.check("momentum", 0.1, default=0.1)
    norm.check("requires_grad", True, default=True)


def check_loss(settings: Settings, key: str, *, kind: str, weight: float = 1.0, note: str = "", **values: Any) -> None:
    """Checks that the section of a loss is the published one, which the training task computes.

    Args:
      settings: the head's.
      key: of the loss.
      kind: its type.
      weight: its loss_weight.
      note: a sentence for the error message about its type.
      **values: other keys with their values, which are required.
    """
    loss = settings.section(key)
    loss.check("type", kind, note=note)
    loss.check("loss_weight", weight, default=1.0)
    for name, value in values.items():
        loss.check(name, value)
    check_plain(loss, "reduction", value="mean")


def to_variables(model, table: Table, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published weights as {"params", and "batch_stats" where the model has them}.

    Raises:
      ValueError: names every unknown, missing and mis-shaped weight at once.
    """

    def ignored(name):
        if name.endswith(f".bn.{_COUNTER}"):
            return True
        return name.startswith("backbone.") and is_ignored(name.removeprefix("backbone."), model.dat)

    return assemble(state_dict, make_entries(model, table), is_ignored=ignored)


def to_official(model, table: Table, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables with published names and layouts; counters of BatchNorm, which we do not have, are 0."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    entries = make_entries(model, table)
    state_dict = {entry.name: entry.transform.to_official(np.asarray(flat[entry.path])) for entry in entries}
    counters = [name for name in state_dict if name.endswith(".running_var")]
    return state_dict | {name.replace("running_var", _COUNTER): np.zeros((), np.int64) for name in counters}


def official_shapes(model, table: Table) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter and statistic of the model."""
    return {entry.name: entry.official_shape() for entry in make_entries(model, table)}


def read_width(state_dict: Mapping[str, np.ndarray], layer: str, *, axis: int, default: int) -> int:
    """The length of an axis of a published layer's weights; ``default`` where there is none."""
    array = state_dict.get(f"{layer}.weight")
    shape = () if array is None else np.shape(array)
    return shape[axis] if len(shape) > axis and shape[axis] else default


def find(
    state_dict: Mapping[str, np.ndarray], *, backbones: Mapping[str, DAT], guess: Callable, shapes_of: Callable
) -> tuple[str, Any] | None:
    """The model on one of the backbones, by name, that has just these names and shapes; None if none has.

    Args:
      state_dict: published weights.
      backbones: of the registry.
      guess: (state_dict, name of a backbone) -> the model that the weights may be of.
      shapes_of: model -> its published names and shapes.
    """
    shapes = {name: np.shape(array) for name, array in state_dict.items()}
    width = shapes.get("backbone.norms.3.norm.weight")
    for name, dat in backbones.items():
        if (dat.dims[-1],) == width:  # shapes of all take seconds
            model = guess(state_dict, name)
            if all(shapes.get(key) == shape for key, shape in shapes_of(model).items()):
                return name, model
    return None


@functools.lru_cache(maxsize=8)  # tracing a large model takes seconds
def make_entries(model, table: Table) -> Entries:
    """Of every parameter and statistic, in one fixed order."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    flat = flax.traverse_util.flatten_dict(variables)
    return [Entry(path, leaf.shape, *name_entry(path[1:], model.dat, table)) for path, leaf in sorted(flat.items())]


def name_entry(path: tuple[str, ...], dat: DAT, table: Table) -> tuple[str, Transform]:
    """The published name of an array by its path without the collection, and how its axes are ordered."""
    *module, leaf = path
    if module[:2] == ["backbone", "dat"]:
        name, transform = published((*module[2:], leaf), dat)
        return f"backbone.{name}", transform
    module = "/".join(module)
    if match := re.fullmatch(r"backbone/norms_(\d+)", module):
        return f"backbone.norms.{match[1]}.norm.{_LEAVES[leaf]}", SAME
    for pattern, template, *transform in table:
        whole = template.endswith((".weight", ".bias"))
        match = re.fullmatch(pattern, f"{module}/{leaf}" if whole else module)
        if match:
            name = template.format(**match.groupdict())
            kernel = transform[0] if transform else CONV
            return name if whole else f"{name}.{_LEAVES[leaf]}", kernel if leaf == "kernel" else SAME
    raise KeyError(f"No published name for {module}/{leaf}.")  # a gap of the table, caught by the tests
