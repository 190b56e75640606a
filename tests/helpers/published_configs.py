"""Settings of the published configurations, transcribed as Python mappings.

The files in tests/conversion/configs/ have the same settings of segmentors and detectors as Python configurations with
``_base_`` files. Sources: the configurations of LeapLabTHU/DAT, DAT-Detection and DAT-Segmentation.
"""

import pathlib

DIRECTORY = pathlib.Path(__file__).parents[1] / "conversion" / "configs" / "dat"
# Widths, heads and groups of the stages.
SIZES = {
    "tiny": ([64, 128, 256, 512], [2, 4, 8, 16], [1, 2, 4, 8]),
    "small": ([96, 192, 384, 768], [3, 6, 12, 24], [1, 2, 3, 6]),
    "base": ([128, 256, 512, 1024], [4, 8, 16, 32], [2, 4, 8, 16]),
}
# Name in tests/golden/keys.json.gz -> published file and drop path rate.
FILES = {
    "cascade_tiny": ("cmrcn_tiny_1x_4n_dp00_lr4", 0.0),
    "cascade_small": ("cmrcn_small_3x_4n_dp05_lr4", 0.5),
    "cascade_base": ("cmrcn_base_3x_8n_dp08_lr4", 0.8),
    "maskrcnn_tiny": ("mrcn_tiny_1x_4n_dp00_lr4", 0.0),
    "maskrcnn_small": ("mrcn_small_1x_4n_dp01_lr4", 0.1),
    "retinanet_tiny": ("rtn_tiny_1x_4n_dp00_lr2", 0.0),
    "retinanet_small": ("rtn_small_1x_4n_dp01_lr2", 0.1),
    "semfpn_tiny": ("fpn_tiny_80k_dp04_lr2", 0.4),
    "semfpn_small": ("fpn_small_80k_dp04_lr2", 0.4),
    "semfpn_base": ("fpn_base_80k_dp07_lr2", 0.7),
    "upernet_tiny": ("upn_tiny_160k_dp03_lr6", 0.3),
    "upernet_small": ("upn_small_160k_dp05_lr6", 0.5),
    "upernet_base": ("upn_base_160k_dp07_lr6", 0.7),
}


def make_config(name):
    """The ``model`` mapping of a segmentor or detector, by its name in ``FILES``. All parts are new objects."""
    kind, size = name.split("_")
    make = {
        "semfpn": _sem_fpn,
        "upernet": _upernet,
        "retinanet": _retinanet,
        "maskrcnn": _mask_rcnn,
        "cascade": _cascade,
    }
    return make[kind](SIZES[size][0], _backbone(size, FILES[name][1], kind))


def file_of(name):
    """Path of the Python configuration of a name in ``FILES``."""
    return DIRECTORY / f"{FILES[name][0]}.py"


def _plus_plus(size, rate):
    dims, heads, groups = (list(values) for values in SIZES[size])
    blocks = [["N", "D"], ["N", "D"] * 2, ["N", "D"] * 9, ["D", "D"]]
    return {
        **{"img_size": 224, "patch_size": 4, "num_classes": 1000, "expansion": 4, "dim_stem": dims[0], "dims": dims},
        **{"depths": [2, 4, 18, 2], "stage_spec": blocks, "heads": heads, "window_sizes": [7, 7, 7, 7]},
        **{"groups": groups, "use_pes": [True] * 4, "dwc_pes": [False] * 4, "strides": [8, 4, 2, 1]},
        **{"offset_range_factor": [-1] * 4, "no_offs": [False] * 4, "fixed_pes": [False] * 4},
        **{"use_dwc_mlps": [True] * 4, "use_lpus": [True] * 4, "use_conv_patches": True, "ksizes": [9, 7, 5, 3]},
        **{"nat_ksizes": [7] * 4, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": rate},
    }


def _backbone(size, rate, kind):
    return {
        "type": "DAT",
        **_plus_plus(size, rate),
        **{"heads_q": [6, 12, 24, 48], "local_orf": [-1] * 4, "local_kv_sizes": [-1] * 4, "offset_pes": [False] * 4},
        **{"sr_ratios": [8, 4, 2, 1], "lower_lr_kvs": {}, "ns_per_pts": [4] * 4, "ksize_qnas": [3] * 4, "nqs": [2] * 4},
        **{"qna_activation": "exp", "deform_groups": [0] * 4, "layer_scale_values": [-1] * 4},
        **{"use_cmt_mlps": [False] * 4, "out_indices": (1, 2, 3) if kind == "retinanet" else (0, 1, 2, 3)},
        **{"use_checkpoint": kind != "semfpn", "init_cfg": {"type": "Pretrained", "checkpoint": "weights.pth"}},
    }


def _segmentor(backbone, **parts):
    ends = {"train_cfg": {}, "test_cfg": {"mode": "whole"}}
    return {"type": "EncoderDecoder", "pretrained": None, "backbone": backbone, **parts, **ends}


def _pixel_head(kind, weight, **settings):
    return {
        **{"type": kind, "dropout_ratio": 0.1, "num_classes": 150, "align_corners": False},
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight},
        **settings,
    }


def _sem_fpn(dims, backbone):
    neck = {"type": "FPN", "in_channels": list(dims), "out_channels": 256, "num_outs": 4}
    inputs = {"in_channels": [256] * 4, "in_index": [0, 1, 2, 3], "feature_strides": [4, 8, 16, 32]}
    return _segmentor(backbone, neck=neck, decode_head=_pixel_head("FPNHead", 1.0, channels=128, **inputs))


def _upernet(dims, backbone):
    inputs = {"in_channels": list(dims), "in_index": [0, 1, 2, 3]}
    head = _pixel_head("UPerHead", 1.0, pool_scales=(1, 2, 3, 6), channels=512, **inputs)
    inputs = {"in_channels": dims[2], "in_index": 2}
    auxiliary = _pixel_head("FCNHead", 0.4, channels=256, num_convs=1, concat_input=False, **inputs)
    return _segmentor(backbone, decode_head=head, auxiliary_head=auxiliary)


def _coder(*stds):
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}


def _loss(kind, weight=1.0, **settings):
    return {"type": kind, "loss_weight": weight, **settings}


def _assigner(positive, negative, min_positive, **settings):
    thresholds = {"pos_iou_thr": positive, "neg_iou_thr": negative, "min_pos_iou": min_positive}
    return {"type": "MaxIoUAssigner", **thresholds, "ignore_iof_thr": -1, **settings}


def _nms(threshold):
    return {"type": "nms", "iou_threshold": threshold}


def _retinanet(dims, backbone):
    anchors = {"octave_base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0]}
    return {
        "type": "RetinaNet",
        "backbone": backbone,
        "neck": {
            **{"type": "FPN", "in_channels": list(dims), "out_channels": 256, "start_level": 1},
            **{"add_extra_convs": "on_input", "num_outs": 5},
        },
        "bbox_head": {
            **{"type": "RetinaHead", "num_classes": 80, "in_channels": 256, "stacked_convs": 4, "feat_channels": 256},
            "anchor_generator": {"type": "AnchorGenerator", "strides": [8, 16, 32, 64, 128], **anchors},
            "bbox_coder": _coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": _loss("FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
            "loss_bbox": _loss("L1Loss"),
        },
        "train_cfg": {
            **{"assigner": _assigner(0.5, 0.4, 0), "allowed_border": -1, "pos_weight": -1, "debug": False},
        },
        "test_cfg": {"nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.05, "nms": _nms(0.5), "max_per_img": 100},
    }


def _sampler(count, part, with_ground_truth):
    numbers = {"num": count, "pos_fraction": part, "neg_pos_ub": -1}
    return {"type": "RandomSampler", **numbers, "add_gt_as_proposals": with_ground_truth}


def _proposals(candidates, count):
    return {"nms_pre": candidates, "max_per_img": count, "nms": _nms(0.7), "min_bbox_size": 0}


def _extractor(side):
    layer = {"type": "RoIAlign", "output_size": side, "sampling_ratio": 0}
    return {"type": "SingleRoIExtractor", "roi_layer": layer, "out_channels": 256, "featmap_strides": [4, 8, 16, 32]}


def _rcnn(kind, backbone, *, neck, rpn_loss, border, proposals, roi_head, roi_training):
    rpn_training = {
        "assigner": _assigner(0.7, 0.3, 0.3, match_low_quality=True),
        "sampler": _sampler(256, 0.5, False),
        **{"allowed_border": border, "pos_weight": -1, "debug": False},
    }
    rcnn_test = {"score_thr": 0.05, "nms": _nms(0.5), "max_per_img": 100, "mask_thr_binary": 0.5}
    anchors = {"scales": [8], "ratios": [0.5, 1.0, 2.0], "strides": [4, 8, 16, 32, 64]}
    return {
        "type": kind,
        "backbone": backbone,
        "neck": {"type": "FPN", "out_channels": 256, "num_outs": 5, **neck},
        "rpn_head": {
            **{"type": "RPNHead", "in_channels": 256, "feat_channels": 256},
            "anchor_generator": {"type": "AnchorGenerator", **anchors},
            "bbox_coder": _coder(1.0, 1.0, 1.0, 1.0),
            "loss_cls": _loss("CrossEntropyLoss", use_sigmoid=True),
            "loss_bbox": rpn_loss,
        },
        "roi_head": {
            "bbox_roi_extractor": _extractor(7),
            "mask_roi_extractor": _extractor(14),
            "mask_head": {
                **{"type": "FCNMaskHead", "num_convs": 4, "in_channels": 256, "conv_out_channels": 256},
                **{"num_classes": 80, "loss_mask": _loss("CrossEntropyLoss", use_mask=True)},
            },
            **roi_head,
        },
        "train_cfg": {"rpn": rpn_training, "rpn_proposal": _proposals(2000, proposals), "rcnn": roi_training},
        "test_cfg": {"rpn": _proposals(1000, 1000), "rcnn": rcnn_test},
    }


def _box_head(kind, stds, loss, **settings):
    return {
        **{"type": kind, "in_channels": 256, "fc_out_channels": 1024, "roi_feat_size": 7, "num_classes": 80},
        **{"bbox_coder": _coder(*stds), "reg_class_agnostic": False, "loss_bbox": loss},
        "loss_cls": _loss("CrossEntropyLoss", use_sigmoid=False),
        **settings,
    }


def _roi_training(iou, low_quality):
    assigner = _assigner(iou, iou, iou, match_low_quality=low_quality)
    sampler = _sampler(512, 0.25, True)
    return {"assigner": assigner, "sampler": sampler, "mask_size": 28, "pos_weight": -1, "debug": False}


def _mask_rcnn(dims, backbone):
    return _rcnn(
        "MaskRCNN",
        backbone,
        neck={"in_channels": list(dims), "start_level": 0, "add_extra_convs": "on_input"},
        rpn_loss=_loss("L1Loss"),
        border=-1,
        proposals=1000,
        roi_head={
            "type": "StandardRoIHead",
            "bbox_head": _box_head("Shared2FCBBoxHead", (0.1, 0.1, 0.2, 0.2), _loss("L1Loss")),
        },
        roi_training=_roi_training(0.5, True),
    )


def _cascade(dims, backbone):
    def head(*stds):
        layers = {"num_shared_convs": 4, "num_shared_fcs": 1, "conv_out_channels": 256, "reg_decoded_bbox": True}
        norm = {"type": "SyncBN", "requires_grad": True}
        return _box_head("ConvFCBBoxHead", stds, _loss("GIoULoss", 10.0), norm_cfg=norm, **layers)

    heads = [head(0.1, 0.1, 0.2, 0.2), head(0.05, 0.05, 0.1, 0.1), head(0.033, 0.033, 0.067, 0.067)]
    return _rcnn(
        "CascadeRCNN",
        backbone,
        neck={"in_channels": list(dims)},
        rpn_loss=_loss("SmoothL1Loss", beta=1 / 9),
        border=0,
        proposals=2000,
        roi_head={
            **{"type": "CascadeRoIHead", "num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]},
            "bbox_head": heads,
        },
        roi_training=[_roi_training(iou, False) for iou in (0.5, 0.6, 0.7)],
    )


def _yaml(name, dat, *, batch_size=128, train=(), **sections):
    train = {"EPOCHS": 300, "WARMUP_EPOCHS": 20, **dict(train)}
    model = {"TYPE": "dat", "NAME": name, "DAT": dat}
    return {"MODEL": model, "TRAIN": train, "DATA": {"BATCH_SIZE": batch_size}, "SAVE_FREQ": 1, **sections}


def _version_1(dims, heads, groups, depth, rate):
    return {
        **{"img_size": 224, "patch_size": 4, "num_classes": 1000, "expansion": 4, "dim_stem": dims[0], "dims": dims},
        **{"depths": [2, 2, depth, 2], "stage_spec": [["L", "S"], ["L", "S"], ["L", "D"] * (depth // 2), ["L", "D"]]},
        **{"heads": heads, "window_sizes": [7, 7, 7, 7], "groups": [-1, -1, *groups], "strides": [-1, -1, 1, 1]},
        **{"use_pes": [False, False, True, True], "dwc_pes": [False] * 4, "sr_ratios": [-1] * 4},
        **{"offset_range_factor": [-1, -1, 2, 2], "no_offs": [False] * 4, "fixed_pes": [False] * 4},
        **{"use_dwc_mlps": [False] * 4, "use_conv_patches": False},
        **{"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": rate},
    }


def make_yaml(name):
    """The mapping of a published YAML file, by the name of its model in ``dat_jax.list_models()``."""
    if name == "dat_p_tiny":
        plain = {"use_dwc_mlps": [False] * 4, "use_lpus": [False] * 4, "use_conv_patches": False}
        return _yaml("dat_plus", _plus_plus("tiny", 0.2) | plain)
    if name == "dat_pp_base_384":
        config = _yaml(
            "dat_plus_plus",
            _plus_plus("base", 0.6),
            train={"EPOCHS": 30, "WARMUP_EPOCHS": 0, "WEIGHT_DECAY": 1e-8, "BASE_LR": 2e-5, "MIN_LR": 2e-7},
            TEST={"CROP": False},
        )
        config["MODEL"]["PRETRAINED"] = "weights.pth"
        config["DATA"] |= {"BATCH_SIZE": 24, "IMG_SIZE": 384}
        return config
    if name.startswith("dat_pp_"):
        size = name.rsplit("_", 1)[-1]
        return _yaml("dat_plus_plus", _plus_plus(size, {"tiny": 0.2, "small": 0.4, "base": 0.7}[size]))
    size = name.removeprefix("dat_")
    wide = size == "base"
    dims, heads, _ = SIZES["base" if wide else "small"]
    depth, rate = {"tiny": (6, 0.2), "small": (18, 0.3), "base": (18, 0.5)}[size]
    groups = [4, 8] if wide else [3, 6]
    return _yaml(name, _version_1(list(dims), list(heads), groups, depth, rate), train={"BASE_LR": 5e-4})


YAMLS = (
    *("dat_pp_tiny", "dat_pp_small", "dat_pp_base", "dat_pp_base_384", "dat_p_tiny"),
    *("dat_tiny", "dat_small", "dat_base"),
)
