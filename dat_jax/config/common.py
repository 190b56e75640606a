"""Keys that every task has, and the learning rate schedules.

The defaults are the recipe of the paper (https://arxiv.org/abs/2309.01430, appendix) for ImageNet-1k at 224 x 224.
"""

from typing import Any

from ml_collections import ConfigDict

from dat_jax.config.keys import Key, OpenGroup
from dat_jax.config.optimizers import OPTIMIZER
from dat_jax.errors import UserError

KEYS: dict[str, Any] = {
    "seed": Key(int, 0, "Seed of initial weights, data order, augmentation and dropout.", minimum=0),
    "epochs": Key(
        int,
        300,
        "Length of the run in epochs. Ignored if `steps` is not 0. -1: 30, or more for 1000 steps.",
        minimum=1,
        or_value=-1,
    ),
    "steps": Key(int, 0, "Total number of optimizer steps; 0 derives it from `epochs`.", minimum=0),
    "batch_size": Key(
        int,
        1024,
        "Examples per optimizer step, over all devices and accumulated parts. -1: 8 to 128, about a sixteenth of the "
        "training set.",
        minimum=1,
        or_value=-1,
    ),
    "accumulate_steps": Key(
        int, 1, "Number of equal parts that a batch is split into; their gradients are accumulated.", minimum=1
    ),
    "ema_decay": Key(
        float,
        0.0,
        "Decay of the exponential moving average of the weights, which is then evaluated; 0 disables it.",
        minimum=0,
        below=1,
    ),
    "ema_decays": Key(
        tuple,
        (),
        "Decays of further averages of the weights. Each is kept in the checkpoints and evaluated beside the weights that "
        "`ema_decay` selects; `dat_jax.load` and `dat_jax.export` take any of them.",
        items=float,
        above=0,
        below=1,
    ),
    "ema_warmup": Key(
        bool,
        False,
        "Whether each decay grows with the number of steps, 1 - (1 + steps) ** (-2 / 3), up to its value, so that the average of "
        "a short run forgets the initial weights.",
    ),
    "memory_budget": Key(
        float,
        0.0,
        "GiB of each device that a training step may take. Before the first step it is compiled with remat none, dots and blocks "
        "until one fits, which replaces `model.remat`. -1: 90 % of the device. 0: `model.remat` is used as it is.",
        minimum=0,
        or_value=-1,
    ),
    "log_every": Key(int, 50, "Steps between log lines.", minimum=1),
    "logs": Key(
        tuple,
        ("tensorboard",),
        "Where metrics are written besides WORKDIR/metrics.jsonl: tensorboard writes files to WORKDIR/tensorboard, wandb "
        "sends them to Weights & Biases (pip install wandb; WANDB_PROJECT and WANDB_MODE apply).",
        items=str,
        choices=("tensorboard", "wandb"),
    ),
    "profile": Key(
        int,
        0,
        "Number of steps to trace into WORKDIR/profile, for TensorBoard or ui.perfetto.dev; 0 disables it. Tracing starts "
        "after three other steps and covers the devices of the first process.",
        minimum=0,
    ),
    "max_skipped_steps": Key(
        int,
        10,
        "A step with a non-finite loss or gradient is skipped. The run stops after this number of skipped steps in a row, "
        "with the state before them saved.",
        minimum=1,
    ),
    "spike_factor": Key(
        float,
        0.0,
        "A loss above this factor times the mean of the last hundred is written to WORKDIR/loss_spikes.jsonl with the "
        "indices of the images in the batch, as are skipped steps; 0 disables the file.",
        minimum=0,
    ),
    "compilation_cache": Key(
        str,
        "auto",
        "Directory of compiled programs, so that a restarted run does not compile again; empty disables it. auto: "
        "JAX_COMPILATION_CACHE_DIR, else dat_jax in the user's cache (XDG_CACHE_HOME, ~/.cache). Nothing is removed "
        "from the directory automatically; it can be deleted at any time.",
    ),
    "tune": Key(
        bool,
        True,
        "On TPUs and GPUs, compare the implementations of each op with the plain one before the first step, and use the fastest "
        "that agrees. The choices are kept in `compilation_cache`. False: the defaults, as on CPUs.",
    ),
    "model": OpenGroup(
        {
            "name": Key(str, "dat_pp_tiny", "A model of dat_jax.list_models()."),
            "deformable_form": Key(
                str,
                "auto",
                "Form of deformable attention: cvpr2022 is the released DAT v1, dat_pp the later code, auto the form of the "
                "named model. See dat_jax.DAT.",
            ),
            "dtype": Key(
                str,
                "auto",
                "Compute type; auto is bfloat16 on TPU and GPU and float32 on CPU.",
                choices=("auto", "float32", "bfloat16"),
            ),
            "drop_path_rate": Key(
                float, 0.2, "Stochastic depth rate of the last block; it grows linearly from 0.", minimum=0, below=1
            ),
        },
        required=("name", "dtype"),
        help="Name and attributes of the model. Any attribute of dat_jax.DAT can be added: remat='blocks' (less memory), "
        "scan_blocks=True (faster compilation), implementation='pallas' or 'triton' (kernels for TPUs or GPUs without a "
        "comparison).",
    ),
    "init_from": Key(
        str,
        "",
        "Initial weights if WORKDIR has no checkpoint: weights converted by `python -m dat_jax.conversion`, an export on the "
        "Hugging Face Hub (hf://USER/REPOSITORY@REVISION), or the work directory of another run. Empty: random initialization.",
    ),
    "data": {
        "name": Key(str, "imagenet", "Data set, for an empty `directory` the name of an embedded one."),
        "directory": Key(
            str,
            "",
            "Data set directory: TFDS array_record, as written by `python -m dat_jax.data.prepare`, or folders train/<class> "
            "and val/<class>. Empty: embedded data.",
        ),
        "channels": Key(
            int, 3, "Number of channels of the images. Segmentation and detection take RGB images, 3.", minimum=1
        ),
        "apply_orientation": Key(
            bool,
            True,
            "Turn images upright as their EXIF orientation tag says. False reads the stored pixels, as the loader of the "
            "published ImageNet evaluation does.",
        ),
        "workers": Key(int, 0, "Data loading processes; 0 loads in threads of the main process.", minimum=0),
        "max_damaged": Key(
            float,
            0.2,
            "Largest fraction of unreadable images among the training images read so far; beyond it the run stops.",
            minimum=0,
            maximum=1,
        ),
        "stall_seconds": Key(
            float, 60.0, "Warn after waiting this many seconds for a batch; 0 disables the warning.", minimum=0
        ),
    },
    "optimizer": OPTIMIZER,
    "lora": {
        "rank": Key(
            int,
            0,
            "Rank of low-rank adapters (LoRA) of linear layers. They learn in place of the weights of the backbone, which are "
            "frozen; the head learns too. 0: no adapters.",
            minimum=0,
        ),
        "alpha": Key(float, 8.0, "An adapter is multiplied by alpha / rank.", above=0),
        "layers": Key(
            tuple,
            ("attention", "mlp"),
            "Which linear layers have adapters.",
            items=str,
            choices=("attention", "mlp"),
            can_be_empty=False,
        ),
    },
    "mesh": {
        "slices": Key(
            int,
            -1,
            "Slices of TPUs, which the network of the data center connects; -1: those that the devices belong to. Each slice "
            "has a copy of the `data` x `fsdp` mesh and processes an equal part of the batch. Devices other than TPUs have no "
            "slices, so -1 means 1; a larger number groups consecutive devices.",
            minimum=1,
            or_value=-1,
        ),
        "data": Key(
            int, -1, "Devices per slice that split the batch only; -1: all remaining ones.", minimum=1, or_value=-1
        ),
        "fsdp": Key(
            int,
            1,
            "Devices per slice that also split large parameters and their optimizer state; -1: all remaining ones.",
            minimum=1,
            or_value=-1,
        ),
    },
    "checkpoint": {
        "every": Key(
            int,
            0,
            "Steps between checkpoints, in addition to those at every evaluation and on a signal; 0 disables them.",
            minimum=0,
        ),
        "keep": Key(int, 2, "Number of recent checkpoints to keep; the best one is always kept.", minimum=1),
    },
    "eval": {
        "batch_size": Key(int, 1024, "Images per evaluation step.", minimum=1),
        "every": Key(
            int,
            1,
            "Epochs between evaluations, each of which saves a checkpoint. -1: a twentieth of the run, at least one epoch.",
            minimum=1,
            or_value=-1,
        ),
        "every_steps": Key(int, 0, "Steps between evaluations, instead of `every` if not 0.", minimum=0),
        "checkpoint": Key(str, "best", "Checkpoint that --mode=eval evaluates.", choices=("best", "latest")),
    },
}

_WARMUP_STEPS = "Steps of linear warm-up; 0 disables it."
_WARMUP_RATIO = "Learning rate at the first warm-up step as a fraction of `base_lr`."
SCHEDULES: dict[str, dict[str, Key]] = {
    # Linear warm-up, then cosine decay, as for the published classifiers.
    "cosine": {
        "base_lr": Key(
            float,
            5e-4,
            "Peak learning rate for a batch of `reference_batch_size`; scaled linearly with it. -1: follows from the number "
            "of steps, 5e-4 for 1000 and down to 1e-4 for long runs.",
            minimum=0,
            or_value=-1,
        ),
        "warmup_lr": Key(
            float,
            5e-7,
            "Learning rate at the first step, scaled as `base_lr`. -1: a hundredth of it.",
            minimum=0,
            or_value=-1,
        ),
        "min_lr": Key(
            float,
            5e-6,
            "Learning rate at the last step, scaled as `base_lr`. -1: a hundredth of it.",
            minimum=0,
            or_value=-1,
        ),
        "warmup_epochs": Key(float, 20.0, "Epochs of linear warm-up. -1: a tenth of the run.", minimum=0, or_value=-1),
        "reference_batch_size": Key(
            int, 512, "Batch size that the learning rates are meant for. -1: that of the run.", minimum=1, or_value=-1
        ),
    },
    # Linear warm-up, and base_lr * (1 - step / steps) ** power, as for the published segmentors.
    "poly": {
        "base_lr": Key(float, 6e-5, "Peak learning rate, for any batch size.", minimum=0),
        "power": Key(float, 1.0, "Exponent of the polynomial decay.", minimum=0),
        "warmup_steps": Key(int, 1500, _WARMUP_STEPS, minimum=0),
        "warmup_ratio": Key(float, 1e-6, _WARMUP_RATIO, minimum=0, maximum=1),
    },
    # Linear warm-up, and base_lr times factor after each drop, as for the published detectors.
    "step": {
        "base_lr": Key(float, 4e-4, "Peak learning rate, for any batch size.", minimum=0),
        "warmup_steps": Key(int, 500, _WARMUP_STEPS, minimum=0),
        "warmup_ratio": Key(float, 0.001, _WARMUP_RATIO, minimum=0, maximum=1),
        "drops": Key(tuple, (8, 11), "Epochs after which the learning rate is multiplied by `factor`.", items=float),
        "factor": Key(float, 0.1, "Factor of the learning rate at each of `drops`.", minimum=0, maximum=1),
    },
}


# ``eval.buckets`` of segmentors and detectors.
EVAL_BUCKETS = Key(
    str,
    "auto",
    'Shapes of the arrays that hold the images; each is compiled once. "auto": the fewest that waste at most 12 % of their '
    'pixels. "exact": one for each size. Or a list in pixels, such as "512x704,704x512". The choice changes no result, except '
    "for rounding.",
)


def check_rgb(config: ConfigDict) -> None:
    """Raises UserError unless images have three channels."""
    if config.data.channels != 3:
        raise UserError(
            f"config.data.channels must be 3 for {config.task}, which takes RGB images only, got {config.data.channels}."
        )


def make_schedule_keys(kind: str) -> dict[str, Key]:
    """Keys of the ``schedule`` group with ``kind`` as its default."""
    return {"kind": Key(str, kind, "Shape of the learning rate.", choices=tuple(SCHEDULES)), **SCHEDULES[kind]}
