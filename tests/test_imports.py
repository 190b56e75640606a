"""Who may import whom, read from the code, and that every module imports."""

import ast
import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dat_jax").rglob("*.py"))
}
# Package -> what of dat_jax and of third parties its modules may import. Standard library and numpy are free.
ALLOWED = {
    "dat_jax.ops": {"dat_jax.ops", "jax"},
    "dat_jax.models": {"dat_jax.models", "dat_jax.ops", "flax", "jax"},
    "dat_jax.tasks": {
        *("dat_jax.tasks", "dat_jax.data", "dat_jax.errors", "dat_jax.evaluation", "dat_jax.models", "dat_jax.ops"),
        "dat_jax.storage",
        *("jax", "matplotlib", "ml_collections", "optax"),  # matplotlib: a new task may draw its own figures
    },
    "dat_jax.data": {
        *("dat_jax.data", "dat_jax.cli", "dat_jax.errors", "dat_jax.storage"),
        *("PIL", "absl", "array_record", "cv2", "grain", "pycocotools", "rich", "tensorflow_datasets", "tifffile"),
    },
    "dat_jax.evaluation": {
        *("dat_jax.evaluation", "dat_jax.ops", "dat_jax.storage", "dat_jax.visualization", "jax", "pycocotools"),
    },
    "dat_jax.checkpoints": {
        *("dat_jax.checkpoints", "dat_jax.errors", "dat_jax.models", "dat_jax.parallel", "dat_jax.storage"),
        *("flax", "jax", "ml_collections", "orbax", "safetensors"),
    },
    "dat_jax.conversion": {
        *("dat_jax.conversion", "dat_jax.checkpoints", "dat_jax.cli", "dat_jax.errors", "dat_jax.models"),
        *("dat_jax.storage", "dat_jax.tasks", "absl", "etils", "flax", "jax", "ml_dtypes", "rich"),
        *("safetensors", "yaml"),
    },
    "dat_jax.training": {
        *("dat_jax.training", "dat_jax.checkpoints", "dat_jax.cli.console", "dat_jax.config", "dat_jax.errors"),
        *("dat_jax.models", "dat_jax.ops.calls", "dat_jax.ops.dispatch", "dat_jax.ops.triton.call", "dat_jax.parallel"),
        *("dat_jax.profiling", "dat_jax.evaluation", "dat_jax.storage", "dat_jax.tasks", "dat_jax.tuning"),
        "dat_jax.visualization",
        *("flax", "jax", "ml_collections", "optax", "rich", "tensorboardX", "wandb"),
    },
    "dat_jax.inference": {
        *("dat_jax.inference", "dat_jax.checkpoints", "dat_jax.cli", "dat_jax.data", "dat_jax.errors"),
        *("dat_jax.evaluation", "dat_jax.models", "dat_jax.storage", "dat_jax.tasks", "dat_jax.visualization"),
        *("PIL", "jax", "rich"),
    },
    "dat_jax.exporting": {
        *("dat_jax.exporting", "dat_jax.__version__", "dat_jax.checkpoints", "dat_jax.cli"),
        *("dat_jax.conversion.command", "dat_jax.data.buckets", "dat_jax.data.image_format", "dat_jax.errors"),
        *("dat_jax.inference", "dat_jax.models", "dat_jax.ops.dispatch", "dat_jax.storage", "dat_jax.tasks"),
        *("etils", "jax", "jax2onnx", "yaml"),
    },
    "dat_jax.profiling": {
        *("dat_jax.profiling", "dat_jax.cli", "dat_jax.config", "dat_jax.data", "dat_jax.errors"),
        *("dat_jax.models", "dat_jax.ops.dispatch", "dat_jax.parallel", "dat_jax.storage", "dat_jax.tasks"),
        *("dat_jax.training", "dat_jax.tuning.choices", "jax", "ml_collections", "rich"),
    },
    "dat_jax.tuning": {
        *("dat_jax.tuning", "dat_jax.__version__", "dat_jax.cli.console", "dat_jax.config", "dat_jax.errors"),
        *("dat_jax.ops", "dat_jax.profiling", "dat_jax.storage", "dat_jax.training", "jax", "ml_collections", "rich"),
    },
    "dat_jax.preflight": {
        *("dat_jax.preflight", "dat_jax.checkpoints", "dat_jax.cli.console", "dat_jax.config", "dat_jax.data.sources"),
        *("dat_jax.errors", "dat_jax.parallel", "dat_jax.profiling", "dat_jax.storage", "dat_jax.training"),
        *("jax", "ml_collections", "rich"),
    },
    "dat_jax.visualization": {
        *("dat_jax.visualization", "dat_jax.cli.files", "dat_jax.data", "dat_jax.errors", "dat_jax.evaluation"),
        *("dat_jax.inference", "dat_jax.storage", "PIL", "matplotlib"),
    },
    "dat_jax.config": {"dat_jax.config", "dat_jax.errors", "dat_jax.storage", "absl", "ml_collections"},
    "dat_jax.cli": {"dat_jax.__version__", "dat_jax.errors", "dat_jax.storage", "absl", "rich"},
    "dat_jax.parallel": {"dat_jax.errors", "dat_jax.ops.dispatch", "jax"},
    "dat_jax.storage": {"dat_jax.storage", "dat_jax.errors", "etils", "fsspec", "huggingface_hub"},
    "dat_jax.errors": set(),
    # Entry points
    "dat_jax.__main__": {"dat_jax.__version__", "dat_jax.cli", "dat_jax.errors", "dat_jax.models.catalogue"},
    "dat_jax.check": {
        *("dat_jax.cli", "dat_jax.config", "dat_jax.errors", "dat_jax.parallel", "dat_jax.preflight", "absl"),
    },
    "dat_jax.compile_report": {"dat_jax.cli", "dat_jax.config", "dat_jax.errors", "dat_jax.profiling", "absl"},
    "dat_jax.tune": {"dat_jax.cli", "dat_jax.config", "dat_jax.errors", "dat_jax.tuning", "absl"},
    "dat_jax.predict": {"dat_jax.cli", "dat_jax.errors", "dat_jax.inference", "absl"},
    "dat_jax.export": {"dat_jax.cli", "dat_jax.errors", "dat_jax.exporting", "absl"},
    "dat_jax.visualize": {"dat_jax.cli", "dat_jax.errors", "dat_jax.visualization", "absl"},
}
STANDARD = {*sys.stdlib_module_names, "numpy"}


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                member = f"{node.module}.{name.name}"  # `from dat_jax.cli import flags` imports dat_jax.cli.flags
                found.add(member if member in MODULES or node.module == "dat_jax" else node.module)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_only_what_its_layer_may(module):
    importlib.import_module(module)
    for package, allowed in ALLOWED.items():
        if module == package or module.startswith(package + "."):
            for name in imports(MODULES[module]):
                assert name.split(".")[0] in STANDARD or any(
                    name == base or name.startswith(base + ".") for base in allowed
                ), f"{module} imports {name}"


def test_the_rules_cover_every_package():
    top = {".".join(module.split(".")[:2]) for module in MODULES} - {"dat_jax", "dat_jax.main"}
    assert top == set(ALLOWED)


@pytest.mark.parametrize(
    ("word", "only_in"),
    [
        ("orbax.checkpoint", {"dat_jax/checkpoints/arrays.py", "dat_jax/checkpoints/manager.py"}),
        (
            '"fsdp"',
            {"dat_jax/parallel/sharding.py", "dat_jax/config/common.py"},
        ),  # the configuration's key of the same name
        ("import torch", set()),
        ("import tensorflow\n", set()),
        ("import tensorflow as", set()),
        ("import tensorflow_datasets", {"dat_jax/data/prepare.py", "dat_jax/data/sources.py"}),
        ("from huggingface_hub", {"dat_jax/storage/hub.py"}),
        ("from pycocotools", {"dat_jax/data/coco.py", "dat_jax/evaluation/detection.py"}),
        ("import pycocotools", set()),
    ],
)
def test_what_stands_in_one_place_stands_nowhere_else(word, only_in):
    found = {str(path.relative_to(ROOT)) for path in MODULES.values() if word in path.read_text()}
    assert found == only_in
