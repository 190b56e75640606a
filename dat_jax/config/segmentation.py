"""Keys of segmentation, with the recipe of UperNet on ADE20K as defaults."""

from ml_collections import ConfigDict

from dat_jax.config import common
from dat_jax.config.keys import Key, OpenGroup, make_config, merge_keys, replace_defaults
from dat_jax.errors import UserError

_COMMON = replace_defaults(
    common.KEYS,
    {
        "batch_size": 16,
        "steps": 160_000,
        "data.name": "ade20k",
        "optimizer.weight_decay": 0.01,
        "optimizer.decay_rule": "all_but_norms",
        "optimizer.clip_norm": 0.0,
        "eval.batch_size": 8,  # images of one bucket at a time
        "eval.every_steps": 16_000,
    },
)
KEYS = merge_keys(
    _COMMON,
    {
        "task": Key(str, "segmentation", "Task of the run.", choices=("segmentation",)),
        "head": OpenGroup(
            {
                "name": Key(str, "upernet", "upernet or sem_fpn."),
                "channels": Key(int, 512, "Channels of the head.", minimum=1),
                "auxiliary_channels": Key(int, 256, "Channels of the auxiliary head of UperNet; 0: none.", minimum=0),
                "dropout": Key(float, 0.1, "Dropout rate before the classifier.", minimum=0, maximum=1),
            },
            required=("name",),
            help="Name and attributes of the head. Any attribute of dat_jax.Segmentor can be added.",
        ),
        "data": {
            "directory": Key(
                str,
                "",
                "Directory with images/ and annotations/, each with training/ and validation/ (as ADEChallengeData2016) or "
                "train/ and val/; labels are PNG files named as the images. classes.txt is required unless the data are "
                "ADE20K. Empty: embedded data.",
            ),
            "zero_is_ignored": Key(
                bool,
                False,
                "Label 0 is ignored and label k is class k - 1, as in ADE20K; otherwise label k is class k.",
            ),
            "label_values": Key(
                tuple,
                (),
                "Value of each class in label files, such as 0,255 for two classes. Empty: label k is class k, or k - 1 with "
                "`zero_is_ignored`. 255 marks pixels without a class unless it is listed here.",
                items=int,
                can_be_empty=True,
            ),
            "crop_size": Key(int, 512, "Side of the square training crops, in pixels.", minimum=1),
            "long_side": Key(
                int,
                2048,
                "Images are resized, with their aspect ratio, to fit `long_side` and `short_side`, in pixels; for training "
                "multiplied by a random ratio.",
                minimum=1,
            ),
            "short_side": Key(int, 512, "See `long_side`.", minimum=1),
        },
        "augmentation": {
            "min_ratio": Key(float, 0.5, "Smallest ratio of random resizing.", above=0),
            "max_ratio": Key(float, 2.0, "Largest ratio of random resizing.", above=0),
            "max_class_ratio": Key(
                float,
                0.75,
                "Largest fraction of a crop that one class may cover; other crops are drawn again, up to ten times.",
                minimum=0,
                maximum=1,
            ),
            "flip_probability": Key(float, 0.5, "Probability of a horizontal flip.", minimum=0, maximum=1),
            "distort": Key(
                bool,
                True,
                "Random brightness, contrast, saturation and hue, each with probability 1/2 (photometric distortion).",
            ),
        },
        "loss": {"auxiliary_weight": Key(float, 0.4, "Weight of the auxiliary head's loss.", minimum=0)},
        "schedule": common.make_schedule_keys("poly"),
        "eval": {
            "ratios": Key(
                tuple,
                (1.0,),
                "Probabilities are averaged over images resized by these ratios.",
                items=float,
                above=0,
                can_be_empty=False,
            ),
            "buckets": common.EVAL_BUCKETS,
            "flip": Key(bool, False, "Probabilities are also averaged over mirrored images."),
            "window": Key(
                int, 0, "Side of sliding windows, whose logits are averaged; 0 uses whole images.", minimum=0
            ),
            "stride": Key(int, 0, "Stride of the windows, in pixels; 0 with whole images.", minimum=0),
        },
    },
)


def get_segmentation_config() -> ConfigDict:
    """The default configuration of a segmentor, unlocked."""
    return make_config(KEYS)


def check(config: ConfigDict) -> None:
    """Raises UserError for values that do not fit each other."""
    common.check_rgb(config)
    augmentation, evaluation = config.augmentation, config.eval
    if augmentation.min_ratio > augmentation.max_ratio:
        raise UserError(
            f"config.augmentation.min_ratio must be at most max_ratio {augmentation.max_ratio}, got {augmentation.min_ratio}."
        )
    if bool(evaluation.window) != bool(evaluation.stride) or evaluation.stride > evaluation.window:
        raise UserError(
            "config.eval.window and config.eval.stride must both be 0 (whole images) or both be positive with the stride at "
            f"most the window, got {evaluation.window} and {evaluation.stride}."
        )
