"""Cascade Mask R-CNN on DAT-S++: the settings that are published as cmrcn_small_3x_4n_dp05_lr4.py."""

_base_ = [
    "../_base_/models/cascade_mask_rcnn.py",
    "../_base_/datasets/coco.py",
    "../_base_/runtime.py",
    "../_base_/schedules/sgd.py",
]

pretrained = "weights.pth"
model = dict(
    backbone=dict(
        type="DAT",
        dim_stem=96,
        dims=[96, 192, 384, 768],
        depths=[2, 4, 18, 2],
        stage_spec=[["N", "D"], ["N", "D"] * 2, ["N", "D"] * 9, ["D", "D"]],
        heads=[3, 6, 12, 24],
        groups=[1, 2, 3, 6],
        use_pes=[True] * 4,
        strides=[8, 4, 2, 1],
        offset_range_factor=[-1] * 4,
        use_dwc_mlps=[True] * 4,
        use_lpus=[True] * 4,
        use_conv_patches=True,
        ksizes=[9, 7, 5, 3],
        nat_ksizes=[7] * 4,
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint=pretrained),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

optimizer = dict(
    _delete_=True,
    type="AdamW",
    lr=4e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    paramwise_cfg=dict(custom_keys={"rpe_table": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
fp16 = None
data = dict(samples_per_gpu=1, train=dict(pipeline=[dict(type="RandomFlip", flip_ratio=0.5)]))
