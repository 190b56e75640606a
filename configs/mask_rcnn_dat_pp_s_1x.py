"""Mask R-CNN on DAT-S++, COCO, 12 epochs, 64 images a step, from ImageNet weights: 74.4 M parameters.

python -m dat_jax.main --config=configs/mask_rcnn_dat_pp_s_1x.py --workdir=runs/mask_rcnn_dat_pp_s_1x \\
    --config.data.directory=/data/coco --config.init_from=weights/dat_pp_s

--config.init_from takes published weights that `python -m dat_jax.conversion` has read, or the work directory of a run.
Hardware: any number of devices that divides the batch. Published: 49.8 box AP, 44.5 mask AP.
Not trained with this code yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_detection_config()
    config.model = ConfigDict(
        dict(
            name="dat_pp_small",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.1,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "weights/dat_pp_s"
    config.data.directory = "data/coco"
    config.data.workers = 8
    config.head = ConfigDict(dict(name="mask_rcnn"))
    return config.lock()
