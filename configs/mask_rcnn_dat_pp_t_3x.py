"""Mask R-CNN on DAT-T++, COCO, 36 epochs, 64 images a step, from ImageNet weights: 44.8 M parameters.

python -m dat_jax.main --config=configs/mask_rcnn_dat_pp_t_3x.py --workdir=runs/mask_rcnn_dat_pp_t_3x \\
    --config.data.directory=/data/coco --config.init_from=weights/dat_pp_t

--config.init_from takes published weights that `python -m dat_jax.conversion` has read, or the work directory of a run.
Hardware: any number of devices that divides the batch. Published: 50.5 box AP, 45.1 mask AP.
Not trained with this code yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_detection_config()
    config.model = ConfigDict(
        dict(
            name="dat_pp_tiny",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.3,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "weights/dat_pp_t"
    config.data.directory = "data/coco"
    config.data.workers = 8
    config.head = ConfigDict(dict(name="mask_rcnn"))
    config.epochs = 36
    config.schedule.drops = (27, 33)
    return config.lock()
