"""DAT-T++ on ImageNet-1k that also learns from a trained DAT-B++.

python -m dat_jax.main --config=configs/distill.py --workdir=runs/distill --config.data.directory=/data/imagenet \\
    --config.distillation.teacher=weights/dat_pp_b

The recipe of configs/dat_pp_t.py, with half of the loss from the probabilities of the teacher, which sees the same augmented and
mixed images. The forward pass of the teacher is added to each step. No result is published for DAT. For comparison: DeiT-S gains
1.4 % (79.8 to 81.2 % top-1) from the classes that a RegNetY-16GF predicts (2012.12877). Not trained with this code yet.
"""

from dat_jax.config import load_config


def get_config():
    config = load_config("dat_pp_t").unlock()
    config.distillation.update(teacher="weights/dat_pp_b", kind="soft", weight=0.5, temperature=1.0)
    return config.lock()
