"""A page that shows the attention of a model to one image: one HTML file that needs no network and no server."""

import base64
import html
import importlib.resources
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from dat_jax.inference.attention import BlockAttention, ImageAttention
from dat_jax.visualization.charts import make_group_colours

_TEMPLATE = "attention_page.html"
_MAX_BYTES = 3_000_000  # of all indices and weights; a third more as text
_BYTES_A_KEY = 4


def make_page(
    attention: ImageAttention, *, title: str, query: tuple[float, float], block: str, max_keys: int = 16
) -> str:
    """The text of the page.

    Args:
      attention: of the image.
      title: what the image is called.
      query: (y, x) in pixels of ``attention.image``, that the page begins with.
      block: likewise.
      max_keys: the most important keys that are kept of every query and group; fewer where they would take more than 3 MB.
    """
    data = {
        "title": title,
        "classes": list(attention.ranking.items()),
        "image": {"source": _embed(attention.image), "height": len(attention.image), "width": attention.image.shape[1]},
        "query": [float(at) for at in query],
        "block": block,
        "keys": max_keys,
        "colours": make_group_colours(max(found.groups for found in attention.blocks.values())),
        "blocks": [
            pack_block(found, choose_count(attention.blocks.values(), max_keys)) for found in attention.blocks.values()
        ],
    }
    template = (importlib.resources.files("dat_jax.visualization") / _TEMPLATE).read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name ends the script
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", text)


def choose_count(blocks, max_keys: int) -> int:
    """Keys of every query and group that fit, at least one."""
    queries = sum(block.groups * block.weights.shape[1] for block in blocks)
    return max(1, min(max_keys, _MAX_BYTES // (_BYTES_A_KEY * queries)))


def pack_block(block: BlockAttention, count: int) -> dict[str, Any]:
    """What the page has of a block; arrays are base64 of little-endian numbers.

    Args:
      block: K of an N block is the side of its window, whose pixels are the keys.
      count: keys a query and group.

    Returns:
      {"indices": uint16 (G, Q, count), the most important first, "weights": uint16 likewise, code c for scale * c / 65535,
      "positions", "references" and "received" of D blocks, float32, and numbers}.
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
