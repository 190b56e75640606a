"""Only a part of a data set's settings, which do not concern the model."""

data_root = "data/coco/"
normalization = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="Normalize", **normalization)]
data = dict(
    samples_per_gpu=2,
    val=dict(ann_file=data_root + "annotations/instances_val2017.json", pipeline=test_pipeline),
)
