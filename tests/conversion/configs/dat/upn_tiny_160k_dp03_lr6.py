"""UperNet on DAT-T++: the settings that are published as upn_tiny_160k_dp03_lr6.py."""

_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
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
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint=pretrained),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=150),
    auxiliary_head=dict(in_channels=256, num_classes=150),
)

optimizer = dict(
    _delete_=True,
    type="AdamW",
    lr=6e-5,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    paramwise_cfg=dict(custom_keys={"rpe_table": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
fp16 = None
