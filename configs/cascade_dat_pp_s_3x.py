"""Cascade Mask R-CNN on DAT-S++, COCO, 36 epochs, 64 images a step, from ImageNet weights: 110.5 M parameters.

python -m dat_jax.main --config=configs/cascade_dat_pp_s_3x.py --workdir=runs/cascade_dat_pp_s_3x \\
    --config.data.directory=/data/coco --config.init_from=weights/dat_pp_s

--config.init_from takes published weights that `python -m dat_jax.conversion` has read, or the work directory of a run.
Hardware: any number of devices that divides the batch. Published: 54.2 box AP, 46.9 mask AP.
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
            drop_path_rate=0.5,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "weights/dat_pp_s"
    config.data.directory = "data/coco"
    config.data.workers = 8
    config.head = ConfigDict(dict(name="cascade_mask_rcnn"))
    config.sampling.train_proposals = 2000
    config.epochs = 36
    config.schedule.drops = (27, 33)
    return config.lock()
