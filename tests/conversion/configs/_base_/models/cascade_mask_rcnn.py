"""Cascade Mask R-CNN of MMDetection 2.x on DAT."""

backbone = dict(
    type="DAT",
    img_size=224,
    patch_size=4,
    num_classes=1000,
    expansion=4,
    dim_stem=96,
    dims=[96, 192, 384, 768],
    depths=[2, 2, 6, 2],
    heads=[3, 6, 12, 24],
    heads_q=[6, 12, 24, 48],
    window_sizes=[7] * 4,
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    strides=[-1] * 4,
    offset_range_factor=[1, 2, 3, 4],
    local_orf=[-1] * 4,
    local_kv_sizes=[-1] * 4,
    offset_pes=[False] * 4,
    stage_spec=[["L", "D"], ["L", "D"], ["L", "D"] * 3, ["L", "D"]],
    groups=[-1, -1, 3, 6],
    use_pes=[False] * 4,
    dwc_pes=[False] * 4,
    sr_ratios=[8, 4, 2, 1],
    lower_lr_kvs={},
    fixed_pes=[False] * 4,
    no_offs=[False] * 4,
    ns_per_pts=[4] * 4,
    use_dwc_mlps=[False] * 4,
    use_conv_patches=False,
    ksizes=[9, 7, 5, 3],
    ksize_qnas=[3] * 4,
    nqs=[2] * 4,
    qna_activation="exp",
    deform_groups=[0] * 4,
    nat_ksizes=[3] * 4,
    layer_scale_values=[-1] * 4,
    use_lpus=[False] * 4,
    use_cmt_mlps=[False] * 4,
    out_indices=(0, 1, 2, 3),
    use_checkpoint=True,
)
rpn_head = dict(
    type="RPNHead",
    in_channels=256,
    feat_channels=256,
    anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
    bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
    loss_bbox=dict(type="SmoothL1Loss", beta=1.0 / 9.0, loss_weight=1.0),
)
extractor = dict(type="SingleRoIExtractor", out_channels=256, featmap_strides=[4, 8, 16, 32])
mask_head = dict(
    type="FCNMaskHead",
    num_convs=4,
    in_channels=256,
    conv_out_channels=256,
    num_classes=80,
    loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
)
rpn_training = dict(
    assigner=dict(
        type="MaxIoUAssigner",
        pos_iou_thr=0.7,
        neg_iou_thr=0.3,
        min_pos_iou=0.3,
        match_low_quality=True,
        ignore_iof_thr=-1,
    ),
    sampler=dict(type="RandomSampler", num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
    allowed_border=0,
    pos_weight=-1,
    debug=False,
)
proposal_nms = dict(nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)
roi_sampler = dict(type="RandomSampler", num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True)
test_cfg = dict(
    rpn=dict(nms_pre=1000, max_per_img=1000, **proposal_nms),
    rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100, mask_thr_binary=0.5),
)
box_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
roi_assigner = dict(type="MaxIoUAssigner", match_low_quality=False, ignore_iof_thr=-1)
roi_training = dict(sampler=roi_sampler, mask_size=28, pos_weight=-1, debug=False)
model = dict(
    type="CascadeRCNN",
    backbone=backbone,
    neck=dict(type="FPN", in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
    rpn_head=rpn_head,
    roi_head=dict(
        type="CascadeRoIHead",
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_roi_extractor=dict(roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0), **extractor),
        bbox_head=[
            dict(
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
                **box_head,
            ),
            dict(
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.05, 0.05, 0.1, 0.1]),
                **box_head,
            ),
            dict(
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.033, 0.033, 0.067, 0.067]
                ),
                **box_head,
            ),
        ],
        mask_roi_extractor=dict(roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0), **extractor),
        mask_head=mask_head,
    ),
    train_cfg=dict(
        rpn=rpn_training,
        rpn_proposal=dict(nms_pre=2000, max_per_img=2000, **proposal_nms),
        rcnn=[
            dict(assigner=dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, **roi_assigner), **roi_training),
            dict(assigner=dict(pos_iou_thr=0.6, neg_iou_thr=0.6, min_pos_iou=0.6, **roi_assigner), **roi_training),
            dict(assigner=dict(pos_iou_thr=0.7, neg_iou_thr=0.7, min_pos_iou=0.7, **roi_assigner), **roi_training),
        ],
    ),
    test_cfg=test_cfg,
)
