"""DAT-B++ on ImageNet-1k at 384, 30 epochs from the weights of configs/dat_pp_b.py: 94 M parameters, 49.7 G multiply-adds.

python -m dat_jax.main --config=configs/dat_pp_b_384.py --workdir=runs/dat_pp_b_384 --config.data.directory=/data/imagenet

--config.init_from takes another work directory, or published weights that `python -m dat_jax.conversion` has read.
The position tables keep the size for 224, as published. Hardware: any number of devices that divides the batch; where
memory is short, set --config.accumulate_steps. Published: 85.9 % top-1. Not trained with this code yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model = ConfigDict(
        dict(
            name="dat_pp_base_384",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.6,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "runs/dat_pp_b"
    config.data.name = "imagenet"
    config.data.directory = "data/imagenet"
    config.data.image_size = 384
    config.data.eval_resize = 384
    config.data.workers = 8
    config.epochs = 30
    config.batch_size = 1024
    config.optimizer.weight_decay = 1e-8
    config.schedule.base_lr = 2e-5
    config.schedule.min_lr = 2e-7
    config.schedule.warmup_epochs = 0.0
    return config.lock()
