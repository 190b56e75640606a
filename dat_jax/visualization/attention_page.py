"""Interactive page of the attention of a classifier to one image: a single HTML file that works offline."""

import base64
import html
import importlib.resources
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from dat_jax.inference.attention import BlockAttention, ImageAttention
from dat_jax.visualization.charts import make_group_colors

_TEMPLATE = "attention_page.html"
_MAX_BYTES = 3_000_000  # of all indices and weights; base64 takes a third more
_BYTES_PER_KEY = 4


def make_page(
    attention: ImageAttention, *, title: str, query: tuple[float, float], block: str, max_keys: int = 16
) -> str:
    """Make the HTML text of the page.

    Args:
      attention: attention of a classifier to an image.
      title: title of the page.
      query: query that is selected at first, (y, x) in pixels of ``attention.image``.
      block: name of the block that is selected at first.
      max_keys: maximum number of keys to store for each query and group, the most important ones. It is reduced if all of
        them would take more than 3 MB.
    """
    blocks = attention.blocks.values()
    count = choose_count(blocks, max_keys)
    data = {
        "title": title,
        "classes": list(attention.ranking.items()),
        "image": {"source": _embed(attention.image), "height": len(attention.image), "width": attention.image.shape[1]},
        "query": [float(coordinate) for coordinate in query],
        "block": block,
        "keys": max_keys,
        "colors": make_group_colors(max(block.groups for block in blocks)),
        "blocks": [pack_block(block, count) for block in blocks],
    }
    template = (importlib.resources.files("dat_jax.visualization") / _TEMPLATE).read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # so that no class name can end the script element
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", text)


def choose_count(blocks, max_keys: int) -> int:
    """Number of keys to store for each query and group, from 1 to ``max_keys``, so that all blocks fit into 3 MB."""
    queries = sum(block.groups * block.weights.shape[1] for block in blocks)
    return max(1, min(max_keys, _MAX_BYTES // (_BYTES_PER_KEY * queries)))


def pack_block(block: BlockAttention, count: int) -> dict[str, Any]:
    """Data of a block for the page. Arrays are little-endian numbers encoded as base64.

    Args:
      block: attention of the block.
      count: number of keys to store for each query and group.

    Returns:
      A dict:
        "name", "kind", "map" (its height and width), "groups", "count", "scale": values for JSON.
        "indices": keys, uint16 (G, Q, count), the most important first.
        "weights": their attention weights as codes, uint16 (G, Q, count); code c means scale * c / 65535.
        "positions", "references", "received": float32 arrays of a D block, see ``BlockAttention``.
        "window": side of the window of an N block, in pixels of the feature map.
    """
    weights = block.group_weights
    count = min(count, weights.shape[-1])
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :count]
    best = np.take_along_axis(weights, order, axis=-1)
    scale = max(float(best.max()), 1e-12)
    packed = {
        "name": block.name,
        "kind": block.kind,
        "map": list(block.map_shape),
        "groups": block.groups,
        "count": count,
        "scale": scale,
        "indices": _encode(order.astype("<u2")),
        "weights": _encode(np.round(65535 * best / scale).astype("<u2")),
    }
    if block.kind == "N":
        return {**packed, "window": block.kernel_size}
    arrays = {"positions": block.positions, "references": block.references, "received": block.received}
    return {**packed, **{name: _encode(values.astype("<f4")) for name, values in arrays.items()}}


def _encode(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _embed(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
