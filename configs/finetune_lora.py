"""Fine-tuning with low-rank adapters (LoRA): the weights are frozen, and what is learned is a small file.

python -m dat_jax.main --config=configs/finetune_lora.py --workdir=runs/lora --config.data.directory=/data/mine \\
    --config.init_from=weights/dat_pp_t

Data, batch size and length are those of configs/finetune.py; the learning rate and the rank are not tuned. Adapters and head are
in WORKDIR/adapter.safetensors; the run is used like any other, with the adapters added to the weights. Source: 2106.09685.
Hardware: any.
"""

from dat_jax.config import load_config


def get_config():
    config = load_config("finetune").unlock()
    config.lora.rank = 8
    config.schedule.update(base_lr=2e-3, warmup_lr=2e-5, min_lr=2e-5)
    return config.lock()
