"""Low-rank adapters of linear layers (LoRA, 2106.09685): kernel + scale * a b, with a trained a and b and a frozen kernel.

Adapters are parameters beside those of the model, below "lora", with the names of their layers:
"lora/stages_2/blocks_3/attn/qkv/a". They are added to the kernels before the model runs, so that every implementation of its
ops works with them, and adding them for good changes no result. An adapter is much smaller than the map of a batch, so this
costs little.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

GROUP = "lora"
LAYERS = {"attention": r"attn/(q|kv|qkv|proj|proj_(q|k|v|qkv|out))", "mlp": r"mlp/linear[12]"}  # by name


def init_adapters(key: jax.Array, params: Mapping[str, Any], *, rank: int, layers: Sequence[str]) -> dict[str, Any]:
    """Make adapters that do not change the model yet: a is random, b is zero.

    Args:
      key: random key.
      params: parameters of the model.
      rank: columns of a and rows of b.
      layers: any of ``LAYERS``.

    Returns:
      The parameters "lora": for each linear layer of (inputs, outputs) {"a": (inputs, rank), "b": (rank, outputs)}, of the
      dtype of its kernel. The elements of a are uniform within ±1 / sqrt(inputs), as in the authors' code.

    Raises:
      ValueError: the model has no such layer.
    """
    pattern = re.compile(rf"(?:.*/)?blocks_\d+/(?:{'|'.join(LAYERS[name] for name in layers)})/kernel")
    kernels: dict[str, Any] = {
        name: leaf for name, leaf in flatten_dict(params, sep="/").items() if pattern.fullmatch(name)
    }
    if not kernels:
        raise ValueError(f"The model has no linear layers of {' or '.join(layers)}.")
    adapters = {}
    for layer_key, (name, kernel) in zip(jax.random.split(key, len(kernels)), sorted(kernels.items()), strict=True):
        inputs, outputs = kernel.shape
        bound = 1 / math.sqrt(inputs)
        layer = name.removesuffix("kernel")
        adapters[f"{layer}a"] = jax.random.uniform(layer_key, (inputs, rank), kernel.dtype, -bound, bound)
        adapters[f"{layer}b"] = jnp.zeros((rank, outputs), kernel.dtype)
    return unflatten_dict(adapters, sep="/")


def merge_adapters(params: Mapping[str, Any], *, scale: float) -> dict[str, Any]:
    """Add the adapters to the kernels of their layers.

    Args:
      params: parameters of a model, with or without "lora".
      scale: factor of the adapters.

    Returns:
      Parameters of the model, without "lora".
    """
    adapters: dict[str, Any] = flatten_dict(params.get(GROUP, {}), sep="/")
    merged: dict[str, Any] = flatten_dict({name: group for name, group in params.items() if name != GROUP}, sep="/")
    for name, a in adapters.items():
        if name.endswith("/a"):
            layer = name.removesuffix("a")
            product = jnp.matmul(a, adapters[f"{layer}b"], precision=lax.Precision.HIGHEST)
            merged[f"{layer}kernel"] = merged[f"{layer}kernel"] + scale * product
    return unflatten_dict(merged, sep="/")
