"""Mask R-CNN on DAT-T++: the settings that are published as mrcn_tiny_1x_4n_dp00_lr4.py."""

_base_ = [
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco.py",
    "../_base_/runtime.py",
    "../_base_/schedules/sgd.py",
]

pretrained = "weights.pth"
model = dict(
    backbone=dict(
        type="DAT",
        dim_stem=64,
        dims=[64, 128, 256, 512],
        depths=[2, 4, 18, 2],
        stage_spec=[["N", "D"], ["N", "D"] * 2, ["N", "D"] * 9, ["D", "D"]],
        heads=[2, 4, 8, 16],
        groups=[1, 2, 4, 8],
        use_pes=[True] * 4,
        strides=[8, 4, 2, 1],
        offset_range_factor=[-1] * 4,
        use_dwc_mlps=[True] * 4,
        use_lpus=[True] * 4,
        use_conv_patches=True,
        ksizes=[9, 7, 5, 3],
        nat_ksizes=[7] * 4,
        drop_path_rate=0.0,
        init_cfg=dict(type="Pretrained", checkpoint=pretrained),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
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
