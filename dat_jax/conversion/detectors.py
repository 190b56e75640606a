"""Conversion of detectors: whole published configurations and checkpoints of MMDetection, and weights back."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dat_jax.conversion import dense
from dat_jax.conversion.detector_settings import read_detector
from dat_jax.conversion.official import LINEAR, Transform
from dat_jax.models.dat import DAT
from dat_jax.models.registry import Detector, create_detector
from dat_jax.models.retinanet import RetinaNet
from dat_jax.tasks.detection.objective import default_settings
from dat_jax.tasks.detection.rcnn import RCNNSettings
from dat_jax.tasks.detection.retinanet import RetinaNetSettings

# Kernel of a transposed convolution: (in, 2, 2, out) here, (in, out, 2, 2) as published.
_TRANSPOSED_CONV = Transform(lambda a: a.transpose(0, 3, 1, 2), lambda a: a.transpose(0, 2, 3, 1))
_NECK = ((r"neck/(?P<m>lateral_convs|fpn_convs)_(?P<i>\d+)", "neck.{m}.{i}.conv"),)
_RETINANET: dense.Table = (
    *_NECK,
    (r"bbox_head/(?P<m>cls_convs|reg_convs)_(?P<i>\d+)", "bbox_head.{m}.{i}.conv"),
    (r"bbox_head/(?P<m>retina_cls|retina_reg)", "bbox_head.{m}"),
)


def _make_flattened_linear(side: int) -> Transform:
    """Transform of a linear layer of flattened features: (side, side, C) here, (C, side, side) as published."""
    return Transform(
        lambda a: a.reshape(side, side, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1),
        lambda a: a.reshape(a.shape[0], -1, side, side).transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
    )


@functools.cache
def _make_rcnn_table(cascade: bool, box_side: int) -> dense.Table:
    stage = ".{s}" if cascade else ""
    box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
    boxes, masks = r"bbox_heads_(?P<s>\d)", r"mask_heads_(?P<s>\d)"
    return (
        *_NECK,
        (r"rpn_head/(?P<m>rpn_conv|rpn_cls|rpn_reg)", "rpn_head.{m}"),
        (rf"{boxes}/shared_convs_(?P<i>\d)/(?P<k>conv|bn)", box + ".shared_convs.{i}.{k}"),
        (rf"{boxes}/shared_fcs_0", box + ".shared_fcs.0", _make_flattened_linear(box_side)),
        (rf"{boxes}/shared_fcs_(?P<i>\d)", box + ".shared_fcs.{i}", LINEAR),
        (rf"{boxes}/(?P<m>fc_cls|fc_reg)", box + ".{m}", LINEAR),
        (rf"{masks}/convs_(?P<i>\d)", mask + ".convs.{i}.conv"),
        (rf"{masks}/upsample", mask + ".upsample", _TRANSPOSED_CONV),
        (rf"{masks}/upsample_bias", mask + ".upsample.bias"),
        (rf"{masks}/conv_logits", mask + ".conv_logits"),
    )


def is_detector(names: Iterable[str]) -> bool:
    """Whether published names belong to a detector."""
    return any(name.startswith(("bbox_head.", "rpn_head.")) for name in names)


def detector_from_official(config: Mapping[str, Any], **overrides) -> Detector:
    """Create the model of a published configuration.

    Args:
      config: MMDetection's ``model`` mapping. Its train_cfg and test_cfg are only checked;
        ``detector_settings_from_official`` returns their settings.
      **overrides: attributes of the backbone, ``DAT``, that replace the configured ones, such as dtype.

    Returns:
      The model, a linen module.

    Raises:
      ValueError: a key is unknown or missing, or its value is not supported; the key is named.
    """
    return read_detector(config, **overrides)[0]


def detector_settings_from_official(config: Mapping[str, Any]) -> RetinaNetSettings | RCNNSettings:
    """Read the training and test settings of a published configuration: its train_cfg, test_cfg and losses.

    Args:
      config: MMDetection's ``model`` mapping.

    Returns:
      Settings for ``tasks.detection.objective``.

    Raises:
      ValueError: a key is unknown or missing, or its value is not supported; the key is named.
    """
    return read_detector(config)[1]


def read_detector_options(config: Mapping[str, Any]) -> tuple[Detector, dict[str, Any]]:
    """Read a published configuration for inference.

    Args:
      config: MMDetection's ``model`` mapping.

    Returns:
      The model, and the options of ``inference.load`` that differ from the published defaults of such a model.

    Raises:
      ValueError: as ``detector_from_official``.
    """
    model, settings = read_detector(config)
    names = {"score_threshold": "score_threshold", "iou_threshold": "iou_threshold", "max_detections": "max_detections"}
    if isinstance(model, RetinaNet):
        names |= {"candidates": "candidates"}
    else:
        names |= {"candidates": "test_candidates", "proposals": "test_proposals"}
    default = default_settings(model)
    values = {option: getattr(settings, name) for option, name in names.items()}
    return model, {option: value for option, value in values.items() if value != getattr(default, names[option])}


def detector_variables(model: Detector, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert the published weights of a detector to variables.

    Args:
      model: model that the weights belong to.
      state_dict: published name -> array, in PyTorch's layouts. Buffers and counters of BatchNorm may be missing.

    Returns:
      {"params": ...}, for a cascade with "batch_stats", in float32. float64 arrays stay float64 if jax_enable_x64 is on.

    Raises:
      ValueError: weights do not fit the model. One message names all unknown, missing and mis-shaped weights.
    """
    return dense.to_variables(model, _table(model), state_dict)


def detector_to_official(model: Detector, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert variables of a detector to a state dict with published names and PyTorch's layouts.

    Args:
      model: model that the variables belong to.
      variables: {"params": ...}, for a cascade with "batch_stats".

    Returns:
      Published name -> array. Counters of BatchNorm, which our variables do not have, are 0.
    """
    return dense.to_official(model, _table(model), variables)


def detector_shapes(model: Detector) -> dict[str, tuple[int, ...]]:
    """Published name -> published shape, for every parameter and statistic of a model."""
    return dense.official_shapes(model, _table(model))


def guess_detector(state_dict: Mapping[str, np.ndarray], backbone: str) -> Detector:
    """The detector on a registered backbone whose kind and widths agree with published weights."""
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
    """Name of a backbone, and the detector on it that has the names and shapes of published weights; see ``dense.find``."""
    return dense.find(state_dict, backbones=backbones, guess=guess_detector, shapes_of=detector_shapes)


def _table(model: Detector) -> dense.Table:
    if isinstance(model, RetinaNet):
        return _RETINANET
    return _make_rcnn_table(model.cascade, model.box_side)
