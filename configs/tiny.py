"""The smallest run, four steps of a network of two blocks on the embedded digits: shows that everything works, learns nothing.

python -m dat_jax.main --config=configs/tiny.py --workdir=runs/tiny

Hardware: any, seconds. Expected: about 10 % top-1, as by chance.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config().unlock()
    config.model = ConfigDict(
        dict(
            name="dat_pp_nano",
            deformable_form="auto",
            dtype="auto",
            drop_path_rate=0.05,
            image_size=32,
            dim_stem=16,
            dims=(16, 32),
            stages=("D", "D"),
            num_heads=(1, 2),
            num_groups=(1, 2),
            key_strides=(1, 1),
            offset_kernels=(5, 3),
            offset_range_factors=(-1, -1),
            position_bias=("table", "table"),
            use_offsets=(True, True),
            window_sizes=(7, 7),
            neighborhood_sizes=(7, 7),
            reduction_ratios=(1, 1),
            lpu=(True, True),
            conv_mlp=(True, True),
            layer_scale_init=(-1, -1),
        )
    )
    config.data.image_size = 32
    config.data.eval_resize = 32
    config.steps = 4
    config.batch_size = 16
    config.log_every = 2
    config.eval.every_steps = 4
    config.schedule.warmup_epochs = 0.01
    return config.lock()
