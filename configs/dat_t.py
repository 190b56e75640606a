"""DAT-T (v1, CVPR 2022) on ImageNet-1k at 224, 300 epochs, from scratch: 28 M parameters, 4.6 G multiply-adds.

python -m dat_jax.main --config=configs/dat_t.py --workdir=runs/dat_t --config.data.directory=/data/imagenet

Hardware: any number of devices that divides the batch; published with 128 images per device. If memory is short, set
--config.accumulate_steps. Published: 82.0 % top-1. Not trained with this code yet.
"""

from dat_jax.config import get_classification_config


def get_config():
    config = get_classification_config()
    config.model.update(name="dat_tiny", drop_path_rate=0.2, remat="blocks", scan_blocks=True, implementation="auto")
    config.data.update(directory="data/imagenet", workers=8, apply_orientation=False)
    return config.lock()
