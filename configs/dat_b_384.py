"""DAT-B (v1, CVPR 2022) on ImageNet-1k at 384, 30 epochs from the weights of dat_b: 88 M parameters, 49.8 G multiply-adds.

python -m dat_jax.main --config=configs/dat_b_384.py --workdir=runs/dat_b_384 --config.data.directory=/data/imagenet

Windows are 12 pixels wide and position tables are made for 384; those of the 224 weights are resized bicubically.
--config.init_from takes published weights converted by `python -m dat_jax.conversion`, or the work directory of a run.
Hardware: any number of devices that divides the batch; published with 24 images per device. If memory is short, set
--config.accumulate_steps. Published: 84.8 % top-1. Not trained with this code yet.
"""

from dat_jax.config import get_classification_config


def get_config():
    config = get_classification_config()
    config.model.update(
        name="dat_base_384", drop_path_rate=0.5, remat="blocks", scan_blocks=True, implementation="auto"
    )
    config.init_from = "runs/dat_b"
    config.data.update(directory="data/imagenet", workers=8, apply_orientation=False, image_size=384)
    config.data.eval_resize = 438  # the release crops at 384 as at 224, unlike DAT++
    config.epochs = 30
    config.optimizer.weight_decay = 1e-8
    config.schedule.update(base_lr=2e-6, min_lr=1e-7, warmup_epochs=0.0)
    return config.lock()
