"""A small Mask R-CNN on digits composed onto photographs, which come with packages: nothing is downloaded.

python -m dat_jax.main --config=configs/quickstart_detection.py --workdir=runs/quickstart_detection

Hardware: 2 CPU cores, minutes. Expected: see the README.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_detection_config()
    config.model = ConfigDict(
        dict(name="dat_pp_nano", deformable_form="auto", dtype="auto", drop_path_rate=0.0, image_size=64)
    )
    config.head = ConfigDict(dict(name="mask_rcnn", features=32, width=128))
    config.data.name = "digits_on_photographs"
    config.data.short_sides = (64,)
    config.data.long_side = 64
    config.data.test_short_side = 64
    config.data.test_long_side = 64
    config.data.buckets = "64x64"
    config.data.max_boxes = 2
    config.augmentation.flip_probability = 0.0  # digits have a left and a right
    config.augmentation.crop_probability = 0.0
    config.sampling.rpn_samples = 64
    config.sampling.roi_samples = 16
    config.sampling.train_candidates = 100
    config.sampling.train_proposals = 60
    config.sampling.test_candidates = 100
    config.sampling.test_proposals = 30
    config.batch_size = 32
    config.steps = 1500
    config.log_every = 50
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.schedule = ConfigDict(dict(kind="poly", base_lr=2e-3, power=1.0, warmup_steps=50, warmup_ratio=0.01))
    config.eval.batch_size = 40
    config.eval.every_steps = 500
    config.eval.max_detections = 10
    return config.lock()
