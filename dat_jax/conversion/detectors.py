"""Published detectors, a whole checkpoint of MMDetection, to ours, and back."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from dat_jax.conversion import dense
from dat_jax.conversion.official import LINEAR, Transform
from dat_jax.models.dat import DAT
from dat_jax.models.rcnn import BOX_SIDE, RCNN
from dat_jax.models.registry import Detector, create_detector
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


def detector_from_official(config: Mapping[str, Any], **overrides) -> Detector:
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


def detector_variables(model: Detector, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published weights of a detector as {"params"}, of a cascade with "batch_stats".

    Raises:
      ValueError: names every unknown, missing and mis-shaped weight at once.
    """
    return dense.to_variables(model, _table(model), state_dict)


def detector_to_official(model: Detector, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables with published names and layouts."""
    return dense.to_official(model, _table(model), variables)


def detector_shapes(model: Detector) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter and statistic of the model."""
    return dense.official_shapes(model, _table(model))


def guess_detector(state_dict: Mapping[str, np.ndarray], backbone: str) -> Detector:
    """The detector on a backbone of the registry that published weights are of, its kind and widths read from them."""
    width = functools.partial(dense.read_width, state_dict)
    features = width("neck.lateral_convs.0.conv", axis=0, default=256)
    if any(name.startswith("bbox_head.") for name in state_dict):
        model = create_detector("retinanet", backbone=backbone, features=features)
        anchors = len(model.anchor_scales) * len(model.anchor_ratios)
        outputs = width("bbox_head.retina_cls", axis=0, default=anchors * model.num_classes)
        return model.clone(num_classes=max(outputs // anchors, 1))
    cascade = any(name.startswith("roi_head.bbox_head.0.") for name in state_dict)
    model = create_detector("cascade_mask_rcnn" if cascade else "mask_rcnn", backbone=backbone, features=features)
    stage = ".0" if cascade else ""
    return model.clone(
        num_classes=width(f"roi_head.mask_head{stage}.conv_logits", axis=0, default=model.num_classes),
        width=width(f"roi_head.bbox_head{stage}.fc_cls", axis=1, default=model.width),
    )


def find_detector(state_dict: Mapping[str, np.ndarray], *, backbones: Mapping[str, DAT]) -> tuple[str, Detector] | None:
    """The detector on one of the backbones that has these names and shapes, with the backbone's name; see ``dense.find``."""
    return dense.find(state_dict, backbones=backbones, guess=guess_detector, shapes_of=detector_shapes)


def _table(model):
    if isinstance(model, RetinaNet):
        return _RETINANET
    return _CASCADE if model.cascade else _MASK_RCNN
