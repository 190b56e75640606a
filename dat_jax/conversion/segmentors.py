"""Published segmentors, a whole checkpoint of MMSegmentation, to ours, and back."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from dat_jax.conversion import dense
from dat_jax.models.dat import DAT
from dat_jax.models.registry import create_segmentor
from dat_jax.models.segmentation import Segmentor

_HEADS = {"FPNHead": "sem_fpn", "UPerHead": "upernet"}
_TABLE: dense.Table = (
    (r"neck/(?P<m>lateral_convs|fpn_convs)_(?P<i>\d+)", "neck.{m}.{i}.conv"),
    (r"(?P<part>\w+_head)/classifier/conv_seg", "{part}.conv_seg"),
    (r"(?P<part>\w+_head)/scale_heads_(?P<i>\d+)_(?P<j>\d+)/(?P<k>conv|bn)", "{part}.scale_heads.{i}.{j}.{k}"),
    (r"(?P<part>\w+_head)/psp_modules_(?P<i>\d+)/(?P<k>conv|bn)", "{part}.psp_modules.{i}.1.{k}"),
    (r"(?P<part>\w+_head)/(?P<m>[a-z_]+)_(?P<i>\d+)/(?P<k>conv|bn)", "{part}.{m}.{i}.{k}"),
    (r"(?P<part>\w+_head)/(?P<m>[a-z_]+)/(?P<k>conv|bn)", "{part}.{m}.{k}"),
)


def is_segmentor(names) -> bool:
    """Whether published names are those of a segmentor."""
    return any(name.startswith("decode_head.") for name in names)


def segmentor_from_official(config: Mapping[str, Any], **overrides) -> Segmentor:
    """The model of a published configuration.

    Args:
      config: MMSegmentation's ``model`` mapping: backbone, neck, decode_head, auxiliary_head.
      **overrides: attributes of the backbone, ``DAT``, that replace the configured ones, such as dtype.

    Raises:
      ValueError: another head, or settings that no published model has.
    """
    head = config["decode_head"]
    if head["type"] not in _HEADS:
        raise ValueError(f"The decode_head {head['type']!r} is unknown; choose from {', '.join(_HEADS)}.")
    dat = dense.backbone_from_official(config["backbone"], **overrides)
    auxiliary = config.get("auxiliary_head") or {"channels": 0}
    return Segmentor(
        dat,
        num_classes=head["num_classes"],
        head=_HEADS[head["type"]],
        channels=head["channels"],
        neck_channels=config.get("neck", {}).get("out_channels", 256),
        auxiliary_channels=auxiliary["channels"],
        dropout=head["dropout_ratio"],
        dtype=dat.dtype,
    )


def segmentor_variables(model: Segmentor, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published weights of a segmentor as {"params", "batch_stats"}.

    Raises:
      ValueError: names every unknown, missing and mis-shaped weight at once.
    """
    return dense.to_variables(model, _TABLE, state_dict)


def segmentor_to_official(model: Segmentor, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables with published names and layouts; counters of BatchNorm, which we do not have, are 0."""
    return dense.to_official(model, _TABLE, variables)


def segmentor_shapes(model: Segmentor) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter and statistic of the model."""
    return dense.official_shapes(model, _TABLE)


def guess_segmentor(state_dict: Mapping[str, np.ndarray], backbone: str) -> Segmentor:
    """The segmentor on a backbone of the registry that published weights are of, its head and widths read from them."""
    head = "sem_fpn" if any(name.startswith("neck.") for name in state_dict) else "upernet"
    default = create_segmentor(head, backbone=backbone)
    width = functools.partial(dense.read_width, state_dict)
    return default.clone(
        num_classes=width("decode_head.conv_seg", axis=0, default=default.num_classes),
        channels=width("decode_head.conv_seg", axis=1, default=default.channels),
        neck_channels=width("neck.lateral_convs.0.conv", axis=0, default=default.neck_channels),
        auxiliary_channels=width("auxiliary_head.convs.0.conv", axis=0, default=0),
    )


def find_segmentor(
    state_dict: Mapping[str, np.ndarray], *, backbones: Mapping[str, DAT]
) -> tuple[str, Segmentor] | None:
    """The segmentor on one of the backbones that has these names and shapes, with the backbone's name; see ``dense.find``."""
    return dense.find(state_dict, backbones=backbones, guess=guess_segmentor, shapes_of=segmentor_shapes)
