"""Files of low-rank adapters: what a run with ``config.lora`` has learned, without the frozen weights.

A file is in the format of safetensors. Its arrays have the names of the parameters with dots, such as
"lora.stages_2.blocks_3.attn.qkv.a" and "cls_head.kernel"; those of the statistics of BatchNorm begin with "batch_stats.". Its
metadata has "alpha" and "rank", and "base", the shapes and fingerprints of the frozen parameters.
"""

import json
import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from dat_jax.checkpoints.adaptation import depends_on_classes
from dat_jax.checkpoints.integrity import compute_fingerprints
from dat_jax.errors import UserError, name_some
from dat_jax.models.lora import GROUP, merge_adapters
from dat_jax.storage import atomic_path, fetch

FILE_NAME = "adapter.safetensors"
Base = Mapping[str, list[int]]


def describe_base(params: Mapping[str, Any], learned: Collection[str]) -> Base:
    """Describe the parameters that adapters are added to, and that they do not contain.

    All processes that hold the arrays must call it.

    Args:
      params: parameters of the model, nested dictionaries of arrays.
      learned: names of the parameters in the file.

    Returns:
      Name -> [fingerprint, *shape].
    """
    arrays: dict[str, Any] = flatten_dict(params, sep=".")
    frozen = {name: array for name, array in arrays.items() if name not in learned}
    fingerprints = jax.jit(compute_fingerprints)(frozen)
    return {name: [int(fingerprints[name]), *np.shape(array)] for name, array in frozen.items()}


def save_adapter(path: pathlib.Path, *, variables: Mapping[str, Any], alpha: float, rank: int, base: Base) -> None:
    """Write a file of adapters, or replace it as a whole.

    Args:
      path: the file.
      variables: {"params": those that learned, with the group "lora", and further collections}, nested dictionaries of arrays.
      alpha, rank: the scale of the adapters is alpha / rank.
      base: see ``describe_base``.

    Raises:
      UserError: it cannot be written. An existing file is unchanged then.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in _flatten(variables).items()}
    content = save(arrays, metadata={"alpha": repr(float(alpha)), "rank": str(rank), "base": json.dumps(base)})
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_bytes(content)


def apply_adapter(path: str | os.PathLike, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Add a file of adapters to the weights that it was trained on.

    Args:
      path: the file.
      variables: variables of the model, {"params": ..., and others}, nested dictionaries of arrays.

    Returns:
      Variables of the adapted model as numpy arrays: the adapters are merged, and the head is that of the file.

    Raises:
      UserError: the file cannot be read, is no file of adapters, or was trained on another model or on other weights; arrays of
        other shapes are named.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: expected a file of adapters, such as {os.path.join(path, FILE_NAME)}.")
    try:
        with safetensors.safe_open(fetch(path), framework="numpy") as file:
            metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        alpha, rank, base = float(metadata["alpha"]), int(metadata["rank"]), json.loads(metadata.get("base", "{}"))
        if not (isinstance(base, dict) and all(isinstance(values, list) for values in base.values())):
            raise ValueError("its description of the base weights cannot be read")
        if not (math.isfinite(alpha) and rank > 0):
            raise ValueError(f"alpha {alpha} and rank {rank}")
        if infinite := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            raise ValueError(f"{name_some(infinite)} are not finite")
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a file of adapters, or is damaged: {error}.") from error
    expected = {name: np.shape(array) for name, array in _flatten(variables).items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if wrong := [name for name in shapes if not _fits(name, shapes, expected, rank=rank)]:
        raise UserError(
            f"{path} has the adapters of another model, or is incomplete: {name_some(wrong)} do not fit the weights."
        )
    if not any(name.startswith(f"{GROUP}.") for name in arrays):
        raise UserError(f"{path} has no adapters.")
    params = unflatten_dict({**_flatten(variables), **arrays}, sep=".")
    current = describe_base(variables["params"], arrays)
    # A run may have resized position tables, or the stem for other channels.
    if other := [
        name for name, values in current.items() if base.get(name, values) != values and base[name][1:] == values[1:]
    ]:
        raise UserError(
            f"{path} was trained on other weights than these: load the weights that its run started from. "
            f"{name_some(other)} differ."
        )
    merged = merge_adapters(params, scale=alpha / rank)
    merged = unflatten_dict({name: np.asarray(array) for name, array in flatten_dict(merged).items()})
    collections = {name: merged.pop(name) for name in variables if name != "params"}
    return {"params": merged, **collections}


def _flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by their names in a file."""
    collections = {name: tree for name, tree in variables.items() if name != "params"}
    return flatten_dict({**variables["params"], **collections}, sep=".")


def _fits(
    name: str, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, rank: int
) -> bool:
    """Whether an array of a file with these ``shapes`` belongs to a model with the ``expected`` ones.

    The number of classes may differ.
    """
    layer, _, leaf = name.rpartition(".")
    if name.startswith(f"{GROUP}."):
        kernel = expected.get(f"{layer.removeprefix(f'{GROUP}.')}.kernel", ())
        pair = [shapes.get(f"{layer}.{other}") for other in "ab"]
        return leaf in ("a", "b") and len(kernel) == 2 and pair == [(kernel[0], rank), (rank, kernel[1])]
    if name in expected and depends_on_classes(name.replace(".", "/")):
        kernel, bias = ({**expected, **shapes}[f"{layer}.{other}"] for other in ("kernel", "bias"))
        return kernel[:-1] == expected[f"{layer}.kernel"][:-1] and bias == kernel[-1:]
    return shapes[name] == expected.get(name)
