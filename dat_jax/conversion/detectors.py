"""Published detectors, a whole checkpoint of MMDetection, to ours, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dat_jax.conversion import dense
from dat_jax.conversion.official import LINEAR, Transform
from dat_jax.models.rcnn import BOX_SIDE, RCNN
from dat_jax.models.retinanet import RetinaNet

_DETECTORS = ("RetinaNet", "MaskRCNN", "CascadeRCNN")
# The first linear layer sees (C, 7, 7) flattened as published, (7, 7, C) as ours.
_FLATTENED = Transform(
    lambda a: a.reshape(BOX_SIDE, BOX_SIDE, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1),
    lambda a: a.reshape(a.shape[0], -1, BOX_SIDE, BOX_SIDE).transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
)
# (in, 2, 2, out) <-> (in, out, 2, 2), of a transposed convolution
_DOUBLING = Transform(lambda a: a.transpose(0, 3, 1, 2), lambda a: a.transpose(0, 2, 3, 1))
_NECK = ((r"neck/(?P<m>lateral_convs|fpn_convs)_(?P<i>\d+)", "neck.{m}.{i}.conv"),)
_RETINANET: dense.Table = (
    *_NECK,
    (r"bbox_head/(?P<m>cls_convs|reg_convs)_(?P<i>\d+)", "bbox_head.{m}.{i}.conv"),
    (r"bbox_head/(?P<m>retina_cls|retina_reg)", "bbox_head.{m}"),
)


def _rcnn_table(cascade: bool) -> dense.Table:
    stage = ".{s}" if cascade else ""
    box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
    boxes, masks = r"bbox_heads_(?P<s>\d)", r"mask_heads_(?P<s>\d)"
    return (
        *_NECK,
        (r"rpn_head/(?P<m>rpn_conv|rpn_cls|rpn_reg)", "rpn_head.{m}"),
        (rf"{boxes}/shared_convs_(?P<i>\d)/(?P<k>conv|bn)", box + ".shared_convs.{i}.{k}"),
        (rf"{boxes}/shared_fcs_0", box + ".shared_fcs.0", _FLATTENED),
        (rf"{boxes}/shared_fcs_(?P<i>\d)", box + ".shared_fcs.{i}", LINEAR),
        (rf"{boxes}/(?P<m>fc_cls|fc_reg)", box + ".{m}", LINEAR),
        (rf"{masks}/convs_(?P<i>\d)", mask + ".convs.{i}.conv"),
        (rf"{masks}/upsample", mask + ".upsample", _DOUBLING),
        (rf"{masks}/upsample_bias", mask + ".upsample.bias"),
        (rf"{masks}/conv_logits", mask + ".conv_logits"),
    )


_MASK_RCNN, _CASCADE = _rcnn_table(False), _rcnn_table(True)


def is_detector(names) -> bool:
    """Whether published names are those of a detector."""
    return any(name.startswith(("bbox_head.", "rpn_head.")) for name in names)


def detector_from_official(config: Mapping[str, Any], **overrides) -> RetinaNet | RCNN:
    """The model of a published configuration.

    Args:
      config: MMDetection's ``model`` mapping.
      **overrides: attributes of the backbone, ``DAT``, that replace the configured ones, such as dtype.

    Raises:
      ValueError: another detector, or settings that no published model has.
    """
    kind = config["type"]
    if kind not in _DETECTORS:
        raise ValueError(f"The detector {kind!r} is unknown; choose from {', '.join(_DETECTORS)}.")
    dat = dense.backbone_from_official(config["backbone"], **overrides)
    features = config["neck"]["out_channels"]
    if kind == "RetinaNet":
        return RetinaNet(dat, num_classes=config["bbox_head"]["num_classes"], features=features, dtype=dat.dtype)
    head = config["roi_head"]["bbox_head"]
    head = head[0] if kind == "CascadeRCNN" else head
    return RCNN(
        dat,
        num_classes=head["num_classes"],
        cascade=kind == "CascadeRCNN",
        features=features,
        width=head["fc_out_channels"],
        dtype=dat.dtype,
    )


def detector_variables(model: RetinaNet | RCNN, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published weights of a detector as {"params"}, of a cascade with "batch_stats".

    Raises:
      ValueError: names every unknown, missing and mis-shaped weight at once.
    """
    return dense.to_variables(model, _table(model), state_dict)


def detector_to_official(model: RetinaNet | RCNN, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables with published names and layouts."""
    return dense.to_official(model, _table(model), variables)


def detector_shapes(model: RetinaNet | RCNN) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter and statistic of the model."""
    return dense.official_shapes(model, _table(model))


def _table(model):
    if isinstance(model, RetinaNet):
        return _RETINANET
    return _CASCADE if model.cascade else _MASK_RCNN
