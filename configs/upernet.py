"""UperNet on DAT++, ADE20K, 160k steps of 16 crops of 512 x 512, from ImageNet weights.

python -m dat_jax.main --config=configs/upernet.py:dat_pp_s --workdir=runs/upernet_dat_pp_s \\
    --config.data.directory=/data/ADEChallengeData2016 --config.init_from=weights/dat_pp_s

--config.init_from takes published weights converted by `python -m dat_jax.conversion`, or the work directory of a run.
Multi-scale test: --mode=eval --config.eval.ratios="(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)" --config.eval.flip=True
Hardware: any number of devices that divides the batch. Not trained with this code yet. Published mIoU:

  choice    parameters   single  multi-scale
  dat_pp_t    53.8 M       49.4   50.3
  dat_pp_s    84.8 M       50.5   51.2
  dat_pp_b   127.2 M       51.0   51.5
"""

from dat_jax.config import choose, get_segmentation_config

CHOICES = {  # model, drop path rate
    "dat_pp_t": ("dat_pp_tiny", 0.3),
    "dat_pp_s": ("dat_pp_small", 0.5),
    "dat_pp_b": ("dat_pp_base", 0.7),
}


def get_config(choice=""):
    model, drop_path_rate = choose(CHOICES, choice, family="upernet")
    config = get_segmentation_config()
    config.model.update(
        name=model, drop_path_rate=drop_path_rate, remat="blocks", scan_blocks=True, implementation="auto"
    )
    config.init_from = f"weights/{choice}"
    config.data.update(directory="data/ADEChallengeData2016", zero_is_ignored=True, workers=8)
    return config.lock()
