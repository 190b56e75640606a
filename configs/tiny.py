"""Four steps of a network of two blocks on the embedded digits, to check that everything runs; learns nothing.

python -m dat_jax.main --config=configs/tiny.py --workdir=runs/tiny

Hardware: any, seconds. Expected: about 10 % top-1, which is chance.
"""

from dat_jax.config import load_config


def get_config():
    config = load_config("quickstart").unlock()
    config.model.update(
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
    config.data.update(image_size=32, eval_resize=32)
    config.steps = 4
    config.batch_size = 16
    config.log_every = 2
    config.eval.every_steps = 4
    config.schedule.warmup_epochs = 0.01
    return config.lock()
