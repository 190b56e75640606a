"""A small DAT++ on 5,000 MNIST digits that come with a package: nothing is downloaded.

python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores, 2 to 5 minutes. Expected: 97.7 % top-1 on the 1,000 held-out digits.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model = ConfigDict(dict(name="dat_pp_nano", deformable_form="auto", dtype="auto", drop_path_rate=0.05))
    config.data.name = "mnist5k"
    config.data.image_size = 48
    config.data.eval_resize = 48
    config.augmentation.min_crop_area = 0.75
    config.augmentation.max_crop_aspect = 1.2
    config.augmentation.flip_probability = 0.0  # digits have a left and a right
    config.augmentation.rand_augment_count = 1
    config.augmentation.rand_augment_magnitude = 3.0
    config.augmentation.rand_augment_std = 1.0
    config.augmentation.erasing_probability = 0.0
    config.augmentation.mixup_alpha = 0.0
    config.augmentation.cutmix_alpha = 0.0
    config.epochs = 6
    config.batch_size = 64
    config.log_every = 10
    config.schedule.base_lr = 2e-3
    config.schedule.warmup_lr = 1e-5
    config.schedule.min_lr = 1e-5
    config.schedule.warmup_epochs = 1.0
    config.schedule.reference_batch_size = 64
    config.eval.batch_size = 200
    return config.lock()
