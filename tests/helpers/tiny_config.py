"""A configuration and a data set that compile and train in seconds."""

import numpy as np

from configs import quickstart
from dat_jax.data import sources


def _load_halves(split: str) -> sources.ArraySource:
    """Return images of noise that is brighter in the left or in the right half: 160 to train, 50 to validate."""
    rng = np.random.default_rng(sources.SPLITS.index(split))
    labels = rng.integers(0, 2, 160 if split == "train" else 50)
    images = rng.integers(0, 100, (len(labels), 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 16 * label :][:, :16] += 120
    return sources.ArraySource(images, labels.astype(np.int32), ("left", "right"))


sources._SOURCES["halves"] = _load_halves


# Attributes of a model with one stage of an N and a D block.
ONE_STAGE = dict(
    image_size=32,
    dim_stem=16,
    dims=(16,),
    stages=("ND",),
    num_heads=(2,),
    num_groups=(1,),
    key_strides=(2,),
    offset_kernels=(3,),
    offset_range_factors=(-1,),
    position_bias=("table",),
    use_offsets=(True,),
    window_sizes=(7,),
    neighborhood_sizes=(3,),
    reduction_ratios=(1,),
    lpu=(True,),
    conv_mlp=(True,),
    layer_scale_init=(-1,),
)


def get_config(**model):
    """Return a configuration of a model with an N and a D block, for images of 32 x 32 and 10 steps per epoch."""
    config = quickstart.get_config().unlock()
    config.model = {
        **dict(
            name="dat_pp_nano",
            deformable_form="auto",
            dtype="float32",
            drop_path_rate=0.1,
        ),
        **ONE_STAGE,
        **model,
    }
    config.data.image_size = 32
    config.data.name = "halves"
    config.data.eval_resize = 32
    config.augmentation.min_crop_area = 1.0
    config.augmentation.max_crop_aspect = 1.0
    config.batch_size = 16
    config.epochs = 2
    config.log_every = 5
    config.schedule.base_lr = 3e-3
    config.schedule.reference_batch_size = 16
    config.schedule.warmup_epochs = 0.5
    config.eval.batch_size = 32  # the last of two batches is not full
    config.mesh.data = -1
    return config.lock()
