"""What the trainings cost: estimated chip-hours of the packaged configurations, without compiling or running them.

python -m experiments.costs.estimate [--configs=dat_pp_t,upernet:dat_pp_b] [--output=DIR]

**Estimates: no configuration has run on these chips.** The columns of the first table are:

- **steps**, **images**: of the whole training, from the configuration, for the training sets of ImageNet-1k (1,281,167 images),
  ADE20K (20,210) and COCO (117,266 images with an annotated object).
- **GFLOPs per image**: model FLOPs of a training step, three times the matrix products and convolutions of the forward pass,
  counted in the traced model (`Trainer.count_model_flops`). Recomputation (`remat`) is not counted. For detectors the image has
  the largest shape that the configuration trains with, so their figures are upper bounds.
- **v5e**, **v6e**, **H100**: chip-hours at 10, 30, 50 and 70 % utilization: images x FLOPs per image / (utilization x peak
  FLOP/s in bfloat16). The utilization is the share of peak FLOP/s, which runs log as model FLOPs utilization.
- **evaluations**: additional FLOPs of the evaluations during the training, for the 50,000 validation images of ImageNet-1k.

The second table has what memory bandwidth permits, for the configurations whose training step was compiled. GB per image are the
compiler's figures of `docs/benchmarks.md` and `docs/many_hosts.md`. They may be too high, because they include memory on the
chip, or too low, because each loop body counts once. If a figure is right, the speed is at most the bandwidth divided by it,
which gives the images/s, the utilization and the chip-hours.
"""

import argparse
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from experiments import measure

CHIPS = ("v5e", "v6e", "h100")
_LABELS = {"h100": "H100"}
UTILIZATIONS = (0.1, 0.3, 0.5, 0.7)
TRAIN_IMAGES = {"classification": 1_281_167, "segmentation": 20_210, "detection": 117_266}
_EVAL_IMAGES = 50_000
_SMALL = ("finetune", "quickstart", "tiny")  # configurations for other data
# Memory traffic of a compiled training step: configuration, chip, GB per image, and what it is.
TRAFFIC = (
    ("dat_pp_t", "v5e", 0.0189 * 819 / 16, "operands and results in HBM"),  # 18.9 ms for 16 images
    ("dat_pp_t", "v5e", 0.098 * 819 / 16, "all operands and results"),  # 98 ms
    ("dat_pp_t", "v5e", 0.44, "Pallas kernels, no remat, no loops: compiler's count"),
    ("upernet:dat_pp_b", "v5e", 50.0, "compiler's count"),
    ("upernet:dat_pp_t", "h100", 24.0, "operands and results"),
    ("mask_rcnn:dat_pp_t_1x", "v5e", 83.0, "compiler's count"),
    ("cascade_mask_rcnn:dat_pp_b_3x", "v5e", 157.0, "compiler's count"),
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments."""
    from dat_jax.config import list_configs

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder for results.md"
    )
    names = [name for name in list_configs() if not name.startswith(_SMALL)]
    names.sort(key=lambda name: (":" in name, "pp" not in name))  # DAT++ classifiers first, then v1, then families
    parser.add_argument("--configs", type=measure.words, default=names, help="names of packaged configurations")
    options = parser.parse_args(arguments)
    if unknown := set(options.configs) - set(names):
        parser.error(f"argument --configs: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return options


def estimate(name: str) -> dict[str, Any]:
    """Length and FLOPs of the training of a configuration.

    Returns:
      {"steps", "images", "flops": per image, "eval_share": FLOPs of the evaluations relative to those of the training, or None}.
    """
    import jax

    from dat_jax.config import load_config
    from dat_jax.ops.dispatch import compiling_for
    from dat_jax.profiling.step_report import make_sources
    from dat_jax.training.trainer import Trainer

    config = load_config(name)
    sources = make_sources(config, classes=None, examples=TRAIN_IMAGES[config.task])
    with compiling_for("tpu"):
        trainer = Trainer(config, devices=jax.devices("cpu")[:1], sources=sources)
        flops = trainer.count_model_flops()
    plan = trainer.plan
    images = plan.total_steps * trainer.config.batch_size
    evaluated = plan.total_steps // plan.eval_steps * _EVAL_IMAGES / 3  # a forward pass
    return {
        "steps": plan.total_steps,
        "images": images,
        "flops": flops,
        "eval_share": evaluated / images if config.task == "classification" else None,
    }


def chip_hours(result: dict[str, Any], chip: str, utilization: float) -> float:
    """Chip-hours of a training at a share of the chip's peak FLOP/s."""
    from dat_jax.profiling.topologies import CHIPS as PEAKS

    peak = PEAKS[chip].flops_per_second
    assert peak is not None
    return result["images"] * result["flops"] / (utilization * peak) / 3600


def memory_limit(result: dict[str, Any], chip: str, gigabytes: float) -> tuple[float, float]:
    """Images/s per chip that its memory bandwidth permits, and the share of peak FLOP/s at that speed.

    Args:
      result: see ``estimate``.
      chip: name of a chip.
      gigabytes: memory traffic per image.
    """
    from dat_jax.profiling.topologies import CHIPS as PEAKS

    bandwidth, peak = PEAKS[chip].bytes_per_second, PEAKS[chip].flops_per_second
    assert bandwidth is not None
    assert peak is not None
    images_per_second = bandwidth / (1e9 * gigabytes)
    return images_per_second, images_per_second * result["flops"] / peak


def format_hours(hours: float) -> str:
    """Two significant digits below 10, whole hours above."""
    return f"{hours:,.0f}" if hours >= 9.95 else f"{hours:.2g}"


def format_row(name: str, result: dict[str, Any]) -> dict[str, str]:
    """Row of the first table."""
    hours = {
        _LABELS.get(chip, chip): " / ".join(format_hours(chip_hours(result, chip, share)) for share in UTILIZATIONS)
        for chip in CHIPS
    }
    share = result["eval_share"]
    return {
        "configuration": f"`{name}`",
        "steps": f"{result['steps']:,}",
        "images, M": f"{result['images'] / 1e6:.1f}",
        "GFLOPs per image": measure.format_number(result["flops"] / 1e9),
        **hours,
        "evaluations": "-" if share is None else f"+{100 * share:.1f} %",
    }


def format_limit(name: str, chip: str, gigabytes: float, source: str, result: dict[str, Any]) -> dict[str, str]:
    """Row of the second table."""
    speed, share = memory_limit(result, chip, gigabytes)
    return {
        "configuration": f"`{name}`",
        "chip": _LABELS.get(chip, chip),
        "GB per image": f"{gigabytes:.2g}" if gigabytes < 10 else f"{gigabytes:.0f}",
        "figure": source,
        "images/s": measure.format_number(speed),
        "utilization": f"{100 * share:.0f} %",
        "chip-hours": format_hours(result["images"] / speed / 3600),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print and write the tables."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # models are only traced
    options = parse(arguments)
    explanation = __doc__.strip().split("\n\n", 2)[2]
    flags = [] if options.configs == parse([]).configs else [f"--configs={','.join(options.configs)}"]
    results = {name: estimate(name) for name in options.configs}
    limits = [format_limit(*row, results[row[0]]) for row in TRAFFIC if row[0] in results]
    command = shlex.join(("python", "-m", "experiments.costs.estimate", *flags))
    sections = {
        "": f"`{command}`\n\n{explanation}",
        "Chip-hours at 10 / 30 / 50 / 70 % utilization": measure.format_table(
            [format_row(*item) for item in results.items()]
        ),
    }
    if limits:
        sections["Limit by memory bandwidth"] = measure.format_table(limits)
    measure.write_results(options.output, title="Estimated cost of the trainings", sections=sections)


if __name__ == "__main__":
    main()
