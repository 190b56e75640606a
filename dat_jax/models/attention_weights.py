"""Attention weights and key positions of the deformable and neighborhood blocks of a model, for figures.

The attention of the model never holds its weights. They are computed from captured projections with the plain formulas, for the
whole map at once.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.models.attention import DeformableAttention, table_lookup
from dat_jax.models.dat import DAT
from dat_jax.ops.attention.deformable import deformable_attention_weights, reference_points
from dat_jax.ops.attention.neighborhood import neighborhood_attention_weights

_PROJECTIONS = ("proj_q", "proj_k", "qkv")
_BIASES = ("_fixed_bias", "_log_cpb")  # methods of ``DeformableAttention`` that compute a bias


def compute_attention(model: DAT, variables: Mapping[str, Any], images: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Computes the attention weights and key positions of all D and N blocks.

    Args:
      model: the classifier, or the DAT in the backbone of another model.
      variables: variables of ``model``.
      images: (B, H, W, 3), normalized.

    Returns:
      For each block, such as "stages_2/blocks_1", in the order of the model, a dictionary. Weights are float32 or better.

      D blocks have

      * "positions": (B, G, Hk, Wk, 2), key positions (y, x), with -1 and 1 at the centers of the first and last pixel of the map;
      * "references": (Hk, Wk, 2), reference points in the same coordinates;
      * "weights": (B, M, H * W, N); group g has the M / G heads from g * M / G on.

      N blocks have

      * "weights": (B, M, H, W, K, K) over the window. A map with a side smaller than K is padded to K below and to the right.
    """
    # The parameters keep their names. Kernels of whole branches would hide the projections.
    model = model.clone(scan_blocks=False, remat="none", implementation="auto")
    _, state = model.apply(variables, images, mutable=["intermediates"], capture_intermediates=_is_captured)
    captured, params = dict(state).get("intermediates", {}), variables["params"]
    attention = {}
    for i, kinds in enumerate(model.stages):
        for j, kind in enumerate(kinds):
            if kind not in "DN":
                continue
            intermediates = {
                name: (value["__call__"] if isinstance(value, Mapping) else value)[0]
                for name, value in captured[f"stages_{i}"][f"blocks_{j}"]["attn"].items()
            }
            attention_params = params[f"stages_{i}"][f"blocks_{j}"]["attn"]
            describe = _describe_deformable if kind == "D" else _describe_neighborhood
            attention[f"stages_{i}/blocks_{j}"] = describe(model, i, intermediates, attention_params)
    return attention


def _is_captured(module, method):
    if isinstance(module, DeformableAttention):
        return method in _BIASES
    return module.name in _PROJECTIONS and method == "__call__"


def _describe_deformable(model, stage, captured, params):
    positions = captured["positions"]
    query = captured["proj_q"]
    bias = next((captured[name] for name in _BIASES if name in captured), None)
    has_table = model.position_bias[stage] == "table" and model.use_offsets[stage]
    lookup = {}
    if has_table:
        table_shape = model.table_shape(stage=stage)
        lookup = dict(
            table=params["rpe_table"],
            **table_lookup(positions, query.shape[1:3], table_shape, model.deformable_form),
        )
    weights = deformable_attention_weights(
        query,
        captured["proj_k"],
        num_heads=model.num_heads[stage],
        **lookup,
        bias=bias,
    )
    references = reference_points(positions.shape[2:4], form=model.deformable_form)
    return {"positions": positions, "references": references, "weights": weights}


def _describe_neighborhood(model, stage, captured, params):
    query, key, _ = jnp.split(captured["qkv"], 3, axis=-1)
    weights = neighborhood_attention_weights(
        query,
        key,
        params["rpb"],
        kernel_size=model.neighborhood_sizes[stage],
        num_heads=model.num_heads[stage],
    )
    return {"weights": weights}
