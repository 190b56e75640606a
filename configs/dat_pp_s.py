"""DAT-S++ on ImageNet-1k at 224, 300 epochs, from scratch: 53 M parameters, 9.4 G multiply-adds.

python -m dat_jax.main --config=configs/dat_pp_s.py --workdir=runs/dat_pp_s --config.data.directory=/data/imagenet

Hardware: any number of devices that divides the batch; published with 128 images per device. If memory is short, set
--config.accumulate_steps. Published: 84.6 % top-1. Not trained with this code yet.
"""

from dat_jax.config import get_classification_config


def get_config():
    config = get_classification_config()
    config.model.update(
        name="dat_pp_small", drop_path_rate=0.4, remat="blocks", scan_blocks=True, implementation="auto"
    )
    config.data.update(directory="data/imagenet", workers=8, apply_orientation=False)
    return config.lock()
