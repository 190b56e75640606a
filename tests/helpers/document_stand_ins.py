"""Small stand-ins for what the commands in the documents need: data, weights, trained models, long runs.

Each is made when a command asks for it, at the place that the command says, below a folder of its own.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import warnings
from unittest import mock

import jax
import numpy as np
import yaml
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from PIL import Image

import dat_jax
from dat_jax.checkpoints.exports import export_model
from dat_jax.config import validate
from dat_jax.config.files import add_recorded_config, define_config_flag
from dat_jax.conversion import detector_to_official, segmentor_to_official, to_official
from dat_jax.data import segmentation_sources
from dat_jax.exporting.hub import push_exported
from dat_jax.models.registry import VARIANTS, create_segmentor
from dat_jax.parallel import sharding
from dat_jax.training import loop
from dat_jax.tuning import command as tuning_command
from tests.helpers import coco_files, tiny_config, tiny_detection, tiny_segmentation
from tests.helpers.documents import ROOT
from tests.helpers.photographs import photographs
from tests.helpers.pth_writer import write_pth
from tests.helpers.random_variables import random_variables
from tests.helpers.small_mesh import make_small_mesh

# Of dat_pp_nano as a published YAML says it, but for what is as published by default.
_NANO_YAML = dict(
    img_size=48,
    num_classes=3,
    dim_stem=32,
    dims=[32, 64, 128, 192],
    depths=[2, 2, 1, 1],
    stage_spec=[["N", "D"], ["N", "D"], ["D"], ["D"]],
    heads=[1, 2, 4, 6],
    groups=[1, 1, 2, 3],
    strides=[2, 1, 1, 1],
    ksizes=[5, 3, 3, 3],
    nat_ksizes=[7, 5, 3, 3],
    offset_range_factor=[-1] * 4,
    use_pes=[True] * 4,
    use_lpus=[True] * 4,
    use_dwc_mlps=[True] * 4,
    use_conv_patches=True,
    drop_path_rate=0.05,
)
_RUNS = {  # a work directory -> the configuration that it comes from
    "runs/quickstart": "configs/quickstart.py",
    "runs/averages": "configs/quickstart.py --config.ema_decays=0.9,0.98,0.995",
    "runs/dat_pp_s": "configs/dat_pp_s.py",
    "runs/s": "configs/dat_pp_s.py",
    "runs/dat_pp_b": "configs/dat_pp_b.py",
    "runs/dat_pp_t": "configs/dat_pp_t.py",
    "runs/mine": "configs/finetune.py",
    "runs/quickstart_segmentation": "configs/quickstart_segmentation.py",
    "runs/quickstart_detection": "configs/quickstart_detection.py",
    "runs/upernet_dat_pp_s": "configs/upernet.py:dat_pp_s",
}
_OF_MAPS = "_of_maps"  # weights of the backbone that small segmentors and detectors have
_PATHS = re.compile(
    r"^(/data/|/mnt/my-bucket/|data/|runs/|weights/|exported/|photo|digit|flowers/|ILSVRC|[\w]+\.(pth|yaml)$)"
)


def parse_flags(tool: str, arguments: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Parse the flags of ``python -m dat_jax.TOOL``. Returns them and the other arguments; raises the errors of absl."""
    module, values = importlib.import_module(f"dat_jax.{tool}"), flags.FlagValues()
    if tool == "main":
        define_config_flag(values)
        for flag in flags.FLAGS.get_flags_for_module("dat_jax.main"):
            if flag.name != "config" and flag.name not in values:
                values[flag.name] = copy.deepcopy(flag)
    else:
        module.define_flags(values)
    # Flags of single keys are looked for in sys.argv. Reading a file warns, which tools ignore too.
    with mock.patch.object(sys, "argv", [tool, *arguments]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return values, values([tool, *arguments])


def parse_config(tool: str, arguments: list[str]) -> tuple[flags.FlagValues, ConfigDict]:
    """Parse the flags of a tool that takes a configuration, and check the configuration."""
    values, rest = parse_flags(tool, arguments)
    if rest != [tool]:
        raise ValueError(f"Arguments that are no flags: {rest[1:]}.")
    validate(values.config)
    return values, values.config


def shrink(config: ConfigDict) -> ConfigDict:
    """Return a configuration with the same task, initial weights and data directory, but a tiny model and few steps.

    Nothing else is taken over, so that programs that were compiled once are found again.
    """
    if config.task == "classification":
        tiny = tiny_config.get_config().unlock()
        tiny.epochs = 2 if config.epochs == 10 else 1  # 10 asks for more than the quickstart's own
        tiny.eval.sets, tiny.ema_decays = config.eval.sets, config.ema_decays
    elif config.task == "segmentation":
        tiny = tiny_segmentation.get_config(config.head.name).unlock()
        tiny.data.name = "squares_of_one_size"
        tiny.steps = tiny.eval.every_steps = 4
        tiny.eval.ratios, tiny.eval.flip = config.eval.ratios[:2], config.eval.flip
    else:
        tiny = tiny_detection.get_config(config.head.name).unlock()
        tiny.steps = tiny.eval.every_steps = 2
    if config.data.directory:
        tiny.data.name, tiny.data.directory = config.data.name, config.data.directory
        if config.task == "classification" and config.data.channels not in (3, -1):
            tiny.data.update({key: config.data[key] for key in ("channels", "dtype", "mean", "std")})
            tiny.augmentation.rand_augment_count = 0
        if config.task == "segmentation":
            tiny.data.zero_is_ignored = config.data.zero_is_ignored
    tiny.log_every = 2
    tiny.init_from = config.init_from and config.init_from + _OF_MAPS * (config.task != "classification")
    return tiny.lock()


@contextlib.contextmanager
def kept_programs(directory: pathlib.Path | None):
    """Keep compiled programs in a folder, so that each model is compiled once."""
    settings = {
        "jax_enable_compilation_cache": directory is not None,
        "jax_compilation_cache_dir": directory and str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _load_square_images(split):
    source = tiny_segmentation._load_squares(split)
    chosen = [index for index in range(len(source)) if source.size(index) == (64, 64)]
    images, labels = ([arrays[index] for index in chosen] for arrays in (source.images, source.labels))
    return dataclasses.replace(source, images=images, labels=labels)


# Evaluation compiles for every size.
segmentation_sources._SOURCES["squares_of_one_size"] = _load_square_images
# Variants smaller than those of the tests, by the names that snippets have.
_PLAIN = dict(lpu=(False,) * 4, conv_mlp=(False,) * 4, conv_patches=False)
SMALL_VARIANTS = {
    name: {**VARIANTS["dat_pp_nano"], **tiny_segmentation.BACKBONE, **_PLAIN}
    for name in ("dat_pp_tiny", "dat_pp_small")
}
# Heads likewise, for snippets that say no widths.
create_small_segmentor = functools.partial(create_segmentor, channels=16, auxiliary_channels=8)


class StandIns:
    """Makes the files that commands name below ``root``, which is the working directory while they run."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        (root / "configs").symlink_to(ROOT / "configs")

    def place(self, argument: str) -> str:
        """Move /data/... and /mnt/... of an argument below ``root``, and make the file or folder that it names."""
        flag, equals, path = argument.rpartition("=")
        if path.startswith("hf://") and flag != "--push":
            self.need(path)
        if not _PATHS.match(path):
            return argument
        inside = path.lstrip("/")
        if not flag.endswith(("output", "json", "workdir")):
            self.need(inside)
        return f"{flag}{equals}{self.root / inside if path.startswith('/') else path}"

    def need(self, path: str) -> None:
        """Make a file, folder, run or export, once, or push an export to its address."""
        path = path.rstrip("/")
        if path.startswith("hf://"):
            exported = f"exported/{path.rpartition('/')[2].partition('@')[0]}"
            self.need(exported)
            push_exported(self.root / exported, path)
            return
        where = self.root / path
        if where.exists():
            return
        where.parent.mkdir(parents=True, exist_ok=True)
        if path in _RUNS:
            self.train([*f"--config={_RUNS[path]}".split(), f"--workdir={path}"])
        elif path.startswith("exported/"):
            trained = f"runs/{where.name.removesuffix('_features')}"
            self.need(trained)
            tool = importlib.import_module("dat_jax.export")
            options = ["--buckets=64x128,128x64"] if where.name == "quickstart_segmentation" else []
            options += ["--features=0,1,2,3"] if where.name.endswith("_features") else []
            values, positional = parse_flags("export", [trained, path, *options])
            tool.main(positional, values)
        elif path.startswith("weights/"):
            of_maps = dict(name="dat_pp_nano", **tiny_segmentation.BACKBONE)
            settings = of_maps if path.endswith(_OF_MAPS) else tiny_config.get_config().model.to_dict()
            settings = {key: value for key, value in settings.items() if key not in ("dtype", "deformable_form")}
            model = dat_jax.create_model(num_classes=2, **settings)
            export_model(where, model=model, variables=random_variables(model, np.zeros((1, 64, 64, 3), np.float32)))
        elif path in ("photo.jpg", "digit.png"):
            Image.fromarray(photographs(width=64, height=64)[0]).save(where)
        elif path == "photos":
            where.mkdir()
            for index in range(2):
                Image.fromarray(photographs(width=64, height=64)[index]).save(where / f"{index}.jpg")
        elif path.endswith(".yaml"):
            where.write_text(yaml.safe_dump({"MODEL": {"DAT": _NANO_YAML}}))
        elif path.endswith(".pth"):
            write_pth(where, self._published(path))
        elif path.endswith("/ADEChallengeData2016"):
            self._write_ade20k(where)
        elif path.endswith("/coco"):
            self._write_coco(where)
        elif path.startswith(("data/", "mnt/")) and not path.endswith("_v2"):
            for split in ("train", "val"):
                self._write_classes(where / split)
        else:  # ILSVRC archives, flowers and other validation sets: folders of classes do as well
            self._write_classes(
                where, count=12 if path.endswith(("/all", "_by_class")) else 8
            )  # these are split into two parts

    def _write_classes(self, directory, count=8):
        rng = np.random.default_rng(0)
        for name in ("left", "right"):
            (directory / name).mkdir(parents=True)
            for index in range(count):
                file = directory / name / f"{directory.name}_{name}_{index}"
                if "satellite" in directory.parts:
                    np.save(file, rng.integers(0, 4000, (40, 40, 12), dtype=np.uint16))
                    continue
                image = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                image = image[:, :, 0] if "gray" in directory.parts else image
                Image.fromarray(image).save(f"{file}.jpg")

    def _write_ade20k(self, directory):
        """Write data in the layout of the ADE20K release. Every second image has class 1 on one half and class 2 on the other."""
        names = "".join(f"{number}\t0\t0\t0\tthing {number}\n" for number in range(1, 151))
        rng = np.random.default_rng(0)
        for split, count in (("training", 8), ("validation", 2)):
            for folder in ("images", "annotations"):
                (directory / folder / split).mkdir(parents=True)
            for index in range(count):
                label = np.full((64, 64), 1 + index % 2, np.uint8)
                label[:32], label[:, :4] = 3, 0
                image = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8) + 40 * label[..., None]
                Image.fromarray(image).save(directory / "images" / split / f"ADE_{split}_{index:08}.jpg")
                Image.fromarray(label).save(directory / "annotations" / split / f"ADE_{split}_{index:08}.png")
        (directory / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + names)

    def _write_coco(self, directory):
        """Write data in the layout of the COCO release, with a bright square of one of two categories in every image."""
        rng = np.random.default_rng(0)
        for split, count in (("train2017", 8), ("val2017", 2)):
            images, annotations = {}, []
            for number in range(1, count + 1):
                mask = np.zeros((64, 64), bool)
                top, left = rng.integers(0, 32, 2)
                mask[top : top + 32, left : left + 32] = True
                images[number] = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8) + 120 * mask[..., None].astype(
                    np.uint8
                )
                annotations.append(coco_files.annotation(number, number, 1 + number % 2, mask))
            categories = [{"id": number, "name": f"square {number}"} for number in (1, 2)]
            described = dict(images=images, annotations=annotations, categories=categories)
            directory.mkdir(exist_ok=True)
            coco_files.write(directory, split=split, file=f"instances_{split}.json", **described)

    def _published(self, path):
        images, options = np.zeros((1, 64, 64, 3), np.float32), dict(num_classes=3)
        if path.startswith("upernet"):
            model = dat_jax.create_segmentor("upernet", backbone="dat_pp_nano", channels=8, **options)
            return segmentor_to_official(model, random_variables(model, images))
        if path.startswith("cascade"):
            model = dat_jax.create_detector(
                "cascade_mask_rcnn", backbone="dat_pp_nano", features=8, width=16, **options
            )
            return detector_to_official(model, random_variables(model, images))
        model = dat_jax.create_model("dat_pp_nano", **options)
        return to_official(model, random_variables(model, images)["params"])

    def train(self, arguments: list[str]) -> dict[str, float]:
        """Run ``python -m dat_jax.main`` with a small configuration of the same kind, on data of the same layout."""
        if not any(argument.startswith("--config=") for argument in arguments):
            self.need(next(flag.partition("=")[2] for flag in arguments if flag.startswith("--workdir=")))
        _, *arguments = add_recorded_config(["main", *arguments])
        values, config = parse_config("main", arguments)
        if values.print_config:
            return {}
        tiny = shrink(config)
        if tiny.init_from:
            self.need(tiny.init_from)
        if tiny.data.directory and not os.path.isabs(tiny.data.directory):
            self.need(tiny.data.directory)
        with mock.patch.object(sharding, "make_mesh", make_small_mesh):
            return (loop.evaluate if values.mode == "eval" else loop.train)(tiny, values.workdir, quiet=True)

    def check(self, arguments: list[str]) -> None:
        """Run ``python -m dat_jax.check`` likewise."""
        from dat_jax.preflight import command

        values, config = parse_config("check", arguments)
        skip = [*values.skip, "evaluation", "checkpoint", "algorithms"]
        with mock.patch.object(sharding, "make_mesh", make_small_mesh):
            assert not command.check(shrink(config), values.workdir, seconds=0.1, skip=skip)

    def report(self, arguments: list[str]) -> None:
        """Run ``python -m dat_jax.compile_report`` likewise, with batches of at most 16, for the CPU if a compiler is missing."""
        from dat_jax import compile_report
        from dat_jax.profiling import step_report

        values, config = parse_config("compile_report", arguments)
        values["config"].value = shrink(config)
        compiler = "jax_cuda12_plugin" if values.topology == "h100" else "libtpu"
        if importlib.util.find_spec(compiler) is None:
            values.topology, values.slices = "cpu", 1
        if values.choices:
            with kept_programs(None):
                tuning_command.tune_run(
                    values["config"].value, steps=values.steps, topology=values.topology, output=values.choices
                )
        with (
            kept_programs(None),
            mock.patch.object(flags, "FLAGS", values),
            mock.patch.object(step_report, "_LARGEST_BATCH", 16),
        ):
            compile_report.main([])

    def tune(self, arguments: list[str]) -> None:
        """Run ``python -m dat_jax.tune`` likewise."""
        values, config = parse_config("tune", arguments)
        topology = values.topology
        if topology and importlib.util.find_spec("libtpu") is None:
            topology = "cpu"
        with kept_programs(None), mock.patch.object(sharding, "make_mesh", make_small_mesh):
            tuning_command.tune_run(shrink(config), steps=values.steps, topology=topology, output=values.output)

    def clear(self, *paths: str) -> None:
        """Remove outputs that another command wrote too, since commands never overwrite files."""
        for path in paths:
            where = self.root / path
            shutil.rmtree(where) if where.is_dir() else where.unlink(missing_ok=True)
