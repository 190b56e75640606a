"""The programs that an evaluation compiles for images of many sizes: how many there are, and how long that takes."""

import logging
import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from dat_jax.config.validation import validate
from dat_jax.data.buckets import Shape
from dat_jax.ops.dispatch import compiling_for
from dat_jax.parallel import sharding
from dat_jax.profiling.step_report import COMPILER_OPTIONS
from dat_jax.profiling.topologies import TARGET_CONFIG, find_devices
from dat_jax.training.compilation import known_options
from dat_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)


def report_evaluation(
    config: ConfigDict, *, topology: str, target_config: str | pathlib.Path = TARGET_CONFIG
) -> dict[str, Any]:
    """Compile the network for the arrays of an evaluation. The sizes of the validation images are read.

    The other programs of an evaluation, which cut windows and compare classes, are not counted.

    Args:
      config: configuration of the run; ``config.eval.buckets`` chooses the arrays.
      topology, target_config: see ``find_devices``.

    Returns:
      {"topology", "device", "model", "buckets": value of ``config.eval.buckets``, "batch_size", "programs": [{"shape": (height,
      width), "images", "lower_seconds", "compile_seconds"}], "seconds": of all programs, "sizes": number of programs with
      buckets="exact"}.

    Raises:
      UserError: settings do not fit together, or the data cannot be read.
    """
    chip, devices = find_devices(topology, target_config=target_config)
    validate(config)
    with compiling_for(chip.platform):
        trainer = Trainer(config, devices=devices)
        task = trainer.task
        programs = []
        for shape, images in task.count_eval_arrays(task.eval_buckets).items():
            programs.append({"shape": shape, "images": images, **_compile(trainer, shape, platform=chip.platform)})
            logger.info("%d x %d: compiled in %.1f s", *shape, programs[-1]["compile_seconds"])
    return {
        "topology": topology,
        "device": devices[0].device_kind,
        "model": config.model.name,
        "buckets": config.eval.get("buckets", "exact"),
        "batch_size": config.eval.batch_size,
        "programs": programs,
        "seconds": sum(program["lower_seconds"] + program["compile_seconds"] for program in programs),
        "sizes": len(task.count_eval_arrays(None)),
    }


def _compile(trainer: Trainer, shape: Shape, *, platform: str) -> dict[str, float]:
    """Compile the prediction of a batch in arrays of (height, width)."""
    size, where = trainer.config.eval.batch_size, sharding.batch_sharding(trainer.mesh)
    example = trainer.task.eval_example(size, shape)
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in example.items()}
    start = time.perf_counter()
    lowered = jax.jit(trainer.objective.predict).lower(trainer.abstract_state.eval_variables, batch)
    lowered_at = time.perf_counter()
    lowered.compile(known_options(COMPILER_OPTIONS.get(platform, {})))
    return {"lower_seconds": lowered_at - start, "compile_seconds": time.perf_counter() - lowered_at}
