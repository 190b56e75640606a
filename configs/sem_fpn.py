"""SemanticFPN on DAT++, ADE20K, 40k steps of 32 crops of 512 x 512, from ImageNet weights.

python -m dat_jax.main --config=configs/sem_fpn.py:dat_pp_s --workdir=runs/sem_fpn_dat_pp_s \\
    --config.data.directory=/data/ADEChallengeData2016 --config.init_from=weights/dat_pp_s

--config.init_from takes published weights converted by `python -m dat_jax.conversion`, or the work directory of a run.
Multi-scale test: --mode=eval --config.eval.ratios="(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)" --config.eval.flip=True
Hardware: any number of devices that divides the batch. Not trained with this code yet. Published mIoU:

  choice    parameters   single  multi-scale
  dat_pp_t    27.7 M       48.4   48.8
  dat_pp_s    56.7 M       49.9   50.7
  dat_pp_b    97.2 M       50.4   51.1
"""

from ml_collections import ConfigDict

from dat_jax.config import choose, get_segmentation_config

CHOICES = {  # model, drop path rate
    "dat_pp_t": ("dat_pp_tiny", 0.4),
    "dat_pp_s": ("dat_pp_small", 0.4),
    "dat_pp_b": ("dat_pp_base", 0.7),
}


def get_config(choice=""):
    model, drop_path_rate = choose(CHOICES, choice, family="sem_fpn")
    config = get_segmentation_config()
    config.model.update(
        name=model, drop_path_rate=drop_path_rate, remat="none", scan_blocks=True, implementation="auto"
    )
    config.init_from = f"weights/{choice}"
    config.data.update(directory="data/ADEChallengeData2016", zero_is_ignored=True, workers=8)
    config.head = ConfigDict(dict(name="sem_fpn", channels=128, neck_channels=256, dropout=0.1))
    config.batch_size = 32
    config.steps = 40_000
    config.optimizer.weight_decay = 1e-4
    config.schedule.update(base_lr=2e-4, power=0.9, warmup_steps=0)
    config.eval.every_steps = 4_000
    return config.lock()
