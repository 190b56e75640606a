"""DAT-T++ on ImageNet-1k with Muon instead of AdamW.

python -m dat_jax.main --config=configs/pretrain_muon.py --workdir=runs/muon --config.data.directory=/data/imagenet

The recipe of configs/dat_pp_t.py. Muon updates the linear layers, AdamW all other parameters; updates are scaled so that the
learning rate and the weight decay of AdamW apply (2502.16982, for language models). No result is published for DAT, and nothing
was tuned. Not trained with this code yet.
"""

from dat_jax.config import load_config


def get_config():
    config = load_config("dat_pp_t").unlock()
    config.optimizer.name = "muon"
    return config.lock()
