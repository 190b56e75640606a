"""The model card of an export: README.md with a YAML head, as the Hugging Face Hub expects it."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from dat_jax.checkpoints.averages import name_average
from dat_jax.checkpoints.directory import fetch_weights
from dat_jax.errors import name_some
from dat_jax.exporting.manifest import MANIFEST, read_manifest
from dat_jax.storage import parse_hub_address

MODEL_CARD = "README.md"
_SUMMARY = "summary.md"  # of a work directory
_SETTINGS = ("model", "data", "batch", "length", "done", "versions")  # rows of the summary that name no place on a disk
_KINDS = {"classification": "classifier", "segmentation": "segmentor", "detection": "detector", "features": "backbone"}
_PIPELINE_TAGS = {
    "classification": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "features": "image-feature-extraction",
}
_FILES = {
    "model.json": "weights (`model.json`, `params/`), read by `dat_jax.load` and every tool of dat_jax",
    "model.safetensors": "the same weights with the names of the published PyTorch code",
    ".stablehlo": "programs that run with jax, without dat_jax",
    "model.onnx": "a program for ONNX runtimes",
}


def read_training(trained: str | os.PathLike, *, ema_decay: float | None = None) -> dict[str, dict[str, str]] | None:
    """Read what is recorded about the training of a model.

    Args:
      trained: work directory of a run, whose summary.md is read, or an export, whose manifest is read.
      ema_decay: decay of the average of the weights that is described, or None for the weights that the run evaluates.

    Returns:
      "settings", rows of the summary, and "results", metrics of the best checkpoint with its step in parentheses; None if
      nothing is recorded.

    Raises:
      UserError: there is nothing at ``trained``, or its manifest is damaged.
    """
    directory = fetch_weights(trained)
    if (directory / MANIFEST).exists():
        return read_manifest(directory).get("training")
    try:
        lines = (directory / _SUMMARY).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    settings = {row[0]: row[1] for row in rows if len(row) == 2 and row[0] in _SETTINGS}
    if "data" in settings:
        name, colon, rest = settings["data"].partition(":")
        settings["data"] = pathlib.PurePath(name).name + colon + rest
    results = {row[0]: row[1] for row in rows if len(row) == 3 and row[0].startswith("eval/") and row[1]}
    further = {name: value for name, value in results.items() if name.startswith("eval/ema_")}
    decay = "" if ema_decay is None else name_average(ema_decay)
    average = f"eval/ema_{decay}/"
    if any(name.startswith(average) for name in further):
        settings["average of the weights"] = f"decay {decay}"
        results = {
            f"eval/{name.removeprefix(average)}": value for name, value in further.items() if name.startswith(average)
        }
    else:
        results = {name: value for name, value in results.items() if name not in further}
    return {"settings": settings, "results": results}


def format_model_card(manifest: Mapping[str, Any], *, address: str, license_id: str) -> str:
    """Format the model card of an export.

    Args:
      manifest: content of manifest.json.
      address: address of the repository on the Hub, which the examples load.
      license_id: license of the weights, an identifier of the Hub such as "apache-2.0".

    Returns:
      Markdown with a YAML head.
    """
    kind, training = _KINDS[manifest["task"]], manifest.get("training") or {}
    head = {
        "library_name": "dat_jax",
        "license": license_id,
        "pipeline_tag": _PIPELINE_TAGS[manifest["task"]],
        "tags": ["dat", "deformable-attention", "flax", "jax", "vision-transformer"],
    }
    name = manifest["model"].get("name") or manifest["model"].get("head")
    network = " on ".join(f"`{part}`" for part in (name, manifest.get("backbone")) if part)
    lines = [
        *("---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", ""),
        *(f"# {parse_hub_address(address).repository.partition('/')[2]}", ""),
        f"A {kind} with {len(manifest['classes'])} classes ({name_some(manifest['classes'])}), exported by dat_jax "
        f"{manifest['dat_jax']}. The network is a [deformable attention transformer](https://arxiv.org/abs/2309.01430) in JAX "
        f"and Flax{network and ': ' + network}.",
        *("", "## Use", "", "```python", "import dat_jax", ""),
        f'predict = dat_jax.inference.load("{address}")  # a function of a uint8 RGB image, (H, W, 3)',
        f'model, variables = dat_jax.load("{address}")  # the Flax module, and its weights',
        *("```", "", '`pip install "dat-jax[hub,inference]"` installs what this needs. The repository has:', ""),
        *(f"- {text}" for end, text in _FILES.items() if any(file.endswith(end) for file in manifest["files"])),
        "- `manifest.json`: classes, preprocessing, and size and SHA-256 of every file",
        *("", "## Preprocessing", ""),
        *(f"{number}. {step}" for number, step in enumerate(manifest["preprocessing"]["steps"], 1)),
        *_format_table("Training", training.get("settings")),
        *_format_table("Results on the validation images, of the best checkpoint (step)", training.get("results")),
        *("", "## Limits", ""),
        "Results hold for images like those of the training. Evaluate the model on your own images before you rely on it.",
        "Decisions about people, or any use in which an error causes harm, need an evaluation for that use.",
    ]
    return "\n".join(lines) + "\n"


def _format_table(title: str, rows: Mapping[str, str] | None) -> list[str]:
    """Lines of a section with a table; none if there are no rows."""
    if not rows:
        return []
    return ["", f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
