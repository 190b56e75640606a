"""DAT-B++ on ImageNet-1k at 384, 30 epochs from the weights of dat_pp_b: 94 M parameters, 49.7 G multiply-adds.

python -m dat_jax.main --config=configs/dat_pp_b_384.py --workdir=runs/dat_pp_b_384 --config.data.directory=/data/imagenet

--config.init_from takes published weights converted by `python -m dat_jax.conversion`, or the work directory of a run.
Position tables keep their size for 224, as published. Hardware: any number of devices that divides the batch. If memory is
short, set --config.accumulate_steps. Published: 85.9 % top-1. Not trained with this code yet.
"""

from dat_jax.config import get_classification_config


def get_config():
    config = get_classification_config()
    config.model.update(
        name="dat_pp_base_384", drop_path_rate=0.6, remat="blocks", scan_blocks=True, implementation="auto"
    )
    config.init_from = "runs/dat_pp_b"
    config.data.update(directory="data/imagenet", workers=8, apply_orientation=False, image_size=384, eval_resize=384)
    config.epochs = 30
    config.optimizer.weight_decay = 1e-8
    config.schedule.update(base_lr=2e-5, min_lr=2e-7, warmup_epochs=0.0)
    return config.lock()
