"""Mask R-CNN on DAT++, COCO, 12 (1x) or 36 (3x) epochs, 64 images per step, from ImageNet weights.

python -m dat_jax.main --config=configs/mask_rcnn.py:dat_pp_t_1x --workdir=runs/mask_rcnn_dat_pp_t_1x \\
    --config.data.directory=/data/coco --config.init_from=weights/dat_pp_t

--config.init_from takes published weights converted by `python -m dat_jax.conversion`, or the work directory of a run.
Hardware: any number of devices that divides the batch. Not trained with this code yet. Published:

  choice       parameters   box AP   mask AP
  dat_pp_t_1x    44.8 M       48.7     43.7
  dat_pp_t_3x    44.8 M       50.5     45.1
  dat_pp_s_1x    74.4 M       49.8     44.5
  dat_pp_s_3x    74.4 M       51.2     45.7
"""

from dat_jax.config import choose, get_detection_config

CHOICES = {  # model, drop path rate
    "dat_pp_t_1x": ("dat_pp_tiny", 0.0),
    "dat_pp_t_3x": ("dat_pp_tiny", 0.3),
    "dat_pp_s_1x": ("dat_pp_small", 0.1),
    "dat_pp_s_3x": ("dat_pp_small", 0.5),
}


def get_config(choice=""):
    model, drop_path_rate = choose(CHOICES, choice, family="mask_rcnn")
    config = get_detection_config()
    config.model.update(
        name=model, drop_path_rate=drop_path_rate, remat="blocks", scan_blocks=True, implementation="auto"
    )
    backbone, length = choice.rsplit("_", 1)
    config.init_from = f"weights/{backbone}"
    config.data.update(directory="data/coco", workers=8)
    if length == "3x":
        config.epochs = 36
        config.schedule.drops = (27, 33)
    return config.lock()
