"""A segmentor that compiles and trains in seconds."""

import jax
import numpy as np
from ml_collections import ConfigDict

from dat_jax.config import get_segmentation_config
from dat_jax.data import segmentation_sources
from dat_jax.data.segmentation_sources import SegmentationArraySource
from dat_jax.models.registry import create_segmentor
from tests.helpers.random_variables import random_variables

BACKBONE = dict(
    image_size=64,
    dim_stem=8,
    dims=(8, 8, 16, 16),
    stages=("X", "X", "X", "D"),  # convolutions compile fastest
    window_sizes=(3, 3, 3, 3),
    num_heads=(1, 1, 2, 2),
    num_groups=(1, 1, 1, 1),
    key_strides=(8, 4, 2, 1),
    offset_kernels=(3, 3, 3, 3),
    neighborhood_sizes=(3, 3, 3, 3),
)
CLASS_NAMES = ("ground", "square")


def _load_squares(split: str) -> SegmentationArraySource:
    """Return images of noise with a bright square: 48 to train, 21 of three sizes to validate."""
    rng = np.random.default_rng(int(split == "validation"))
    sizes = [(64, 64)] * 48 if split == "train" else [(64, 64), (48, 72), (64, 80)] * 7
    images = [rng.integers(0, 100, (height, width, 3), dtype=np.uint8) for height, width in sizes]
    labels = [np.zeros(size, np.uint8) for size in sizes]
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(0, np.array(label.shape) - 32)
        image[top : top + 32, left : left + 32] += 120
        label[top : top + 32, left : left + 32] = 1
        label[:2] = 255
    return SegmentationArraySource(images, labels, CLASS_NAMES)


segmentation_sources._SOURCES["squares"] = _load_squares


def get_config(head: str = "sem_fpn"):
    """Return a configuration for twelve steps of eight images of 64 x 64."""
    config = get_segmentation_config()
    config.model = ConfigDict(dict(name="dat_pp_nano", dtype="float32", drop_path_rate=0.1, **BACKBONE))
    width = dict(neck_channels=16) if head == "sem_fpn" else dict(auxiliary_channels=8)
    config.head = ConfigDict(dict(name=head, channels=16, dropout=0.1, **width))
    config.data.name = "squares"
    config.data.crop_size = 64
    config.data.long_side = config.data.short_side = 64
    config.batch_size = 8
    config.steps = 12
    config.log_every = 4
    config.schedule.base_lr = 3e-3
    config.schedule.power = 0.0  # the rate does not depend on the length of the run
    config.schedule.warmup_steps = 2
    config.eval.batch_size = 8
    config.eval.every_steps = 6
    config.eval.buckets = "64x80"  # of all validation images
    config.mesh.data, config.mesh.fsdp = -1, 4  # what is split is gathered, also for pictures and evaluations
    return config.lock()


def random_segmentor(**settings):
    """Make a model and random variables whose predicted classes differ between places."""
    options = {"num_classes": 5, "channels": 16, "neck_channels": 16, **settings}
    backbone = {"name": "dat_pp_nano", **BACKBONE, **({"dtype": options["dtype"]} if "dtype" in options else {})}
    model = create_segmentor("sem_fpn", backbone=backbone, **options)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32), scale=0.4)
    positive = lambda path, leaf: abs(leaf) + 0.5 if path[-1].key == "var" else leaf  # noqa: E731
    statistics = jax.tree_util.tree_map_with_path(positive, variables["batch_stats"])
    return model, {"params": variables["params"], "batch_stats": statistics}
