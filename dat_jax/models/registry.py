"""Creation of models by name."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from dat_jax.models.dat import DAT
from dat_jax.models.rcnn import RCNN
from dat_jax.models.retinanet import RetinaNet
from dat_jax.models.segmentation import Segmentor

Detector = RetinaNet | RCNN


def _dat_pp(dims, num_heads, num_groups, drop_path_rate) -> dict[str, Any]:
    """Settings of DAT++ (2309.01430), table 1. The others are the defaults of ``DAT``."""
    return dict(dim_stem=dims[0], dims=dims, num_heads=num_heads, num_groups=num_groups, drop_path_rate=drop_path_rate)


def _dat(dims, num_heads, num_groups, third_stage, drop_path_rate) -> dict[str, Any]:
    """Settings of DAT v1 (CVPR 2022), table 1: deformable attention in the last two stages, in its released form."""
    return dict(
        dim_stem=dims[0],
        dims=dims,
        stages=("LS", "LS", third_stage, "LD"),
        num_heads=num_heads,
        num_groups=num_groups,
        key_strides=(1, 1, 1, 1),
        offset_range_factors=(2, 2, 2, 2),
        deformable_form="cvpr2022",
        lpu=(False,) * 4,
        conv_mlp=(False,) * 4,
        conv_patches=False,
        drop_path_rate=drop_path_rate,
    )


_TINY = _dat_pp((64, 128, 256, 512), (2, 4, 8, 16), (1, 2, 4, 8), 0.2)
_BASE_V1 = _dat((128, 256, 512, 1024), (4, 8, 16, 32), (1, 1, 4, 8), "LD" * 9, 0.5)
_BASE = _dat_pp((128, 256, 512, 1024), (4, 8, 16, 32), (2, 4, 8, 16), 0.7)

VARIANTS: dict[str, dict[str, Any]] = {
    "dat_pp_tiny": _TINY,
    "dat_pp_small": _dat_pp((96, 192, 384, 768), (3, 6, 12, 24), (1, 2, 3, 6), 0.4),
    "dat_pp_base": _BASE,
    "dat_pp_base_384": {**_BASE, "drop_path_rate": 0.6},  # position tables made for 224, as published
    # DAT+, the paper's ablation: dat_pp_tiny without its convolutions.
    "dat_p_tiny": {**_TINY, "lpu": (False,) * 4, "conv_mlp": (False,) * 4, "conv_patches": False},
    "dat_tiny": _dat((96, 192, 384, 768), (3, 6, 12, 24), (1, 1, 3, 6), "LD" * 3, 0.2),
    "dat_small": _dat((96, 192, 384, 768), (3, 6, 12, 24), (1, 1, 3, 6), "LD" * 9, 0.3),
    "dat_base": _BASE_V1,
    "dat_base_384": {**_BASE_V1, "image_size": 384, "window_sizes": (12,) * 4},  # position tables made for 384
    # Not published: trains on a CPU in minutes, on images of 48 x 48.
    "dat_pp_nano": dict(
        image_size=48,
        dim_stem=32,
        dims=(32, 64, 128, 192),
        stages=("ND", "ND", "D", "D"),
        num_heads=(1, 2, 4, 6),
        num_groups=(1, 1, 2, 3),
        key_strides=(2, 1, 1, 1),
        offset_kernels=(5, 3, 3, 3),
        neighborhood_sizes=(7, 5, 3, 3),
        drop_path_rate=0.05,
    ),
}


def list_models(filter: str = "*") -> list[str]:
    """Names of models for ``create_model``.

    Args:
      filter: a pattern for the names, such as "*pp*": * matches any characters, ? one character, [ab] one of these.
    """
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, filter)]


def create_model(name: str, **overrides) -> DAT:
    """Creates a DAT classifier by name.

    Args:
      name: one of ``list_models()``.
      **overrides: attributes of ``DAT``, such as num_classes, image_size, drop_path_rate, dtype.

    Raises:
      ValueError: unknown name or attribute; the message suggests the nearest known one.
    """
    if name not in VARIANTS:
        raise ValueError(f"Unknown model {name!r}{_nearest(name, VARIANTS)}. Models: {', '.join(VARIANTS)}.")
    _check_attributes(DAT, overrides)
    return DAT(**{**VARIANTS[name], **overrides})


_HEADS = {"sem_fpn": dict(channels=128), "upernet": dict(channels=512)}  # as published


def create_segmentor(name: str, *, backbone: str | Mapping[str, Any] | DAT, **overrides) -> Segmentor:
    """Creates a segmentation model.

    Args:
      name: name of the head, "sem_fpn" or "upernet".
      backbone: one of ``list_models()``; or a mapping with such a "name" and attributes of ``DAT``; or a DAT. The heads have its
        dtype.
      **overrides: attributes of ``Segmentor``, such as num_classes.

    Raises:
      ValueError: unknown name or attribute; the message suggests the nearest known one.
    """
    if name not in _HEADS:
        raise ValueError(f"Unknown head {name!r}{_nearest(name, _HEADS)}. Heads: {', '.join(_HEADS)}.")
    _check_attributes(Segmentor, overrides)
    dat = _make_backbone(backbone)
    return Segmentor(dat, **{"head": name, "dtype": dat.dtype, **_HEADS[name], **overrides})


_DETECTORS = {
    "retinanet": (RetinaNet, {}),
    "mask_rcnn": (RCNN, dict(cascade=False)),
    "cascade_mask_rcnn": (RCNN, dict(cascade=True)),
}


def create_detector(name: str, *, backbone: str | Mapping[str, Any] | DAT, **overrides) -> Detector:
    """Creates a detector.

    Args:
      name: "retinanet", "mask_rcnn" or "cascade_mask_rcnn".
      backbone: see ``create_segmentor``.
      **overrides: attributes of ``RetinaNet`` or ``RCNN``, such as num_classes.

    Raises:
      ValueError: unknown name or attribute; the message suggests the nearest known one.
    """
    if name not in _DETECTORS:
        raise ValueError(f"Unknown detector {name!r}{_nearest(name, _DETECTORS)}. Detectors: {', '.join(_DETECTORS)}.")
    kind, settings = _DETECTORS[name]
    _check_attributes(kind, overrides)
    dat = _make_backbone(backbone)
    return kind(dat, **{"dtype": dat.dtype, **settings, **overrides})


def find_other_attributes(name: str, attributes: Iterable[str]) -> list[str]:
    """Return the attributes that the detector of a name does not have but another detector has.

    Args:
      name: as for ``create_detector``; names that are not detectors give an empty list.
      attributes: names of attributes.
    """
    if name not in _DETECTORS:
        return []
    known = {kind: {field.name for field in dataclasses.fields(kind)} for kind, _ in _DETECTORS.values()}
    others = set().union(*known.values()) - known[_DETECTORS[name][0]]
    return [attribute for attribute in attributes if attribute in others]


def name_detector(model: Detector) -> str:
    """Name of a detector for ``create_detector``."""
    if isinstance(model, RetinaNet):
        return "retinanet"
    return "cascade_mask_rcnn" if model.cascade else "mask_rcnn"


def _make_backbone(backbone: str | Mapping[str, Any] | DAT) -> DAT:
    if isinstance(backbone, DAT):
        return backbone
    return create_model(backbone) if isinstance(backbone, str) else create_model(**backbone)


def _check_attributes(kind: type, attributes: Mapping[str, Any]) -> None:
    fields = [field.name for field in dataclasses.fields(kind) if field.name not in ("parent", "name")]
    for key in attributes:
        if key not in fields:
            raise ValueError(
                f"{kind.__name__} has no attribute {key!r}{_nearest(key, fields)}. Attributes: {', '.join(fields)}."
            )


def _nearest(word, known) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0)
    return f", did you mean {match[0]!r}?" if match else ""
