"""Settings that follow from the named model and from the weights that a run starts from."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dat_jax.checkpoints.hub import resolve_address
from dat_jax.config.keys import DERIVED
from dat_jax.errors import UserError
from dat_jax.models.registry import create_model
from dat_jax.storage import fetch


def resolve_model(config: ConfigDict) -> ConfigDict:
    """Replace ``model.deformable_form`` "auto", and ``data.image_size`` and ``data.eval_resize`` of -1.

    * The form of attention becomes that of the named model. It is recorded with the run because the parameters do not show
      with which form they were trained.
    * The image size becomes that of the run or export ``config.init_from``, and if it records none that of the named model.
    * ``eval_resize`` becomes the recorded one, or 8/7 of the image size as published.

    Raises:
      UserError: unknown model, or an ``eval_resize`` smaller than the image size that -1 stands for.
    """
    is_auto = config.model.get("deformable_form", "auto") == "auto"
    if not is_auto and DERIVED not in (config.data.get("image_size"), config.data.get("eval_resize")):
        return config
    try:
        model = create_model(config.model.name)
    except ValueError as error:
        raise UserError(f"config.model cannot be built: {error}") from error
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if is_auto:
            config.model.deformable_form = model.deformable_form
        if DERIVED in (config.data.get("image_size"), config.data.get("eval_resize")):
            model_size = model.image_size if isinstance(model.image_size, int) else max(model.image_size)
            _resolve_image_size(config, model_size=model_size)
    return config


def _resolve_image_size(config: ConfigDict, *, model_size: int) -> None:
    data = config.data
    recorded_size, recorded_resize = _read_image_size(config.init_from)
    if data.image_size == DERIVED:
        data.image_size = recorded_size or model_size
    if data.eval_resize == DERIVED:
        kept = recorded_resize if recorded_size == data.image_size else None
        data.eval_resize = kept or round(data.image_size * 8 / 7)
    elif data.eval_resize < data.image_size:
        raise UserError(
            f"config.data.eval_resize must be at least config.data.image_size {data.image_size} (derived from -1), got "
            f"{data.eval_resize}."
        )


def _read_image_size(init_from: str) -> tuple[int | None, int | None]:
    """(image size, resize) that a run or an export records; None for what it does not record."""
    path = pathlib.Path(".")
    if init_from:
        source = resolve_address(init_from, only_description=True)
        path = fetch(source, wanted=lambda name: name in ("model.json", "config.json"))
    stored: Any = {}
    for file, group, resize in (("model.json", "options", "resize"), ("config.json", "data", "eval_resize")):
        if init_from and not stored:
            stored = _read_group(path / file, group)
            stored = {"image_size": stored.get("image_size"), "resize": stored.get(resize)} if stored else {}
    values = (stored.get("image_size"), stored.get("resize"))
    size, resize = (value if isinstance(value, int) and value > 0 else None for value in values)
    return size, resize


def _read_group(path: pathlib.Path, name: str) -> Mapping[str, Any]:
    try:
        group = json.loads(path.read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return group if isinstance(group, dict) else {}
