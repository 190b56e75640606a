"""A small segmentor on digits composed onto photographs, which come with packages: nothing is downloaded.

python -m dat_jax.main --config=configs/quickstart_segmentation.py --workdir=runs/quickstart_segmentation

Hardware: 2 CPU cores, minutes. Expected: see the README.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_segmentation_config()
    config.model = ConfigDict(
        dict(name="dat_pp_nano", deformable_form="auto", dtype="auto", drop_path_rate=0.0, image_size=64)
    )
    config.head = ConfigDict(dict(name="sem_fpn", channels=64, neck_channels=64, dropout=0.0))
    config.data.name = "digits_on_photographs"
    config.data.crop_size = 64
    config.data.long_side = 64
    config.data.short_side = 64
    config.augmentation.min_ratio = 0.8
    config.augmentation.max_ratio = 1.25
    config.augmentation.max_class_ratio = 1.0  # digits cover a fifth of an image
    config.augmentation.flip_probability = 0.0  # digits have a left and a right
    config.augmentation.distort = False  # every digit has a colour of its own
    config.batch_size = 32
    config.steps = 1350
    config.log_every = 50
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.schedule.base_lr = 3e-3
    config.schedule.power = 1.0
    config.schedule.warmup_steps = 50
    config.schedule.warmup_ratio = 0.01
    config.eval.batch_size = 40
    config.eval.every_steps = 225
    return config.lock()
