"""What every run sets, with the recipe of the paper (2309.01430, appendix; ImageNet-1k at 224) as defaults.

A config file takes this, replaces what differs and returns it. Every key is visible here; unknown ones are refused.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "classification"
    config.seed = 0
    config.epochs = 300
    config.batch_size = 1024  # over all devices and accumulated steps: examples an optimizer step
    config.accumulate_steps = 1  # the batch is split into so many parts, one after the other
    config.ema_decay = 0.0  # 0: none; else the average of the weights is what is evaluated
    config.log_every = 50  # steps

    # name: dat_jax.list_models(). dtype: auto is bfloat16 on TPU and GPU, float32 on CPU.
    # Any attribute of dat_jax.DAT may be added.
    config.model = ConfigDict(dict(name="dat_pp_tiny", dtype="auto", drop_path_rate=0.2))

    config.data = ConfigDict()
    config.data.name = "mnist5k"
    config.data.image_size = 224
    config.data.max_rotation = 0.0  # degrees
    config.data.max_shift = 0.0  # of the side
    config.data.max_scale = 0.0  # 0.1: sizes from 1 / 1.1 to 1.1
    config.data.workers = 0  # processes that load; 0 loads in threads of this one

    config.loss = ConfigDict(dict(label_smoothing=0.1))

    # AdamW; clip_norm 0 does not clip.
    config.optimizer = ConfigDict(dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, clip_norm=5.0))

    # Linear warm-up, then cosine. Rates are for reference_batch_size and scaled linearly to batch_size.
    config.schedule = ConfigDict()
    config.schedule.base_lr = 5e-4
    config.schedule.warmup_lr = 5e-7
    config.schedule.min_lr = 5e-6
    config.schedule.warmup_epochs = 20.0
    config.schedule.reference_batch_size = 512

    # Devices: the batch is split over both axes, large parameters and their optimizer state over fsdp. -1: the rest.
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))

    config.eval = ConfigDict()
    config.eval.batch_size = 1024
    config.eval.every_epochs = 1  # evaluates and saves
    config.eval.checkpoint = "best"  # what --mode=eval takes: best or latest
    return config
