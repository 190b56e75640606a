"""SemanticFPN on DAT-T++, ADE20K, 40k steps of 32 crops of 512 x 512, from ImageNet weights: 27.7 M parameters.

python -m dat_jax.main --config=configs/sem_fpn_dat_pp_t.py --workdir=runs/sem_fpn_dat_pp_t \\
    --config.data.directory=/data/ADEChallengeData2016 --config.init_from=weights/dat_pp_t

--config.init_from takes published weights that `python -m dat_jax.conversion` has read, or the work directory of a run.
Multi-scale test: --mode=eval --config.eval.ratios="(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)" --config.eval.flip=True
Hardware: any number of devices that divides the batch. Published: 48.4 mIoU, 48.8 with that test.
Not trained with this code yet.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_segmentation_config()
    config.model = ConfigDict(
        dict(
            name="dat_pp_tiny",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.4,
            remat="none",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "weights/dat_pp_t"
    config.data.name = "ade20k"
    config.data.directory = "data/ADEChallengeData2016"
    config.data.zero_is_ignored = True
    config.data.workers = 8
    config.head = ConfigDict(dict(name="sem_fpn", channels=128, neck_channels=256, dropout=0.1))
    config.batch_size = 32
    config.steps = 40_000
    config.optimizer.weight_decay = 1e-4
    config.schedule.base_lr = 2e-4
    config.schedule.power = 0.9
    config.schedule.warmup_steps = 0
    config.eval.every_steps = 4_000
    return config.lock()
