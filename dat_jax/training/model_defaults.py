"""Settings that follow from the named model and from the weights that a run starts from."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dat_jax.checkpoints.hub import resolve_address
from dat_jax.checkpoints.inference_options import read_options
from dat_jax.config import get_keys
from dat_jax.config.keys import DERIVED
from dat_jax.errors import UserError
from dat_jax.models.dat import DAT
from dat_jax.models.registry import create_model
from dat_jax.storage import fetch
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, repeat_for_channels

_DERIVED = (DERIVED, "auto", ())  # values of keys that are derived
# Key of ``config.data`` -> option of inference that trained weights record.
_OPTIONS = {"image_size": "image_size", "eval_resize": "resize", "dtype": "image_dtype", "mean": "mean", "std": "std"}


def resolve_model(config: ConfigDict) -> ConfigDict:
    """Replace ``model.deformable_form`` "auto", and derived values of ``data`` that describe the images.

    * The form of attention becomes that of the named model. It is recorded with the run because the parameters do not show
      with which form they were trained.
    * The image size becomes that of the run or export ``config.init_from``, and if it records none that of the named model.
    * ``eval_resize`` becomes the recorded one, or 8/7 of the image size as published.
    * ``channels``, ``dtype``, ``mean`` and ``std`` become the recorded ones. If there are none, images are RGB with 8 bits,
      normalized with the statistics of ImageNet. A single mean or standard deviation is repeated for every channel.

    Raises:
      UserError: unknown model, an ``eval_resize`` smaller than the image size that -1 stands for, or settings that do not fit
        the number of channels or the dtype.
    """
    config = config.copy_and_resolve_references()
    recorded = _read_recorded(config)
    with config.unlocked():
        if config.model.get("deformable_form", "auto") == "auto":
            config.model.deformable_form = _create_named(config).deformable_form
        if DERIVED in (config.data.get("image_size"), config.data.get("eval_resize")):
            _resolve_image_size(config, recorded)
        if "mean" in config.data:
            _resolve_channels(config, recorded)
    return config


def _create_named(config: ConfigDict) -> DAT:
    try:
        return create_model(config.model.name)
    except ValueError as error:
        raise UserError(f"config.model cannot be built: {error}") from error


def _resolve_image_size(config: ConfigDict, recorded: Mapping[str, Any]) -> None:
    data, model_size = config.data, _create_named(config).image_size
    recorded_size = recorded.get("image_size")
    if data.image_size == DERIVED:
        data.image_size = recorded_size or (model_size if isinstance(model_size, int) else max(model_size))
    if data.eval_resize == DERIVED:
        recorded_resize = recorded.get("eval_resize") if recorded_size == data.image_size else None
        data.eval_resize = recorded_resize or round(data.image_size * 8 / 7)
    elif data.eval_resize < data.image_size:
        raise UserError(
            f"config.data.eval_resize must be at least config.data.image_size {data.image_size} (derived from -1), got "
            f"{data.eval_resize}."
        )


def _resolve_channels(config: ConfigDict, recorded: Mapping[str, Any]) -> None:
    data = config.data
    if data.channels == DERIVED:
        data.channels = recorded.get("channels", 3)
    if data.dtype == "auto":
        data.dtype = recorded.get("dtype", "uint8")
    for name, imagenet in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        values = data[name] or tuple(recorded.get(name, imagenet))
        data[name] = repeat_for_channels(values, channels=data.channels, name=f"config.data.{name}")
    if data.dtype == "uint8" and max(data.mean) > 1:
        raise UserError(
            f"Values of uint8 are divided by 255: config.data.mean must be at most 1, got {', '.join(map(str, data.mean))}."
        )
    if data.dtype == "uint16" and data.mean == IMAGENET_MEAN:
        raise UserError(
            "Values of uint16 are not divided: config.data.mean and std must be in their units, got those of ImageNet."
        )
    augmentation = config.augmentation
    names = {"rand_augment_count": "RandAugment", "three_augment": "3-Augment", "color_jitter": "Color jitter"}
    for key, name in names.items():
        if augmentation[key] and (data.channels, data.dtype) != (3, "uint8"):
            raise UserError(
                f"{name} is for RGB images with 8 bits: config.augmentation.{key} must be {type(augmentation[key])()} with "
                f"config.data.channels={data.channels} and config.data.dtype={data.dtype}, got {augmentation[key]}."
            )


def _read_recorded(config: ConfigDict) -> dict[str, Any]:
    """Values of ``config.data`` that the run or export ``config.init_from`` records, if any key is derived from them."""
    keys: Mapping[str, Any] = get_keys("classification")["data"]
    if not config.init_from or all(config.data.get(name) not in _DERIVED for name in (*_OPTIONS, "channels")):
        return {}
    source = resolve_address(config.init_from, only_description=True)
    path = fetch(source, wanted=lambda name: name in ("model.json", "config.json"))
    options = read_options(path, kind="classifier")
    values = {name: options.get(option) for name, option in _OPTIONS.items()}
    values["channels"] = _read(path / "model.json", "model", "in_channels") or _read(
        path / "config.json", "data", "channels"
    )
    return {name: value for name, value in values.items() if value not in _DERIVED and keys[name].accepts(value)}


def _read(path: pathlib.Path, group: str, name: str) -> Any:
    try:
        return json.loads(path.read_text())[group][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
