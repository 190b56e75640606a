"""Cascade Mask R-CNN on DAT++, COCO, 12 (1x) or 36 (3x) epochs, 64 images per step, from ImageNet weights.

python -m dat_jax.main --config=configs/cascade_mask_rcnn.py:dat_pp_t_1x --workdir=runs/cascade_mask_rcnn_dat_pp_t_1x \\
    --config.data.directory=/data/coco --config.init_from=weights/dat_pp_t

--config.init_from takes published weights converted by `python -m dat_jax.conversion`, or the work directory of a run.
Hardware: any number of devices that divides the batch. Not trained with this code yet. Published:

  choice       parameters   box AP   mask AP
  dat_pp_t_1x    81.4 M       52.2     45.0
  dat_pp_t_3x    81.4 M       53.0     46.0
  dat_pp_s_3x   110.5 M       54.2     46.9
  dat_pp_b_3x   150.9 M       54.5     47.0
"""

from dat_jax.config import choose, get_detection_config

CHOICES = {  # model, drop path rate
    "dat_pp_t_1x": ("dat_pp_tiny", 0.0),
    "dat_pp_t_3x": ("dat_pp_tiny", 0.1),
    "dat_pp_s_3x": ("dat_pp_small", 0.5),
    "dat_pp_b_3x": ("dat_pp_base", 0.8),
}


def get_config(choice=""):
    model, drop_path_rate = choose(CHOICES, choice, family="cascade_mask_rcnn")
    config = get_detection_config()
    config.model.update(
        name=model, drop_path_rate=drop_path_rate, remat="blocks", scan_blocks=True, implementation="auto"
    )
    backbone, length = choice.rsplit("_", 1)
    config.init_from = f"weights/{backbone}"
    config.data.update(directory="data/coco", workers=8)
    config.head.name = "cascade_mask_rcnn"
    config.sampling.train_proposals = 2000
    if length == "3x":
        config.epochs = 36
        config.schedule.drops = (27, 33)
    return config.lock()
