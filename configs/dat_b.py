"""DAT-B (v1, CVPR 2022) on ImageNet-1k at 224, 300 epochs, from scratch: 88 M parameters, 15.8 G multiply-adds.

python -m dat_jax.main --config=configs/dat_b.py --workdir=runs/dat_b --config.data.directory=/data/imagenet

Hardware: any number of devices that divides the batch; published with 128 images per device. If memory is short, set
--config.accumulate_steps. Published: 84.0 % top-1. Not trained with this code yet.
"""

from dat_jax.config import get_classification_config


def get_config():
    config = get_classification_config()
    config.model.update(name="dat_base", drop_path_rate=0.5, remat="blocks", scan_blocks=True, implementation="auto")
    config.data.update(directory="data/imagenet", workers=8, apply_orientation=False)
    config.optimizer.clip_norm = 1.0
    config.schedule.update(base_lr=4e-4, warmup_epochs=50.0)
    return config.lock()
