"""What every run sets, by task, with the recipe of the paper (2309.01430, appendix; ImageNet-1k at 224) as defaults.

A config file takes this, replaces what differs and returns it. Every key is visible here; unknown ones are refused.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Of a classifier."""
    config = _get_base()
    config.task = "classification"
    config.init_head_rows = ""  # a file with a number for each class: the row of the loaded head that it takes

    config.data.image_size = 224
    config.data.eval_resize = 256  # to eval_resize x eval_resize, then the central image_size x image_size

    config.augmentation = ConfigDict()
    config.augmentation.min_crop_area = 0.08  # of the image
    config.augmentation.max_crop_aspect = 4 / 3  # width / height, or height / width
    config.augmentation.flip_probability = 0.5
    config.augmentation.rand_augment_count = 2  # operations an image, each applied with probability 1/2; 0: none
    config.augmentation.rand_augment_magnitude = 9.0  # of 10
    config.augmentation.rand_augment_std = 0.5
    config.augmentation.erasing_probability = 0.25
    config.augmentation.mixup_alpha = 0.8  # 0: no mixup
    config.augmentation.cutmix_alpha = 1.0  # 0: no cutmix; with both, evenly

    config.loss = ConfigDict(dict(label_smoothing=0.1))

    # Linear warm-up, then cosine. Rates are for reference_batch_size and scaled linearly to batch_size.
    config.schedule = ConfigDict(dict(kind="cosine"))
    config.schedule.base_lr = 5e-4
    config.schedule.warmup_lr = 5e-7
    config.schedule.min_lr = 5e-6
    config.schedule.warmup_epochs = 20.0
    config.schedule.reference_batch_size = 512

    # More sets for --mode=eval: folders of a class each, or TFDS array_record. Of a set that has only some of the classes
    # only those are predicted. real: the file real.json of the Reassessed Labels, for the validation images.
    config.eval.sets = ConfigDict(dict(v2="", a="", r="", sketch="", real=""))
    return config


def get_segmentation_config() -> ConfigDict:
    """Of a segmentor, with the recipe of UperNet on ADE20K as defaults."""
    config = _get_base()
    config.task = "segmentation"
    config.batch_size = 16
    config.steps = 160_000
    config.log_every = 50

    # name: upernet or sem_fpn. Any attribute of dat_jax.Segmentor may be added.
    config.head = ConfigDict(dict(name="upernet", channels=512, auxiliary_channels=256, dropout=0.1))

    # Folders images/ and annotations/ with training/ and validation/ (ADEChallengeData2016), or train/ and val/, labels as
    # PNGs of the same names, and classes.txt where it is not ADE20K.
    config.data.name = "ade20k"
    config.data.zero_is_ignored = (
        False  # labels 0 do not count, the others are the classes plus one; so it is with ADE20K
    )
    config.data.crop_size = 512
    # Images are resized to fit, keeping their ratio; in training this times a ratio.
    config.data.long_side = 2048
    config.data.short_side = 512

    config.augmentation = ConfigDict()
    config.augmentation.min_ratio = 0.5
    config.augmentation.max_ratio = 2.0
    config.augmentation.max_class_ratio = (
        0.75  # of a crop that one class may cover, else it is drawn anew up to ten times
    )
    config.augmentation.flip_probability = 0.5
    config.augmentation.distort = True  # brightness, contrast, saturation and hue, each with probability 1/2

    config.loss = ConfigDict(dict(auxiliary_weight=0.4))
    config.optimizer.weight_decay = 0.01
    config.optimizer.decay_rule = "all_but_norms"
    config.optimizer.clip_norm = 0.0

    # base_lr * (1 - step / steps) ^ power, and linear warm-up from warmup_ratio of it.
    config.schedule = ConfigDict(dict(kind="poly", base_lr=6e-5, power=1.0, warmup_steps=1500, warmup_ratio=1e-6))

    config.eval.batch_size = 8  # images of one size at a time
    config.eval.every_steps = 16_000
    # Probabilities are averaged over images resized by these ratios, and over mirrored ones.
    config.eval.ratios = (1.0,)
    config.eval.flip = False
    config.eval.window = 0  # side of windows that slide by stride, whose logits are averaged; 0: whole images
    config.eval.stride = 0
    return config


def get_detection_config() -> ConfigDict:
    """Of a detector, with the recipe of Mask R-CNN on COCO, 12 epochs, as defaults."""
    config = _get_base()
    config.task = "detection"
    config.epochs = 12
    config.batch_size = 64
    config.log_every = 50

    # name: retinanet, mask_rcnn or cascade_mask_rcnn. Any attribute of dat_jax.RetinaNet or dat_jax.RCNN may be added.
    config.head = ConfigDict(dict(name="mask_rcnn"))

    # Folders train2017/ and val2017/ with annotations/instances_train2017.json and instances_val2017.json, as COCO has them.
    config.data.name = "coco"
    # Images are resized to fit, keeping their ratio, in training with one of the short sides.
    config.data.long_side = 1333
    config.data.short_sides = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    config.data.test_long_side = 1333
    config.data.test_short_side = 800
    config.data.max_boxes = 100  # objects of a training image; of more some are left out, at random
    # Shapes, height x width in multiples of 32, that training images are padded to, such as "608x832,832x608": each is
    # compiled for. "": those of dat_jax/data/detection_transforms.py.
    config.data.buckets = ""

    config.augmentation = ConfigDict()
    config.augmentation.flip_probability = 0.5
    # Of a crop: its sides are drawn from crop_min to crop_max, in an image of one of first_short_sides; it is then resized as
    # whole images are.
    config.augmentation.crop_probability = 0.5
    config.augmentation.first_short_sides = (400, 500, 600)
    config.augmentation.crop_min = 384
    config.augmentation.crop_max = 600

    # Boxes of an image; RetinaNet, which trains on all anchors and proposes nothing, has test_candidates only.
    config.sampling = ConfigDict()
    config.sampling.rpn_samples = 256  # anchors that the RPN learns from, up to half of them on objects
    config.sampling.roi_samples = 512  # proposals that a head learns from, up to a quarter of them on objects
    config.sampling.train_candidates = 2000  # the best of a level, before those that overlap better ones go
    config.sampling.train_proposals = 1000  # the best of what is left, over all levels
    config.sampling.test_candidates = 1000
    config.sampling.test_proposals = 1000

    config.optimizer.decay_rule = "all_but_norms_and_bn"
    config.optimizer.clip_norm = 0.0

    # base_lr, times factor after each of so many epochs, and linear warm-up from warmup_ratio of it. A larger or smaller
    # batch does not scale it.
    config.schedule = ConfigDict(
        dict(kind="step", base_lr=4e-4, warmup_steps=500, warmup_ratio=0.001, drops=(8, 11), factor=0.1)
    )

    config.eval.batch_size = 8  # images of one shape at a time
    config.eval.score_threshold = 0.05
    config.eval.iou_threshold = 0.5  # a box that overlaps a better one of its class by more goes
    config.eval.max_detections = 100  # of an image
    # Of which the sides of images are, by padding. A larger one has fewer shapes to compile, and other results.
    config.eval.multiple = 32
    return config


def _get_base() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.epochs = 300
    config.steps = 0  # optimizer steps of the whole run; 0: as many as the epochs have
    config.batch_size = 1024  # over all devices and accumulated steps: examples an optimizer step
    config.accumulate_steps = 1  # the batch is split into so many parts, one after the other
    config.ema_decay = 0.0  # 0: none; else the average of the weights is what is evaluated
    config.log_every = 50  # steps
    # Where metrics go beside WORKDIR/metrics.jsonl: "tensorboard" writes files into WORKDIR/tensorboard, "wandb" sends them to
    # Weights & Biases (pip install -e ".[wandb]"; its variables WANDB_PROJECT and WANDB_MODE count).
    config.logs = ("tensorboard",)
    # Steps to trace into WORKDIR/profile, for TensorBoard or ui.perfetto.dev; 0: none. They come after three others, and
    # the first process traces its own devices.
    config.profile = 0

    # A step whose loss or gradient is not a finite number changes nothing. After so many in a row the run ends, with the
    # state before them saved.
    config.max_skipped_steps = 10
    # A loss above so many times the mean of the last hundred is written to WORKDIR/loss_spikes.jsonl, with the indices of
    # the batch's images; so are skipped steps. 0: none are.
    config.spike_factor = 0.0

    # Where compiled programs are kept, so that a run that starts again does not compile again: a directory, "" for nowhere,
    # or auto: what JAX_COMPILATION_CACHE_DIR names, else dat_jax in the user's cache (XDG_CACHE_HOME, ~/.cache). Nothing is
    # ever removed there; the whole directory may be.
    config.compilation_cache = "auto"

    # name: dat_jax.list_models(). dtype: auto is bfloat16 on TPU and GPU, float32 on CPU. deformable_form: auto is the form of
    # deformable attention of the named model, see dat_jax.DAT; cvpr2022 is DAT v1 as it was released, dat_pp the later code.
    # Any attribute of dat_jax.DAT may be added, such as remat="blocks" (less memory), scan_blocks=True (compiles faster) and
    # implementation="pallas" (kernels for TPUs, not timed on a device yet).
    config.model = ConfigDict(dict(name="dat_pp_tiny", deformable_form="auto", dtype="auto", drop_path_rate=0.2))

    # What is started from where the work directory has no checkpoint: "" is from scratch; else weights that
    # `python -m dat_jax.conversion` wrote, or the work directory of another run.
    config.init_from = ""

    config.data = ConfigDict()
    config.data.name = "imagenet"
    # TFDS array_record (as `python -m dat_jax.data.prepare` writes), or folders train/<class>, val/<class>. "" for
    # embedded data, by name.
    config.data.directory = ""
    config.data.workers = 0  # processes that load; 0 loads in threads of this one
    config.data.max_damaged = 0.2  # of the training images seen; where more cannot be read the run ends
    config.data.stall_seconds = 60.0  # of waiting for a batch, which are said; 0: never

    # AdamW; clip_norm 0 does not clip. What decays: matrices (and kernels, but no position tables); all_but_norms (and
    # position tables), but BatchNorms, as the published segmentors have it; all_but_norms_and_bn, where BatchNorms do not
    # decay either, as the published detectors have it.
    config.optimizer = ConfigDict(
        dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, decay_rule="matrices", clip_norm=5.0)
    )

    # Devices: the batch is split over both axes, large parameters and their optimizer state over fsdp. -1: the rest.
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))

    # Beside every evaluation the state is saved every so many steps (0: not), and when a signal ends the run. The newest
    # so many checkpoints stay, and the best one.
    config.checkpoint = ConfigDict(dict(every=0, keep=2))

    config.eval = ConfigDict()
    config.eval.batch_size = 1024
    config.eval.every = 1  # epochs; evaluates and saves
    config.eval.every_steps = 0  # instead, where it is not 0
    config.eval.checkpoint = "best"  # what --mode=eval takes: best or latest
    return config
