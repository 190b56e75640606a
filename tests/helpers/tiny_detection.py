"""A detector that compiles and trains in seconds."""

import jax
import numpy as np
from ml_collections import ConfigDict

from dat_jax.config import get_detection_config
from dat_jax.data.coco import DigitsSource
from dat_jax.models.registry import create_detector
from tests.helpers.random_variables import random_variables
from tests.helpers.tiny_segmentation import BACKBONE

DETECTORS = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")
_SCALES = {
    "rpn_reg": 0.01,
    "fc_reg": 0.003,
    "retina_reg": 3e-4,
    "retina_cls": 3e-4,
    "fc_cls": 0.02,
}  # of random weights
CLASS_NAMES = DigitsSource("train").class_names


def head_settings(name: str) -> dict:
    """Attributes of the head that make a detector small."""
    return dict(features=8) if name == "retinanet" else dict(features=8, width=16)


def get_config(head: str = "mask_rcnn"):
    """Return a configuration for eight steps of eight images of 64 x 64, evaluated twice."""
    config = get_detection_config()
    config.model = ConfigDict(dict(name="dat_pp_nano", dtype="float32", drop_path_rate=0.1, **BACKBONE))
    config.head = ConfigDict(dict(name=head, **head_settings(head)))
    config.data.name = "digits_on_photographs"
    config.data.short_sides = (64,)
    config.data.long_side = 64
    config.data.test_short_side = 64
    config.data.test_long_side = 64
    config.data.buckets = "64x64"
    config.data.max_boxes = 2
    config.augmentation.flip_probability = 0.0  # digits have a left and a right
    config.augmentation.crop_probability = 0.0
    config.sampling.rpn_samples = 64
    config.sampling.roi_samples = 16
    config.sampling.train_candidates = 50
    config.sampling.train_proposals = 30
    config.sampling.test_candidates = 50
    config.sampling.test_proposals = 20
    config.batch_size = 8
    config.steps = 8
    config.log_every = 2
    config.schedule = ConfigDict(dict(kind="poly", base_lr=3e-3, power=0.0, warmup_steps=2, warmup_ratio=0.01))
    config.eval.batch_size = 40
    config.eval.every_steps = 4
    config.eval.score_threshold = 0.001  # so that there are detections from the first step on
    config.eval.max_detections = 5
    config.mesh.data, config.mesh.fsdp = -1, 4  # what is split is gathered, also for pictures and evaluations
    return config.lock()


def random_detector(head: str = "mask_rcnn", *, num_classes: int = 3, seed: int = 0, **settings):
    """Make a model and random variables that detect boxes of several places, sizes and classes.

    ``settings`` are attributes of the backbone.
    """
    backbone = {"name": "dat_pp_nano", **BACKBONE, **settings}
    model = create_detector(head, backbone=backbone, num_classes=num_classes, **head_settings(head))

    def adjust(path, leaf):
        names = jax.tree_util.keystr(path)
        if names.endswith("['var']"):
            return abs(leaf) + 0.5
        small = next((scale for part, scale in _SCALES.items() if f"{part}']" in names), 1.0)
        return (small * leaf).astype(leaf.dtype)

    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32), seed=seed, scale=0.4)
    return model, jax.tree_util.tree_map_with_path(adjust, variables)
