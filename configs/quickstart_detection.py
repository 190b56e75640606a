"""A small Mask R-CNN on digits composed onto photographs, which come with Python packages: nothing is downloaded.

python -m dat_jax.main --config=configs/quickstart_detection.py --workdir=runs/quickstart_detection

Hardware: 2 CPU cores, 11 minutes. Expected: 69.7 box AP, 52.8 mask AP on the 200 held-out images.
"""

from ml_collections import ConfigDict

from dat_jax.config import get_detection_config


def get_config():
    config = get_detection_config()
    config.model.update(name="dat_pp_nano", drop_path_rate=0.0, image_size=64)
    config.head.update(features=32, width=128)
    config.data.update(name="digits_on_photographs", short_sides=(64,), long_side=64)
    config.data.update(test_short_side=64, test_long_side=64, buckets="64x64", max_boxes=2)
    config.augmentation.flip_probability = 0.0  # digits are not mirror-symmetric
    config.augmentation.crop_probability = 0.0
    config.sampling.update(rpn_samples=64, roi_samples=16)
    config.sampling.update(train_candidates=100, train_proposals=60, test_candidates=100, test_proposals=30)
    config.batch_size = 32
    config.steps = 1500
    config.optimizer.update(weight_decay=0.01, clip_norm=1.0)
    config.schedule = ConfigDict(dict(kind="poly", base_lr=2e-3, power=1.0, warmup_steps=50, warmup_ratio=0.01))
    config.eval.update(batch_size=40, every_steps=500, max_detections=10)
    return config.lock()
