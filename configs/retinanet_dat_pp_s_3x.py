"""RetinaNet on DAT-S++, COCO, 36 epochs, 64 images a step, from ImageNet weights: 63.3 M parameters.

python -m dat_jax.main --config=configs/retinanet_dat_pp_s_3x.py --workdir=runs/retinanet_dat_pp_s_3x \\
    --config.data.directory=/data/coco --config.init_from=weights/dat_pp_s

--config.init_from takes published weights that `python -m dat_jax.conversion` has read, or the work directory of a run.
Hardware: any number of devices that divides the batch. Published: 50.2 box AP.
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
    config.head = ConfigDict(dict(name="retinanet"))
    config.epochs = 36
    config.schedule.base_lr = 2e-4
    config.schedule.drops = (27, 33)
    return config.lock()
