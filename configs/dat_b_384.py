"""DAT-B (v1, CVPR 2022) on ImageNet-1k at 384, 30 epochs from the weights of configs/dat_b.py: 88 M parameters.

python -m dat_jax.main --config=configs/dat_b_384.py --workdir=runs/dat_b_384 --config.data.directory=/data/imagenet

Windows are 12 pixels wide and position tables are made for 384; those of the 224 weights are resized bicubically.
--config.init_from takes another work directory, or published weights that `python -m dat_jax.conversion` has converted.
Hardware: any number of devices that divides the batch; published with 24 images per device. If memory is short, set
--config.accumulate_steps. Published: 84.8 % top-1. Not trained with this code yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model = ConfigDict(
        dict(
            name="dat_base_384",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.5,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "runs/dat_b"
    config.data.name = "imagenet"
    config.data.directory = "data/imagenet"
    config.data.image_size = 384
    config.data.eval_resize = 438  # the release crops at 384 as at 224, unlike DAT++
    config.data.workers = 8
    config.epochs = 30
    config.batch_size = 1024
    config.optimizer.weight_decay = 1e-8
    config.schedule.base_lr = 2e-6
    config.schedule.min_lr = 1e-7
    config.schedule.warmup_epochs = 0.0
    return config.lock()
