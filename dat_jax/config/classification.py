"""Keys of classification, with the recipe for ImageNet-1k at 224 x 224 as defaults."""

from ml_collections import ConfigDict

from dat_jax.config import common
from dat_jax.config.keys import Key, make_config, merge_keys
from dat_jax.errors import UserError

KEYS = merge_keys(
    common.KEYS,
    {
        "task": Key(str, "classification", "Task of the run.", choices=("classification",)),
        "init_head_rows": Key(
            str,
            "",
            "File with one number per class: the row of the classification head of `init_from` that initializes the class. "
            "Empty: the head is reused if the number of classes and their recorded names are the same, else initialized "
            "randomly.",
        ),
        "data": {
            "channels": Key(
                int,
                3,
                "Number of channels of the images. -1: that of the weights `init_from`, else 3.",
                minimum=1,
                or_value=-1,
            ),
            "dtype": Key(
                str,
                "uint8",
                "Type of the values in the image files. auto: that of the weights `init_from`, else uint8.",
                choices=("auto", "uint8", "uint16", "float32"),
            ),
            "mean": Key(
                tuple,
                (0.485, 0.456, 0.406),
                "Mean of each channel, or one number for all of them, that images are normalized with. Values of uint8 are "
                "divided by 255 before. Empty: those of the weights `init_from`, else those of ImageNet for RGB.",
                items=float,
            ),
            "std": Key(
                tuple, (0.229, 0.224, 0.225), "Standard deviation of each channel, as `mean`.", items=float, above=0
            ),
            "image_size": Key(
                int,
                224,
                "Side of the square images, in pixels. -1: that of the weights `init_from`, else of the model.",
                minimum=1,
                or_value=-1,
            ),
            "train_sizes": Key(
                tuple,
                (),
                "Sides of the training images, one for each of equal parts of the run, such as (128, 160, 192, 224) for images "
                "that grow. Evaluation uses `image_size`. Empty: `image_size` throughout.",
                items=int,
                minimum=1,
            ),
            "eval_resize": Key(
                int,
                256,
                "Evaluation resizes images to this side and takes the central `image_size` crop. -1: that of the weights "
                "`init_from`, else 8/7 of `image_size`.",
                minimum=1,
                or_value=-1,
            ),
        },
        "augmentation": {
            "min_crop_area": Key(
                float, 0.08, "Smallest area of a random crop as a fraction of the image.", minimum=0, maximum=1
            ),
            "max_crop_aspect": Key(
                float, 4 / 3, "Largest ratio of the longer to the shorter side of a crop.", minimum=1
            ),
            "flip_probability": Key(float, 0.5, "Probability of a horizontal flip.", minimum=0, maximum=1),
            "rand_augment_count": Key(
                int, 2, "RandAugment operations per image, each applied with probability 1/2; 0 disables it.", minimum=0
            ),
            "rand_augment_magnitude": Key(float, 9.0, "Mean magnitude of RandAugment, on a scale to 10.", minimum=0),
            "rand_augment_std": Key(float, 0.5, "Standard deviation of the magnitude.", minimum=0),
            "three_augment": Key(
                bool,
                False,
                "Whether one of grayscale, solarization and Gaussian blur is applied to each image (3-Augment of DeiT III), in "
                "place of RandAugment, whose count must be 0.",
            ),
            "color_jitter": Key(
                float,
                0.0,
                "Brightness, contrast and saturation are multiplied by random factors from 1 - this to 1 + this; 0 disables it. "
                "DeiT III uses 0.3 with 3-Augment.",
                minimum=0,
            ),
            "repeats": Key(
                int,
                1,
                "How often each image occurs in a batch, every time augmented by itself (repeated augmentation). An epoch keeps "
                "its number of steps, so it has 1 / this of the images. DeiT uses 3.",
                minimum=1,
            ),
            "erasing_probability": Key(float, 0.25, "Probability of random erasing.", minimum=0, maximum=1),
            "mixup_alpha": Key(float, 0.8, "Parameter of mixup's beta distribution; 0 disables mixup.", minimum=0),
            "cutmix_alpha": Key(
                float,
                1.0,
                "Parameter of cutmix's beta distribution; 0 disables cutmix. With mixup too, each gets half of the batches.",
                minimum=0,
            ),
        },
        "distillation": {
            "teacher": Key(
                str,
                "",
                "A trained classifier that the model learns from: an export, a run, converted weights, or a file "
                "NAME.stablehlo, a program that maps images (B, H, W, 3) to logits. Empty: none.",
            ),
            "kind": Key(
                str,
                "soft",
                "What is learned. soft: the probabilities of the teacher. hard: its class. features: the similarities of images "
                "by the features before the head. tokens: its probabilities at each position of the last map.",
                choices=("soft", "hard", "features", "tokens"),
            ),
            "weight": Key(
                float,
                0.5,
                "The loss is 1 - weight times that of the labels plus weight times this one.",
                minimum=0,
                maximum=1,
            ),
            "temperature": Key(float, 1.0, "soft and tokens: the logits of both are divided by it.", above=0),
        },
        "mesa": {
            "weight": Key(
                float,
                0.0,
                "Weight of the cross-entropy to the prediction of the averaged model (MESA), which is added to the loss; it "
                "needs `ema_decay`. 0 disables it.",
                minimum=0,
            ),
            "start": Key(float, 0.25, "Part of the run after which it begins.", minimum=0, maximum=1),
        },
        "loss": {
            "kind": Key(
                str,
                "cross_entropy",
                "cross_entropy: of the softmax over the classes. binary: cross-entropy of a sigmoid for each class, a mean over "
                "the classes, as in timm's recipes; it needs a larger learning rate.",
                choices=("cross_entropy", "binary"),
            ),
            "label_smoothing": Key(float, 0.1, "Label smoothing.", minimum=0, below=1),
        },
        "schedule": common.make_schedule_keys("cosine"),
        "eval": {
            "neighbors": Key(
                int, 20, "--mode=knn: number of training images that vote for the class of an image.", minimum=1
            ),
            "sets": {
                "v2": Key(
                    str,
                    "",
                    "Directory of ImageNet-V2, evaluated too by --mode=eval: class folders or TFDS array_record.",
                ),
                "a": Key(str, "", "Directory of ImageNet-A, as `v2`; predictions are restricted to its 200 classes."),
                "r": Key(str, "", "Directory of ImageNet-R, as `v2`; predictions are restricted to its 200 classes."),
                "sketch": Key(str, "", "Directory of ImageNet-Sketch, as `v2`."),
                "real": Key(
                    str, "", "File real.json of the Reassessed Labels, evaluated too for the validation images."
                ),
            },
        },
    },
)


def get_classification_config() -> ConfigDict:
    """The default configuration of a classifier, unlocked."""
    return make_config(KEYS)


def check(config: ConfigDict) -> None:
    """Raises UserError for values that do not fit each other."""
    if config.mesa.weight > 0 and not (config.ema_decay > 0 or config.optimizer.name == "schedule_free_adamw"):
        raise UserError("config.mesa needs averaged weights: expected config.ema_decay above 0, such as 0.999, got 0.")
    if config.augmentation.three_augment and (count := config.augmentation.rand_augment_count):
        raise UserError(
            "config.augmentation.three_augment replaces RandAugment: config.augmentation.rand_augment_count must be 0, got "
            f"{count}."
        )
    if config.batch_size % (repeats := config.augmentation.repeats) and config.batch_size != -1:
        raise UserError(
            f"config.batch_size must be a multiple of config.augmentation.repeats {repeats}, got {config.batch_size}."
        )
    if config.data.eval_resize != -1 and config.data.eval_resize < config.data.image_size:
        raise UserError(
            f"config.data.eval_resize must be at least config.data.image_size {config.data.image_size}, got "
            f"{config.data.eval_resize}."
        )
