"""A small DAT++ on 5,000 MNIST digits that come with a package: nothing is downloaded.

python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores, 2 to 5 minutes. Expected: 97.5 % top-1 on the 1,000 held-out digits.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model = ConfigDict(dict(name="dat_pp_nano", dtype="auto", drop_path_rate=0.05))
    config.data.name = "mnist5k"
    config.data.image_size = 48
    config.data.max_rotation = 10.0
    config.data.max_shift = 0.08
    config.data.max_scale = 0.15
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
