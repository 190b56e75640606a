"""DAT-B++ on ImageNet-1k at 224, 300 epochs, from scratch: 94 M parameters, 16.6 G multiply-adds.

python -m dat_jax.main --config=configs/dat_pp_b.py --workdir=runs/dat_pp_b --config.data.directory=/data/imagenet

Hardware: any number of devices that divides the batch; published with 64 images per device. If memory is short, set
--config.accumulate_steps. Published: 84.9 % top-1. Not trained with this code yet.
"""

from dat_jax.config import get_classification_config


def get_config():
    config = get_classification_config()
    config.model.update(name="dat_pp_base", drop_path_rate=0.7, remat="blocks", scan_blocks=True, implementation="auto")
    config.data.update(directory="data/imagenet", workers=8, apply_orientation=False)
    return config.lock()
