"""DAT-T++ on ImageNet-1k with MESA: after a quarter of the run it also learns from the prediction of its averaged weights.

python -m dat_jax.main --config=configs/pretrain_mesa.py --workdir=runs/mesa --config.data.directory=/data/imagenet

The recipe of configs/dat_pp_t.py with averaged weights. After the first quarter, a forward pass of the averaged model is added to
each step. No result is published for DAT; the method is meant against overfitting in long runs (2205.14083). Not trained with
this code yet.
"""

from dat_jax.config import load_config


def get_config():
    config = load_config("dat_pp_t").unlock()
    config.ema_decay = 0.9999
    config.mesa.update(weight=1.0, start=0.25)
    return config.lock()
