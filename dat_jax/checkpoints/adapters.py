"""Files of low-rank adapters: what a run with ``config.lora`` has learned, without the frozen weights.

A file is in the format of safetensors. Its arrays have the names of the parameters with dots, such as
"lora.stages_2.blocks_3.attn.qkv.a" and "cls_head.kernel". Its metadata has "alpha" and "rank".
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from dat_jax.errors import UserError, name_some
from dat_jax.models.lora import GROUP, merge_adapters
from dat_jax.storage import fetch

FILE_NAME = "adapter.safetensors"


def save_adapter(path: pathlib.Path, *, params: Mapping[str, Any], alpha: float, rank: int) -> None:
    """Write a file of adapters. Raises an OSError if it cannot be written.

    Args:
      path: the file.
      params: the parameters that learned, nested dictionaries of arrays, with the group "lora".
      alpha, rank: the scale of the adapters is alpha / rank.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in flatten_dict(dict(params), sep=".").items()}
    save_file(arrays, path, metadata={"alpha": repr(float(alpha)), "rank": str(rank)})


def apply_adapter(path: str | os.PathLike, params: Mapping[str, Any]) -> dict[str, Any]:
    """Add a file of adapters to the weights that it was trained on.

    Args:
      path: the file.
      params: parameters of the model, nested dictionaries of arrays.

    Returns:
      Parameters of the adapted model as numpy arrays: the adapters are merged, and the head is that of the file.

    Raises:
      UserError: the file cannot be read, is no file of adapters, or is of another model; the arrays are named.
    """
    try:
        with safetensors.safe_open(fetch(path), framework="numpy") as file:
            metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scale = float(metadata["alpha"]) / int(metadata["rank"])
    except (OSError, ValueError, KeyError, ZeroDivisionError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a file of adapters, or is damaged: {error}.") from error
    expected = {name: np.shape(array) for name, array in flatten_dict(dict(params), sep=".").items()}
    if wrong := [name for name, array in arrays.items() if not _fits(name, array.shape, expected)]:
        raise UserError(f"{path} has the adapters of another model: {name_some(wrong)} do not fit the weights.")
    merged = merge_adapters(unflatten_dict({**flatten_dict(dict(params), sep="."), **arrays}, sep="."), scale=scale)
    return unflatten_dict({name: np.asarray(array) for name, array in flatten_dict(merged).items()})


def _fits(name: str, shape: tuple[int, ...], expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an array of a file belongs to a model with the ``expected`` shapes. The number of classes may differ."""
    if not name.startswith(f"{GROUP}."):
        return name in expected and len(shape) == len(expected[name]) and shape[:-1] == expected[name][:-1]
    layer, _, which = name.removeprefix(f"{GROUP}.").rpartition(".")
    kernel = expected.get(f"{layer}.kernel", (None, None))
    return len(shape) == 2 and shape["ab".index(which)] == kernel["ab".index(which)] if which in ("a", "b") else False
