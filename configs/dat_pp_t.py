"""DAT-T++ on ImageNet-1k at 224, 300 epochs, from scratch: 24 M parameters, 4.3 G multiply-adds.

python -m dat_jax.main --config=configs/dat_pp_t.py --workdir=runs/dat_pp_t --config.data.directory=/data/imagenet

Hardware: any number of devices that divides the batch; published with 128 images a device. Where memory is short, set
--config.accumulate_steps. Published: 83.9 % top-1. Not trained with this code yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model = ConfigDict(
        dict(
            name="dat_pp_tiny",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.2,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.data.name = "imagenet"
    config.data.directory = "data/imagenet"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.workers = 8
    config.epochs = 300
    config.batch_size = 1024
    config.schedule.base_lr = 5e-4
    config.schedule.warmup_epochs = 20.0
    return config.lock()
