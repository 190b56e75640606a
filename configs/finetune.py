"""A trained classifier fine-tuned on your images: folders train/<class> and val/<class>, any number of classes.

python -m dat_jax.main --config=configs/finetune.py --workdir=runs/mine --config.data.directory=/data/mine \\
    --config.init_from=weights/dat_pp_t

--config.init_from takes published weights converted by `python -m dat_jax.conversion`, or the work directory of a run. The
classification head is initialized randomly if the classes differ in number or in their recorded names. For another model,
set --config.model.name to the one of the weights. Hardware: any. The batch size, the length, the warm-up and the learning rate
follow from the number of training images (-1). The image size, and the channels and their mean and standard deviation follow
from the weights (-1, auto and empty). None of them is tuned to any data set.
"""

from dat_jax.config import get_classification_config


def get_config():
    config = get_classification_config()
    config.model.update(name="dat_pp_tiny", drop_path_rate=0.2, remat="blocks", scan_blocks=True, implementation="auto")
    config.init_from = "weights/dat_pp_t"
    config.data.update(name="folders", directory="data/mine", workers=2, image_size=-1, eval_resize=-1)
    config.data.update(channels=-1, dtype="auto", mean=(), std=())
    # Crops and mirror images only: the other augmentations of training from scratch need more steps than fine-tuning has.
    config.augmentation.update(min_crop_area=0.25, rand_augment_count=0, erasing_probability=0.0)
    config.augmentation.update(mixup_alpha=0.0, cutmix_alpha=0.0)
    config.epochs = -1
    config.batch_size = -1
    config.schedule.update(base_lr=-1.0, warmup_lr=-1.0, min_lr=-1.0, warmup_epochs=-1.0, reference_batch_size=-1)
    config.eval.update(batch_size=256, every=-1)
    return config.lock()
