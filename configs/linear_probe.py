"""Only the head learns: how good are the features of trained weights for your classes?

python -m dat_jax.main --config=configs/linear_probe.py --workdir=runs/probe --config.data.directory=/data/mine \\
    --config.init_from=weights/dat_pp_t

Data, batch size and length are those of configs/finetune.py. Without weight decay, stochastic depth and label smoothing, as is
usual for linear probes; the learning rate is not tuned. Frozen weights have no gradient and no optimizer state. A run of
configs/finetune.py can start from the result, see docs/finetune.md. Hardware: any.
"""

from dat_jax.config import load_config


def get_config():
    config = load_config("finetune").unlock()
    config.model.drop_path_rate = 0.0
    config.loss.label_smoothing = 0.0
    config.optimizer.update(freeze=("all_but_head",), weight_decay=0.0)
    config.schedule.update(base_lr=5e-3, warmup_lr=5e-5, min_lr=5e-5)
    return config.lock()
