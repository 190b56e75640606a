"""UperNet on DAT-B++, ADE20K, 160k steps of 16 crops of 512 x 512, from ImageNet weights: 127.2 M parameters.

python -m dat_jax.main --config=configs/upernet_dat_pp_b.py --workdir=runs/upernet_dat_pp_b \\
    --config.data.directory=/data/ADEChallengeData2016 --config.init_from=weights/dat_pp_b

--config.init_from takes published weights that `python -m dat_jax.conversion` has read, or the work directory of a run.
Multi-scale test: --mode=eval --config.eval.ratios="(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)" --config.eval.flip=True
Hardware: any number of devices that divides the batch. Published: 51.0 mIoU, 51.5 with that test.
Not trained with this code yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_segmentation_config()
    config.model = ConfigDict(
        dict(
            name="dat_pp_base",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.7,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "weights/dat_pp_b"
    config.data.name = "ade20k"
    config.data.directory = "data/ADEChallengeData2016"
    config.data.zero_is_ignored = True
    config.data.workers = 8
    config.head = ConfigDict(dict(name="upernet", channels=512, auxiliary_channels=256, dropout=0.1))
    config.loss.auxiliary_weight = 0.4
    config.batch_size = 16
    config.steps = 160_000
    config.optimizer.weight_decay = 0.01
    config.schedule.base_lr = 6e-5
    config.schedule.power = 1.0
    config.schedule.warmup_steps = 1500
    config.eval.every_steps = 16_000
    return config.lock()
