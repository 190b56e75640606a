"""Averaged weights, MESA and distillation on the quickstart, beside its plain recipe.

JAX_PLATFORMS=cpu python -m experiments.recipe.compare [--seeds=0,1,2] [--workdir=DIR] [--runs=RUN,...]

- Every run is that of configs/quickstart.py with the changes in the table, and is evaluated once, after its last step, on the
  1,000 validation digits: no checkpoint is selected.
- Averages do not change the training, so those of a run are listed beside its own weights. With a warm-up, the decay of step n
  is at most 1 - (1 + n) ** (-2 / 3).
- MESA evaluates the averaged weights that it learns from.
- The teacher has twice the channels of the model, and was trained once with the same recipe, with seed 100. It is listed, too.
- Nothing was tuned.
- Runs that have finished are kept in the work directory, and are not repeated.
"""

import pathlib
import statistics
import tempfile
from typing import Any

from experiments import measure
from experiments.transfer.compare import TEACHER, run

_DECAYS = (0.9, 0.98, 0.995)
_MESA_DECAY = 0.98
_TEACHER_SEED = 100
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"ema_decays": _DECAYS},
    "averages with warm-up": {"ema_decays": _DECAYS, "ema_warmup": True},
    "MESA": {"ema_decay": _MESA_DECAY, "mesa.weight": 1.0},
    "soft distillation": {"distillation.kind": "soft", "distillation.weight": 0.5, "distillation.temperature": 2.0},
    "hard distillation": {"distillation.kind": "hard", "distillation.weight": 0.5},
    "distillation of features": {"distillation.kind": "features", "distillation.weight": 0.5},
}


def make_config(values: dict[str, Any], *, seed: int, steps: int, teacher: bool = False):
    """The configuration of the quickstart with changed values, evaluated after its last step only."""
    from dat_jax.config import load_config

    config = load_config("quickstart").unlock()
    if teacher:
        config.model.update(TEACHER)
    config.eval.every = config.epochs
    config.update_from_flattened_dict({"seed": seed, "steps": steps, "eval.every_steps": steps, "logs": (), **values})
    return config.lock()


def name_weights(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """Accuracy in percent of the weights that a run has evaluated, by their description."""
    own = f"{name}: average, decay {_MESA_DECAY}" if name == "MESA" else f"{name}: weights of the last step"
    found = {own: metrics["top1"]}
    for key, value in metrics.items():
        average, _, metric = key.partition("/")
        if metric == "top1":
            found[f"{name}: average, decay {average.removeprefix('ema_')}"] = value
    return found


def main(arguments=None) -> None:
    """Run all recipes and write the table."""
    parser = measure.make_parser(__file__, __doc__, repeats=1, min_seconds=0)
    parser.add_argument("--seeds", type=measure.numbers, default=[0, 1, 2], help="seeds")
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of the runs; by default a temporary one")
    parser.add_argument("--runs", type=lambda text: text.split(","), default=list(RUNS), help="some of the runs")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0: as the quickstart")
    options = parser.parse_args(arguments)
    runs, steps = {name: RUNS[name] for name in options.runs}, options.steps
    with tempfile.TemporaryDirectory() as temporary:
        root = options.workdir or pathlib.Path(temporary)
        teacher = ""
        if any("distillation.kind" in values for values in runs.values()):
            accuracy = run(make_config({}, seed=_TEACHER_SEED, steps=steps, teacher=True), root / "teacher")["top1"]
            teacher = f" The teacher has {accuracy:.1f} %."
        found: dict[str, list[float]] = {}
        for seed in options.seeds:
            for name, values in runs.items():
                if "distillation.kind" in values:
                    values = values | {"distillation.teacher": str(root / "teacher")}
                metrics = run(make_config(values, seed=seed, steps=steps), root / f"{name.replace(' ', '_')}_{seed}")
                for weights, accuracy in name_weights(name, metrics).items():
                    found.setdefault(weights, []).append(accuracy)
                    print(f"{weights}, seed {seed}: {accuracy:.2f} %", flush=True)
    plain = next(iter(found.values()))
    rows = []
    for weights, accuracies in found.items():
        differences = [own - reference for own, reference in zip(accuracies, plain, strict=True)]
        rows.append(
            {
                "run: weights": weights,
                "top-1, %": f"{statistics.mean(accuracies):.2f}",
                "lowest to highest": f"{min(accuracies):.1f} to {max(accuracies):.1f}",
                "mean difference to the first row": f"{statistics.mean(differences):+.2f}",
            }
        )
    changes = [
        {"run": name, "changes": ", ".join(f"{k}={v}" for k, v in values.items())} for name, values in runs.items()
    ]
    text = f"Seeds {options.seeds}.{teacher}\n\n"
    sections = {
        "": options.command,
        "Accuracy": text + measure.format_table(rows),
        "Runs": measure.format_table(changes),
    }
    measure.write_results(options.output, title="Recipes on the quickstart", sections=sections)


if __name__ == "__main__":
    main()
