"""Options of inference, such as the image size, that are stored with trained weights.

A folder of weights stores them under "options" in model.json. A run has those of its evaluation in config.json.
"""

import json
import os
import pathlib
from typing import Any

from dat_jax.checkpoints.directory import fetch_weights

# Kind of model -> option of ``inference.load`` -> its "group.key" in the configuration of a run.
_CONFIG_KEYS = {
    "classifier": {
        "image_size": "data.image_size",
        "resize": "data.eval_resize",
        "image_dtype": "data.dtype",
        "mean": "data.mean",
        "std": "data.std",
    },
    "segmentor": {
        "long_side": "data.long_side",
        "short_side": "data.short_side",
        "ratios": "eval.ratios",
        "flip": "eval.flip",
        "window": "eval.window",
        "stride": "eval.stride",
    },
    "detector": {
        "long_side": "data.test_long_side",
        "short_side": "data.test_short_side",
        "multiple": "eval.multiple",
        "score_threshold": "eval.score_threshold",
        "iou_threshold": "eval.iou_threshold",
        "max_detections": "eval.max_detections",
        "candidates": "sampling.test_candidates",
        "proposals": "sampling.test_proposals",
    },
}


def read_options(path: str | os.PathLike, *, kind: str) -> dict[str, Any]:
    """Read the options of inference that are stored with trained weights.

    Args:
      path: a folder of weights, or the work directory of a run.
      kind: "classifier", "segmentor" or "detector".

    Returns:
      The stored options by name, as JSON has them. Options that are not stored are missing.
    """
    directory = fetch_weights(path)
    if description := _read_json(directory / "model.json"):
        return dict(description.get("options") or {})
    config = _read_json(directory / "config.json")
    values = {name: _get(config, key) for name, key in _CONFIG_KEYS[kind].items()}
    return {name: value for name, value in values.items() if value is not None}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
