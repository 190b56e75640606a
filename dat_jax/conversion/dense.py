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
from dat_jax.models.dat import DAT

_NOT_OF_THE_MODEL = {"type", "out_indices", "use_checkpoint", "init_cfg", "pretrained"}  # in a published backbone
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm, without effect where it has a momentum
# Our leaf -> the published one.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# A row: a pattern of our module, or of a parameter that is no module's, and the published name with the pattern's groups.
# Names that end in .weight or .bias are those of a parameter. A transform for kernels may follow.
Table = tuple[tuple[Any, ...], ...]


def backbone_from_official(config: Mapping[str, Any], **overrides) -> DAT:
    """The DAT of a published configuration's ``backbone``; overrides are attributes of it.

    Raises:
      ValueError: settings that no published model has.
    """
    settings = {name: value for name, value in config.items() if name not in _NOT_OF_THE_MODEL}
    return model_from_official(settings, **overrides)


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
