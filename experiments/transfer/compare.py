"""Ways to learn three digits from 5, 20 or 100 images each, after training on the seven others.

JAX_PLATFORMS=cpu python -m experiments.transfer.compare [--images=5,20,100] [--seeds=0,1,2] [--workdir=DIR] [--ways=WAY,...]

- The digits 0 to 6 of the embedded MNIST (400 images each) train dat_pp_nano and a teacher with twice its channels, with the
  recipe of the quickstart. Then each way learns 7, 8 and 9 from the first images of a random order that depends on the seed, in
  the same number of steps, and is evaluated at its end with the 300 validation images of these digits.
- "scratch" starts from random weights, all others from those of the seven digits. "head" trains the head only, "all" all
  weights, "layer decay" all with `optimizer.layer_decay=0.75`, "LoRA" adapters of rank 4 and the head, and "distillation" all
  with the loss of a teacher of the soft kind (weight 0.5, temperature 2), which learned from the same images. The teacher itself
  is listed, too.
- Learning rates were chosen once for each way and not tuned; they are in the table.
- Runs that have finished are kept in the work directory, and are not repeated.
"""

import json
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import measure

_OLD, _NEW = range(7), (7, 8, 9)
_BATCH = 12
TEACHER = dict(dim_stem=64, dims=(64, 128, 256, 384), num_heads=(2, 4, 8, 12), num_groups=(1, 2, 4, 6))
WAYS: dict[str, dict[str, Any]] = {
    "scratch": {"schedule.base_lr": 2e-3},
    "head": {"schedule.base_lr": 5e-3, "optimizer.freeze": ("all_but_head",)},
    "all": {"schedule.base_lr": 5e-4},
    "layer decay": {"schedule.base_lr": 1e-3, "optimizer.layer_decay": 0.75},
    "LoRA": {"schedule.base_lr": 2e-3, "lora.rank": 4},
    "teacher": {"schedule.base_lr": 5e-4},
    "distillation": {"schedule.base_lr": 5e-4, "distillation.weight": 0.5, "distillation.temperature": 2.0},
}


def write_digits(directory: pathlib.Path, digits, *, count: int | None = None, seed: int = 0) -> pathlib.Path:
    """Write folders of PNG files, train/<digit> with ``count`` images each and val/<digit> with all."""
    import cv2

    from dat_jax.data.sources import load_source

    if directory.exists():
        return directory
    for split, folder in (("train", "train"), ("validation", "val")):
        source = load_source("mnist5k", split=split)
        labels = np.asarray(source.labels)
        for digit in digits:
            indices = np.flatnonzero(labels == digit)
            if split == "train":
                indices = np.random.default_rng(seed).permutation(indices)[:count]
            (directory / folder / str(digit)).mkdir(parents=True)
            for index in indices:
                image = source[int(index)]["image"]
                cv2.imwrite(str(directory / folder / str(digit) / f"{index}.png"), image)
    return directory


def make_config(data: pathlib.Path, *, teacher: bool, **values):
    """The recipe of the quickstart for other digits, with changed values."""
    from dat_jax.config import load_config

    config = load_config("quickstart").unlock()
    if teacher:
        config.model.update(TEACHER)
    config.data.directory = str(data)
    config.update_from_flattened_dict(values)
    return config.lock()


def run(config, workdir: pathlib.Path) -> dict[str, float]:
    """Train, unless it has been done before. Returns the metrics of the best checkpoint."""
    from dat_jax.training import loop

    result = workdir / "result.json"
    if not result.exists():
        metrics = loop.train(config, str(workdir), quiet=True)
        result.write_text(json.dumps(metrics))
    return json.loads(result.read_text())


def pretrain(root: pathlib.Path, names: Sequence[str], *, steps: int) -> None:
    """Train "model" and "teacher" on the seven digits, as long as the quickstart if the number of steps is 0."""
    data = write_digits(root / "old_digits", _OLD)
    for name in names:
        accuracy = run(make_config(data, teacher=name == "teacher", steps=steps), root / name)["top1"]
        print(f"{name}: {accuracy:.2f} % of the seven digits", flush=True)


def adapt(root: pathlib.Path, way: str, images: int, seed: int, *, steps: int) -> float:
    """Learn the three digits in one way; the accuracy in percent."""
    data = write_digits(root / f"digits_{images}_{seed}", _NEW, count=images, seed=seed)
    values = {"steps": steps, "batch_size": _BATCH, "eval.every_steps": steps, "eval.batch_size": 150, "seed": seed}
    values |= {"schedule.reference_batch_size": _BATCH, "schedule.warmup_epochs": 0.1 * steps * _BATCH / (3 * images)}
    values |= {"log_every": steps, "logs": ()}
    if way != "scratch":
        values["init_from"] = str(root / ("teacher" if way == "teacher" else "model"))
    if way == "distillation":
        values["distillation.teacher"] = str(root / f"teacher_{images}_{seed}")
    config = make_config(data, teacher=way == "teacher", **values, **WAYS[way])
    return run(config, root / f"{way.replace(' ', '_')}_{images}_{seed}")["top1"]


def main(arguments=None) -> None:
    """Run all ways and write the table."""
    parser = measure.make_parser(__file__, __doc__, repeats=1, min_seconds=0)
    parser.add_argument("--images", type=measure.numbers, default=[5, 20, 100], help="images of each digit")
    parser.add_argument("--seeds", type=measure.numbers, default=[0, 1, 2], help="seeds")
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of the runs; by default a temporary one")
    parser.add_argument(
        "--ways",
        type=lambda text: text.split(","),
        default=list(WAYS),
        help="some of the ways; distillation needs teacher before it",
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each way")
    parser.add_argument("--pretraining-steps", type=int, default=0, help="steps before; 0: as the quickstart")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.workdir or pathlib.Path(temporary)
        names = ("model", "teacher") if "teacher" in options.ways else ("model",)
        pretrain(root, names, steps=options.pretraining_steps)
        found: dict[tuple[str, int], list[float]] = {}
        for seed in options.seeds:
            for images in options.images:
                for way in options.ways:
                    accuracy = adapt(root, way, images, seed, steps=options.steps)
                    found.setdefault((way, images), []).append(accuracy)
                    print(f"{way}, {images} images, seed {seed}: {accuracy:.2f} %", flush=True)
    rows = []
    for way in options.ways:
        row = {"way": way, "learning rate": f"{WAYS[way]['schedule.base_lr']:g}"}
        for images in options.images:
            accuracies = found[way, images]
            row[f"{images} images each, %"] = (
                f"{statistics.mean(accuracies):.1f} ({min(accuracies):.1f} to {max(accuracies):.1f})"
            )
        rows.append(row)
    text = f"Mean top-1 accuracy over the seeds {options.seeds}, with the lowest and the highest.\n\n"
    sections = {"": options.command, "Accuracy": text + measure.format_table(rows)}
    measure.write_results(options.output, title="New classes from few images", sections=sections)


if __name__ == "__main__":
    main()
