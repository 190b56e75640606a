"""What the deformable and neighborhood blocks of a model look at, computed again from their projections.

The model's own attention never holds its weights, so the projections are captured and the rest is done as the plain
formulas say. That is for pictures: a call computes everything for the whole map.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.models.attention import DeformableAttention, table_lookup
from dat_jax.models.dat import DAT
from dat_jax.ops.attention import deformable as deformable_ops
from dat_jax.ops.attention import neighborhood as neighborhood_ops

_PROJECTIONS = ("proj_q", "proj_k", "qkv")
_BIASES = ("_fixed_bias", "_log_cpb")  # methods of ``DeformableAttention``


def compute_attention(model: DAT, variables: Mapping[str, Any], images: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Attention weights and key positions of all D and N blocks.

    Args:
      model: the classifier, or the backbone of another task.
      variables: of it.
      images: (B, H, W, 3), normalised.

    Returns:
      Block, such as "stages_2/blocks_1", in the order of the model -> of a D block {"positions": (B, G, Hk, Wk, 2) and
      "references": (Hk, Wk, 2), (y, x), -1 and 1 the centres of the first and last pixel of its map; "weights":
      (B, M, H * W, N), those of group g being the heads g * M / G and on}; of an N block {"weights": (B, M, H, W, K, K) over
      the window, on a map that is padded to K below and to the right where a side is smaller}. Weights are float32 or better.
    """
    model = model.clone(scan_blocks=False, remat="none")  # parameters have the same names
    _, state = model.apply(variables, images, mutable=["intermediates"], capture_intermediates=_is_wanted)
    captured, params = state.get("intermediates", {}), variables["params"]
    found = {}
    for i, kinds in enumerate(model.stages):
        for j, kind in enumerate(kinds):
            if kind not in "DN":
                continue
            inside = {
                name: (value["__call__"] if isinstance(value, Mapping) else value)[0]
                for name, value in captured[f"stages_{i}"][f"blocks_{j}"]["attn"].items()
            }
            of_block = params[f"stages_{i}"][f"blocks_{j}"]["attn"]
            found[f"stages_{i}/blocks_{j}"] = (
                _of_deformable(model, i, inside, of_block)
                if kind == "D"
                else _of_neighborhood(model, i, inside, of_block)
            )
    return found


def _is_wanted(module, method):
    if isinstance(module, DeformableAttention):
        return method in _BIASES
    return module.name in _PROJECTIONS and method == "__call__"


def _of_deformable(model, stage, captured, params):
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
    weights = deformable_ops.deformable_attention_weights(
        query,
        captured["proj_k"],
        num_heads=model.num_heads[stage],
        **lookup,
        bias=bias,
    )
    references = deformable_ops.reference_points(positions.shape[2:4], form=model.deformable_form)
    return {"positions": positions, "references": references, "weights": weights}


def _of_neighborhood(model, stage, captured, params):
    query, key, _ = jnp.split(captured["qkv"], 3, axis=-1)
    weights = neighborhood_ops.neighborhood_attention_weights(
        query,
        key,
        params["rpb"],
        kernel_size=model.neighborhood_sizes[stage],
        num_heads=model.num_heads[stage],
    )
    return {"weights": weights}
