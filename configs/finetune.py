"""A trained model on one's own images: folders train/<class> and val/<class>, any number of classes.

python -m dat_jax.main --config=configs/finetune.py --workdir=runs/mine --config.data.directory=/data/mine \\
    --config.init_from=weights/dat_pp_t

--config.init_from takes published weights that `python -m dat_jax.conversion` has read, or the work directory of a run;
the head is made anew where the number of classes differs. For another model set --config.model.name to the one of the
weights. Hardware: any. The rates are a quarter of the recipe's, a tenth of its length; not tuned to any data.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.model = ConfigDict(
        dict(
            name="dat_pp_tiny",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.2,
            remat="blocks",
            scan_blocks=True,
            implementation="auto",
        )
    )
    config.init_from = "weights/dat_pp_t"
    config.data.name = "folders"
    config.data.directory = "data/mine"
    config.data.workers = 2
    config.epochs = 30
    config.batch_size = 128
    config.schedule.base_lr = 1.25e-4
    config.schedule.min_lr = 1.25e-6
    config.schedule.warmup_lr = 1.25e-6
    config.schedule.warmup_epochs = 2.0
    config.eval.batch_size = 256
    return config.lock()
