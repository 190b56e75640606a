"""Settings of published configurations of detectors: the network, its training targets and its detections."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dat_jax.conversion import dense
from dat_jax.conversion.dense import check_loss, check_plain
from dat_jax.conversion.settings import (
    COUNT,
    COUNT_OR_ZERO,
    FLAG,
    NUMBER,
    POSITIVE,
    RATE,
    Kind,
    Settings,
    choice,
    list_of,
    short,
)
from dat_jax.models import retinanet, rpn
from dat_jax.models.dat import DAT
from dat_jax.models.rcnn import BOX_HEAD_SIZES, CASCADE_STAGES, RCNN
from dat_jax.models.registry import Detector
from dat_jax.models.retinanet import RetinaNet
from dat_jax.tasks.detection.objective import default_settings
from dat_jax.tasks.detection.rcnn import RCNNSettings, Stage
from dat_jax.tasks.detection.retinanet import RetinaNetSettings

_DETECTORS = ("RetinaNet", "MaskRCNN", "CascadeRCNN")
_PRINTS = "it only switches debugging output on"
_RESERVED = "the published code accepts it and does not use it"
_OCTAVES = Kind("an integer from 1 to 100", lambda value: COUNT.fits(value) and value <= 100)
_ROI_STRIDES = rpn.STRIDES[:4]
_PROPOSAL_IOU = RCNNSettings().proposal_iou


def read_detector(config: Mapping[str, Any], **overrides) -> tuple[Detector, RetinaNetSettings | RCNNSettings]:
    """Read a published configuration.

    Args:
      config: MMDetection's ``model`` mapping.
      **overrides: attributes of the backbone, ``DAT``, that replace the configured ones, such as dtype.

    Returns:
      The network, and its settings for ``tasks.detection.objective``.

    Raises:
      ValueError: a key is unknown or missing, or its value is not supported; the key is named.
    """
    model, task_settings, _ = trace_detector(config, **overrides)
    return model, task_settings


def trace_detector(
    config: Mapping[str, Any], **overrides
) -> tuple[Detector, RetinaNetSettings | RCNNSettings, dict[str, str]]:
    """Read a published detector configuration like ``read_detector``, and record the use of each key (``Settings.uses``)."""
    settings = dense.open_config(config)
    kind = settings.take("type", choice(*_DETECTORS))
    if kind == "RetinaNet":
        model, task_settings = _read_retinanet(settings, overrides)
    else:
        model, task_settings = _read_rcnn(settings, overrides, cascade=kind == "CascadeRCNN")
    settings.finish()
    return model, task_settings, settings.uses


def _read_retinanet(settings: Settings, overrides: Mapping[str, Any]) -> tuple[RetinaNet, RetinaNetSettings]:
    dat = dense.read_backbone(settings, out_indices=(1, 2, 3), **overrides)
    features = dense.read_neck(settings, dat, levels=5, start_level=1, extra="on_input")
    head = settings.section("bbox_head")
    head.check("type", "RetinaHead")
    head.match("in_channels", features, "neck.out_channels")
    head.match("feat_channels", features, "neck.out_channels", default=256)
    check_plain(head, "conv_cfg", "norm_cfg", value=None)
    check_plain(head, "reg_decoded_bbox", value=False)
    head.ignore(dense.INITIAL_WEIGHTS, "init_cfg")
    check_loss(head, "loss_cls", kind="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25)
    check_loss(head, "loss_bbox", kind="L1Loss")
    model = RetinaNet(
        dat,
        num_classes=head.take("num_classes", COUNT),
        features=features,
        depth=head.take("stacked_convs", COUNT, default=4),
        **_read_anchors(head, strides=retinanet.STRIDES),
        dtype=dat.dtype,
    )
    if (train := settings.optional_section("train_cfg")) is not None:
        _check_assigner(train.section("assigner"), positive=0.5, negative=0.4, min_positive=0.0)
        train.check("allowed_border", -1)
        _check_weights(train)
    test = settings.optional_section("test_cfg")
    return model, dataclasses.replace(default_settings(model), **_read_test(test, candidates="candidates"))


def _read_rcnn(settings: Settings, overrides: Mapping[str, Any], *, cascade: bool) -> tuple[RCNN, RCNNSettings]:
    dat = dense.read_backbone(settings, out_indices=(0, 1, 2, 3), **overrides)
    features = dense.read_neck(settings, dat, levels=5, extra=False if cascade else "on_input")
    anchors, values = _read_rpn(settings, features)
    attributes, stages, giou = _read_roi_head(settings.section("roi_head"), features, cascade=cascade)
    model = RCNN(dat, cascade=cascade, features=features, **anchors, **attributes, dtype=dat.dtype)
    stages = [
        dataclasses.replace(stage, **changes)
        for stage, changes in zip(default_settings(model).stages, stages, strict=True)
    ]
    values["giou"] = giou
    if (train := settings.optional_section("train_cfg")) is not None:
        values |= _read_rpn_training(train)
        sections = train.sections("rcnn", CASCADE_STAGES) if cascade else [train.section("rcnn")]
        stages = [_read_roi_training(*pair, model, values) for pair in zip(sections, stages, strict=True)]
    if (test := settings.optional_section("test_cfg")) is not None:
        rpn_test = test.section("rpn")
        values["test_candidates"] = rpn_test.take("nms_pre", COUNT)
        values["test_proposals"] = rpn_test.take("max_per_img", COUNT)
        _check_proposal_nms(rpn_test)
        rcnn_test = test.section("rcnn")
        rcnn_test.check("mask_thr_binary", 0.5)
        values |= _read_test(rcnn_test)
    return model, dataclasses.replace(default_settings(model), stages=tuple(stages), **values)


def _read_rpn(settings: Settings, features: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of ``RCNN`` and attributes of ``RCNNSettings`` about region proposals."""
    head = settings.section("rpn_head")
    head.check("type", "RPNHead")
    head.match("in_channels", features, "neck.out_channels")
    head.match("feat_channels", features, "neck.out_channels", default=256)
    head.check("num_convs", 1, default=1)
    check_plain(head, "reg_decoded_bbox", value=False)
    head.ignore(dense.INITIAL_WEIGHTS, "init_cfg")
    check_loss(head, "loss_cls", kind="CrossEntropyLoss", use_sigmoid=True)
    loss = head.section("loss_bbox")
    smooth = loss.take("type", choice("L1Loss", "SmoothL1Loss")) == "SmoothL1Loss"
    loss.check("loss_weight", 1.0, default=1.0)
    beta = loss.take("beta", POSITIVE, default=1.0) if smooth else 0.0
    return _read_anchors(head, strides=rpn.STRIDES), {"rpn_beta": beta}


def _read_anchors(head: Settings, *, strides: tuple[int, ...]) -> dict[str, Any]:
    """Attributes of a detector about its anchors and the box coder relative to them."""
    generator = head.section("anchor_generator")
    generator.check("type", "AnchorGenerator")
    generator.check("strides", strides)
    check_plain(generator, "base_sizes", "centers", value=None)
    check_plain(generator, "center_offset", value=0.0)
    check_plain(generator, "scale_major", value=True)
    if "octave_base_scale" in generator or "scales_per_octave" in generator:
        generator.check("scales", None, default=None, reason="scales excludes octave_base_scale and scales_per_octave.")
        base = generator.take("octave_base_scale", POSITIVE)
        count = generator.take("scales_per_octave", _OCTAVES)
        scales = tuple(base * 2 ** (octave / count) for octave in range(count))
    else:
        scales = generator.take("scales", list_of(POSITIVE))
    means, stds = _read_coder(head)
    ratios = generator.take("ratios", list_of(POSITIVE))
    return dict(anchor_scales=_floats(scales), anchor_ratios=_floats(ratios), anchor_means=means, anchor_stds=stds)


def _floats(values) -> tuple[float, ...]:
    return tuple(map(float, values))


def _read_coder(head: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of box deltas (dx, dy, dw, dh)."""
    coder = head.section("bbox_coder")
    coder.check("type", "DeltaXYWHBBoxCoder")
    check_plain(coder, "clip_border", value=True)
    check_plain(coder, "add_ctr_clamp", value=False)
    means = coder.take("target_means", list_of(NUMBER, length=4), default=(0.0,) * 4)
    stds = coder.take("target_stds", list_of(POSITIVE, length=4), default=(1.0,) * 4)
    return _floats(means), _floats(stds)


def _read_roi_head(roi: Settings, features: int, *, cascade: bool) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    """Attributes of ``RCNN``, attributes of each ``Stage``, and whether the box loss is GIoU."""
    roi.check("type", "CascadeRoIHead" if cascade else "StandardRoIHead")
    roi.ignore(dense.INITIAL_WEIGHTS, "init_cfg")
    check_plain(roi, "shared_head", value=None)
    box_side, mask_side = (_read_extractor(roi.section(f"{name}_roi_extractor"), features) for name in ("bbox", "mask"))
    weights = (1.0,)
    if cascade:
        roi.check("num_stages", CASCADE_STAGES)
        weights = _floats(roi.take("stage_loss_weights", list_of(POSITIVE, length=CASCADE_STAGES)))
    sections = roi.sections("bbox_head", CASCADE_STAGES) if cascade else [roi.section("bbox_head")]
    heads = [_read_box_head(head, features, box_side) for head in sections]
    for head, values in zip(sections[1:], heads[1:], strict=True):
        for name, key in _EQUAL_IN_ALL_STAGES.items():
            if values[name] != heads[0][name]:
                expected = f"that of {sections[0].path_of(key)}, {short(heads[0][name])}"
                raise head.error(key, f"expected {expected}, got {short(values[name])}")
    first = heads[0]
    sizes = BOX_HEAD_SIZES[cascade]
    attributes = dict(
        num_classes=first["num_classes"],
        width=first["width"],
        # None stands for the published number of layers.
        box_convs=None if first["convs"] == sizes["num_convs"] else first["convs"],
        box_layers=None if first["layers"] == sizes["num_layers"] else first["layers"],
        mask_convs=_read_mask_head(roi.section("mask_head"), features, first["num_classes"], sections[0].path),
        box_side=box_side,
        mask_side=mask_side,
        **_find_changed_coders(heads, cascade=cascade),
    )
    stages = [{"weight": weight} for weight in weights]
    return attributes, stages, first["giou"]


# Name of a value of ``_read_box_head`` -> the key that it is read from.
_EQUAL_IN_ALL_STAGES = {
    "num_classes": "num_classes",
    "width": "fc_out_channels",
    "convs": "num_shared_convs",
    "layers": "num_shared_fcs",
    "giou": "reg_decoded_bbox",
}


def _find_changed_coders(heads: list[dict[str, Any]], *, cascade: bool) -> dict[str, Any]:
    """Attributes of ``RCNN`` for box coders that differ from the published ones."""
    published_stages = default_settings(RCNN(DAT(), cascade=cascade)).stages
    attributes = {}
    for name in ("means", "stds"):
        values = tuple(head[name] for head in heads)
        if values != tuple(getattr(stage, name) for stage in published_stages):
            attributes[f"box_{name}"] = values
    return attributes


def _read_extractor(extractor: Settings, features: int) -> int:
    """Side of the square feature maps that RoIAlign extracts."""
    extractor.check("type", "SingleRoIExtractor")
    extractor.match("out_channels", features, "neck.out_channels")
    extractor.check("featmap_strides", _ROI_STRIDES)
    check_plain(extractor, "finest_scale", value=56)
    layer = extractor.section("roi_layer")
    layer.check("type", "RoIAlign")
    layer.check("sampling_ratio", 0, default=0)
    check_plain(layer, "aligned", value=True)
    check_plain(layer, "pool_mode", value="avg")
    return layer.take("output_size", COUNT)


_BOX_HEADS = {"Shared2FCBBoxHead": (0, 2), "Shared4Conv1FCBBoxHead": (4, 1)}  # convolutions and linear layers


def _read_box_head(head: Settings, features: int, side: int) -> dict[str, Any]:
    """{"num_classes", "width", "convs", "layers", "means", "stds", "giou"} of a box head."""
    kind = head.take("type", choice("ConvFCBBoxHead", *_BOX_HEADS))
    if kind in _BOX_HEADS:
        convs, layers = _BOX_HEADS[kind]
    else:
        convs = head.take("num_shared_convs", COUNT_OR_ZERO)
        layers = head.take("num_shared_fcs", COUNT)
    head.match("in_channels", features, "neck.out_channels", default=256)
    head.match("conv_out_channels", features, "neck.out_channels", default=features if not convs else 256)
    head.match("roi_feat_size", side, "roi_head.bbox_roi_extractor.roi_layer.output_size", default=7)
    if convs:
        dense.check_batch_norm(head)
    else:
        check_plain(head, "norm_cfg", value=None)
    head.ignore(dense.INITIAL_WEIGHTS, "init_cfg")
    check_plain(head, "reg_class_agnostic", "with_avg_pool", value=False)
    check_plain(head, "conv_cfg", value=None)
    giou = head.take("reg_decoded_bbox", FLAG, default=False)
    check_loss(head, "loss_cls", kind="CrossEntropyLoss", use_sigmoid=False)
    reason = f"It must agree with {head.path_of('reg_decoded_bbox')}, {giou}."
    if giou:  # the two published losses
        check_loss(head, "loss_bbox", kind="GIoULoss", weight=10.0, reason=reason)
    else:
        check_loss(head, "loss_bbox", kind="L1Loss", reason=reason)
    means, stds = _read_coder(head)
    return dict(
        num_classes=head.take("num_classes", COUNT),
        width=head.take("fc_out_channels", COUNT, default=1024),
        convs=convs,
        layers=layers,
        means=means,
        stds=stds,
        giou=giou,
    )


def _read_mask_head(head: Settings, features: int, num_classes: int, box_head: str) -> int:
    """Number of convolutions of the mask head."""
    head.check("type", "FCNMaskHead")
    head.match("in_channels", features, "neck.out_channels", default=256)
    head.match("conv_out_channels", features, "neck.out_channels", default=256)
    head.match("num_classes", num_classes, f"{box_head}.num_classes")
    head.check("conv_kernel_size", 3, default=3)
    check_plain(head, "class_agnostic", value=False)
    check_plain(head, "conv_cfg", "norm_cfg", value=None)
    check_plain(head, "upsample_cfg", value={"type": "deconv", "scale_factor": 2})
    check_plain(head, "predictor_cfg", value={"type": "Conv"})
    head.ignore(_RESERVED, "roi_feat_size")
    head.ignore(dense.INITIAL_WEIGHTS, "init_cfg")
    check_loss(head, "loss_mask", kind="CrossEntropyLoss", use_mask=True)
    return head.take("num_convs", COUNT, default=4)


def _read_rpn_training(train: Settings) -> dict[str, Any]:
    """Attributes of ``RCNNSettings`` about the training of region proposals."""
    rpn_train, proposals = train.section("rpn"), train.section("rpn_proposal")
    _check_assigner(rpn_train.section("assigner"), positive=0.7, negative=0.3, min_positive=0.3)
    samples, positive = _read_sampler(rpn_train.section("sampler"), with_ground_truth=False)
    border = rpn_train.check("allowed_border", -1, 0)
    rpn_train.uses[rpn_train.path_of("allowed_border")] = "honored"
    _check_weights(rpn_train)
    _check_proposal_nms(proposals)
    return dict(
        rpn_samples=samples,
        rpn_positive=positive,
        rpn_inside_only=border == 0,
        train_candidates=proposals.take("nms_pre", COUNT),
        train_proposals=proposals.take("max_per_img", COUNT),
    )


def _read_roi_training(section: Settings, stage: Stage, model: RCNN, values: dict[str, Any]) -> Stage:
    """Read the training of one stage.

    Args:
      section: settings of the stage.
      stage: the stage with its published thresholds.
      model: the network.
      values: attributes of ``RCNNSettings``, to which those of the sampler are added. They must be equal in all stages.

    Returns:
      The stage with its configured thresholds.
    """
    assigner = section.section("assigner")
    iou = assigner.take("pos_iou_thr", RATE)
    for key in ("neg_iou_thr", "min_pos_iou"):
        assigner.match(key, iou, assigner.path_of("pos_iou_thr"))
    low_quality = assigner.take("match_low_quality", FLAG, default=True)
    _check_assigner_type(assigner)
    sampler = section.section("sampler")
    samples = dict(zip(("roi_samples", "roi_positive"), _read_sampler(sampler, with_ground_truth=True), strict=True))
    for (name, value), key in zip(samples.items(), ("num", "pos_fraction"), strict=True):
        if values.setdefault(name, value) != value:
            first = f"{section.path.rsplit('.', 1)[0]}.0.sampler.{key}"
            raise sampler.error(key, f"expected that of {first}, {values[name]}, got {short(value)}")
    section.match("mask_size", 2 * model.mask_side, "twice roi_head.mask_roi_extractor.roi_layer.output_size")
    _check_weights(section)
    return dataclasses.replace(stage, iou=iou, match_low_quality=low_quality)


def _check_assigner(assigner: Settings, *, positive: float, negative: float, min_positive: float) -> None:
    """Check the thresholds of an anchor assigner, which are fixed."""
    assigner.check("pos_iou_thr", positive)
    assigner.check("neg_iou_thr", negative)
    assigner.check("min_pos_iou", min_positive, default=0.0)
    assigner.check("match_low_quality", True, default=True)
    _check_assigner_type(assigner)


def _check_assigner_type(assigner: Settings) -> None:
    assigner.check("type", "MaxIoUAssigner")
    assigner.check("ignore_iof_thr", -1, default=-1)
    assigner.ignore("it selects the device that computes the overlaps", "gpu_assign_thr")


def _read_sampler(sampler: Settings, *, with_ground_truth: bool) -> tuple[int, float]:
    """Number of samples, and the largest fraction of positive ones."""
    sampler.check("type", "RandomSampler")
    sampler.check("neg_pos_ub", -1, default=-1)
    sampler.check("add_gt_as_proposals", with_ground_truth, default=True)
    return sampler.take("num", COUNT), sampler.take("pos_fraction", RATE)


def _check_weights(train: Settings) -> None:
    train.check("pos_weight", -1, default=-1)
    train.ignore(_PRINTS, "debug")


def _check_proposal_nms(section: Settings) -> None:
    nms = section.section("nms")
    nms.check("type", "nms")
    nms.check("iou_threshold", _PROPOSAL_IOU)
    section.check("min_bbox_size", 0, default=0)


def _read_test(test: Settings | None, *, candidates: str = "") -> dict[str, Any]:
    """Attributes of ``RetinaNetSettings`` or ``RCNNSettings`` about detections.

    Args:
      test: settings of the test_cfg; None keeps the published values.
      candidates: name of the attribute that nms_pre sets; empty if this section has no nms_pre.
    """
    if test is None:
        return {}
    nms = test.section("nms")
    nms.check("type", "nms")
    values = dict(
        score_threshold=test.take("score_thr", RATE),
        iou_threshold=nms.take("iou_threshold", RATE),
        max_detections=test.take("max_per_img", COUNT),
    )
    if candidates:
        values[candidates] = test.take("nms_pre", COUNT)
        test.check("min_bbox_size", 0, default=0)
    return values
