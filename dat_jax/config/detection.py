"""Keys of detection, with the recipe of Mask R-CNN on COCO for 12 epochs as defaults."""

from ml_collections import ConfigDict

from dat_jax.config import common
from dat_jax.config.keys import Key, OpenGroup, make_config, merge_keys, replace_defaults
from dat_jax.errors import UserError

_COMMON = replace_defaults(
    common.KEYS,
    {
        "epochs": 12,
        "batch_size": 64,
        "data.name": "coco",
        "optimizer.decay_rule": "all_but_norms_and_bn",
        "optimizer.clip_norm": 0.0,
        "eval.batch_size": 8,  # images of one bucket at a time
    },
)
KEYS = merge_keys(
    _COMMON,
    {
        "task": Key(str, "detection", "Task of the run.", choices=("detection",)),
        "head": OpenGroup(
            {"name": Key(str, "mask_rcnn", "retinanet, mask_rcnn or cascade_mask_rcnn.")},
            required=("name",),
            help="Name and attributes of the detector. Any attribute of dat_jax.RetinaNet or dat_jax.RCNN can be added.",
        ),
        "data": {
            "directory": Key(
                str,
                "",
                "Directory with the layout of COCO: train2017/, val2017/, annotations/instances_train2017.json and "
                "annotations/instances_val2017.json. Empty: embedded data.",
            ),
            "long_side": Key(
                int,
                1333,
                "Training images are resized, with their aspect ratio, to fit `long_side` and a random one of `short_sides`, "
                "in pixels.",
                minimum=1,
            ),
            "short_sides": Key(
                tuple,
                (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
                "See `long_side`.",
                items=int,
                above=0,
                can_be_empty=False,
            ),
            "test_long_side": Key(int, 1333, "As `long_side`, for evaluation.", minimum=1),
            "test_short_side": Key(int, 800, "Shorter side for evaluation.", minimum=1),
            "max_boxes": Key(int, 100, "Objects per training image; of more, a random selection is used.", minimum=1),
            "buckets": Key(
                str,
                "",
                "Shapes that training images are padded to, height x width in multiples of 32, such as '608x832,832x608'. "
                "Each is compiled separately. Empty: those of dat_jax/data/detection_transforms.py.",
            ),
        },
        "augmentation": {
            "flip_probability": Key(float, 0.5, "Probability of a horizontal flip.", minimum=0, maximum=1),
            "crop_probability": Key(
                float,
                0.5,
                "Probability of a random crop. The image is resized to one of `first_short_sides`, cropped, and the crop is "
                "resized as whole images are.",
                minimum=0,
                maximum=1,
            ),
            "first_short_sides": Key(
                tuple,
                (400, 500, 600),
                "Shorter sides of an image before it is cropped, in pixels.",
                items=int,
                above=0,
                can_be_empty=False,
            ),
            "crop_min": Key(int, 384, "Smallest side of a crop, in pixels.", minimum=1),
            "crop_max": Key(int, 600, "Largest side of a crop, in pixels.", minimum=1),
        },
        # RetinaNet trains on all anchors and has no proposals: it uses test_candidates only.
        "sampling": {
            "rpn_samples": Key(int, 256, "Anchors per image in the RPN loss, at most half positive.", minimum=1),
            "roi_samples": Key(
                int, 512, "Proposals per image in the head loss, at most a quarter positive.", minimum=1
            ),
            "train_candidates": Key(int, 2000, "Best-scored candidates per level before NMS, in training.", minimum=1),
            "train_proposals": Key(
                int, 1000, "Proposals per image after NMS, over all levels, in training.", minimum=1
            ),
            "test_candidates": Key(int, 1000, "Best-scored candidates per level before NMS, in evaluation.", minimum=1),
            "test_proposals": Key(
                int, 1000, "Proposals per image after NMS, over all levels, in evaluation.", minimum=1
            ),
        },
        "schedule": common.make_schedule_keys("step"),
        "eval": {
            "score_threshold": Key(float, 0.05, "Detections with a lower score are dropped.", minimum=0, maximum=1),
            "iou_threshold": Key(
                float,
                0.5,
                "NMS: a box is dropped if its IoU with a better one of its class is larger.",
                minimum=0,
                maximum=1,
            ),
            "max_detections": Key(int, 100, "Detections per image.", minimum=1),
            "buckets": common.EVAL_BUCKETS,
            "multiple": Key(
                int,
                32,
                "Pad image sides to a multiple of this. It is part of the published function: another multiple changes results.",
                minimum=1,
            ),
        },
    },
)


def get_detection_config() -> ConfigDict:
    """The default configuration of a detector, unlocked."""
    return make_config(KEYS)


def check(config: ConfigDict) -> None:
    """Raises UserError for values that do not fit each other."""
    common.check_rgb(config)
    data, augmentation = config.data, config.augmentation
    pairs = (
        ("data.long_side", data.long_side, "the largest of short_sides", max(data.short_sides)),
        ("data.test_long_side", data.test_long_side, "test_short_side", data.test_short_side),
        ("augmentation.crop_max", augmentation.crop_max, "crop_min", augmentation.crop_min),
    )
    for path, value, name, least in pairs:
        if value < least:
            raise UserError(f"config.{path} must be at least {name} {least}, got {value}.")
