"""Settings of published YAML configurations of classifiers: the network, and the image size of its evaluation."""

import os
from collections.abc import Mapping
from typing import Any

import yaml

from dat_jax.conversion.official import model_from_official
from dat_jax.conversion.settings import COUNT, FLAG, Settings, printable
from dat_jax.errors import UserError
from dat_jax.models.dat import DAT
from dat_jax.storage import fetch

_TRAINING = "it concerns training, which a configuration of this project sets"
_BUILT_FROM_DAT = "the published code builds the model from MODEL.DAT alone"
_WEIGHTS = "the weights come from the file that is converted"
_DATA = "it concerns how images are stored and loaded"
_RUN = "it concerns the output of a run, not the model"
# Key -> reason why it has no effect on the model.
_IGNORED = {
    "TRAIN": _TRAINING,
    "AUG": _TRAINING,
    **dict.fromkeys(("AMP", "AMP_OPT_LEVEL", "SEED", "LOCAL_RANK"), _TRAINING),
    **dict.fromkeys(("OUTPUT", "TAG", "SAVE_FREQ", "PRINT_FREQ", "EVAL_MODE", "THROUGHPUT_MODE"), _RUN),
}
_IGNORED_OF_MODEL = {
    "NAME": _RUN,
    "RESUME": _WEIGHTS,
    "PRETRAINED": _WEIGHTS,
    "DROP_RATE": _BUILT_FROM_DAT,
    "DROP_PATH_RATE": _BUILT_FROM_DAT,
    "LABEL_SMOOTHING": _TRAINING,
}
_IGNORED_OF_DATA: dict[str, str] = dict.fromkeys(
    ("BATCH_SIZE", "DATA_PATH", "DATASET", "NUM_WORKERS", "PIN_MEMORY"), _DATA
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with errors that name the line, also for values such as ``2024-13-45`` or ``!!int x``."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            kind = node.tag.rsplit(":", 1)[-1]
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} has a value that is not a valid {kind}") from error


def read_yaml_config(path: str | os.PathLike) -> tuple[DAT, dict[str, Any]]:
    """Read a published YAML file.

    Args:
      path: the file.

    Returns:
      The model, and the options of ``inference.load`` that the file sets: "image_size" and "resize" in pixels.

    Raises:
      UserError: the file cannot be read, or does not describe a supported model; the key is named.
    """
    try:
        text = fetch(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: the text is not UTF-8, or the path has a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{printable(path)} cannot be read: {reason}.") from error
    try:
        config = yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is too deeply nested.") from error
    except Exception as error:  # PyYAML raises more types than its own
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    model = config.get("MODEL") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("DAT"), dict):
        raise UserError(f"{path}: expected a mapping MODEL.DAT, as in the published YAML files.")
    try:
        model, options, _ = trace_classifier(config)
    except ValueError as error:
        raise UserError(f"{path} does not describe a model: {error}") from error
    return model, options


def trace_classifier(config: Mapping[str, Any]) -> tuple[DAT, dict[str, Any], dict[str, str]]:
    """Read a published classifier configuration, and record how each of its keys was used (``Settings.uses``).

    Args:
      config: mapping of a published YAML file, with MODEL.DAT.

    Raises:
      ValueError: a key is unknown or its value is not supported; the key is named.
    """
    settings = Settings(config)
    settings.ignore_all(_IGNORED)
    settings.check(
        "BASE", "", [""], [], None, default=[""], reason="Other files are not merged; write all keys in one."
    )
    section = settings.section("MODEL")
    section.check("TYPE", "dat", default="dat")
    section.ignore_all(_IGNORED_OF_MODEL)
    model = model_from_official(section.section("DAT"))
    section.match("NUM_CLASSES", model.num_classes, "MODEL.DAT.num_classes", default=model.num_classes)
    options = _read_sizes(settings, model)
    settings.finish()
    return model, options, settings.uses


def _read_sizes(settings: Settings, model: DAT) -> dict[str, int]:
    """Options "image_size" and "resize" of ``inference.load``.

    Both are always set, because their defaults depend on the form of deformable attention.
    """
    data, test = settings.optional_section("DATA"), settings.optional_section("TEST")
    size, crop = model.image_size, True
    assert isinstance(size, int)  # published configurations have square images
    if data is not None:
        data.ignore_all(_IGNORED_OF_DATA)
        data.check("INTERPOLATION", "bicubic", default="bicubic")
        size = data.take("IMG_SIZE", COUNT, default=size)
    if test is not None:
        crop = test.take("CROP", FLAG, default=True)
    return {"image_size": size, "resize": int(256 / 224 * size) if crop else size}
