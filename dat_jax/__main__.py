"""The command dat-jax: dat-jax [TOOL [ARGUMENT ...]] [--version], the same as python -m dat_jax."""

import runpy
import sys
from typing import NamedTuple

from dat_jax import __version__
from dat_jax.cli.flags import HELP_FLAGS, fail, find_nearest, run_interruptible
from dat_jax.errors import UserError, explain_missing_module


class Tool(NamedTuple):
    """A tool.

    Attributes:
      module: its module below dat_jax, for ``python -m dat_jax.MODULE``; "" for a function of this module.
      purpose: what it does, in one line.
      example: arguments of an example.
    """

    module: str
    purpose: str
    example: str


TOOLS = {
    "train": Tool("main", "train a model, or evaluate one", "--config=quickstart --workdir=runs/quickstart"),
    "check": Tool(
        "check",
        "try every part of a training run on its machines, and estimate how long it takes",
        "--config=quickstart --workdir=runs/quickstart",
    ),
    "predict": Tool("predict", "classify, segment or detect objects in images", "runs/quickstart photo.jpg"),
    "visualize": Tool(
        "visualize", "draw what a model attends to", "runs/quickstart photo.jpg --output=attention --html"
    ),
    "export": Tool("export", "export a trained model for other programs", "runs/quickstart exported/quickstart"),
    "convert": Tool(
        "conversion", "convert published weights, or export them back", "upernet_dat_s.pth weights/upernet_dat_pp_s"
    ),
    "prepare": Tool(
        "data.prepare",
        "convert ImageNet archives or class folders to a data set that loads fast",
        "--train=ILSVRC2012_img_train.tar --validation=ILSVRC2012_img_val.tar --output=/data/imagenet",
    ),
    "split": Tool(
        "data.split",
        "split one folder of classes into training and validation images",
        "flowers/all --output=/data/flowers",
    ),
    "report": Tool(
        "compile_report",
        "memory, FLOPs and bytes of a step on a TPU or GPU that is not attached",
        "--config=dat_pp_t --topology=v5e:2x2",
    ),
    "tune": Tool("tune", "compare the implementations of each op of a run on this device", "--config=dat_pp_t"),
    "models": Tool("", "list models with their sizes and published accuracies", "'dat_pp*'"),
}


def describe() -> str:
    """The list of tools."""
    width = max(map(len, TOOLS))
    lines = [f"dat_jax {__version__}. Tools, each with --help and an example:", ""]
    for name, tool in TOOLS.items():
        lines += [f"  {name:{width}}  {tool.purpose}", f"  {'':{width}}    dat-jax {name} {tool.example}"]
    return "\n".join([*lines, "", "`python -m dat_jax` is the same command."])


def print_models(pattern: str) -> None:
    """Prints a table of the models whose names match a pattern; fails if there is none."""
    from dat_jax.cli.console import make_console
    from dat_jax.models.catalogue import describe_models

    models = describe_models(pattern)
    if not models:
        names = [model.name for model in describe_models()]
        fail(f"There is no model {pattern!r}; did you mean {find_nearest(pattern, names)}? Models: {', '.join(names)}.")
    columns = ("model", "image size", "parameters", "multiply-adds, G", "top-1, % (published)")
    rows = [
        (
            *(model.name, str(model.image_size)),
            "-" if model.parameters is None else f"{model.parameters:,}",
            "-" if model.multiply_adds is None else f"{model.multiply_adds / 1e9:.2f}",
            "-" if model.top1 is None else f"{model.top1:.1f}",
        )
        for model in models
    ]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    console = make_console()
    for name, *values in (columns, *rows):
        numbers = (f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
        console.print("  ".join([f"{name:{widths[0]}}", *numbers]))


def main(arguments: list[str]) -> None:
    """Lists the tools, or runs one: ``dat-jax predict ...`` is ``python -m dat_jax.predict ...``."""
    name, *rest = arguments or ["--help"]
    if name in HELP_FLAGS:
        print(describe())
    elif name == "--version":
        print(f"dat_jax {__version__}")
    elif name == "models" and not (rest and rest[0] in HELP_FLAGS):
        print_models((rest or ["*"])[0])
    elif name == "models":
        print(
            "dat-jax models ['PATTERN']\n\nLists the models whose names match a pattern with * and ?, by default all."
        )
    elif name.partition("=")[0] == "--list_models":  # another form of `models`
        print_models(name.partition("=")[2] or (rest or ["*"])[0])
    else:
        _run_module(_find_module(name), rest)


def _find_module(name: str) -> str:
    """The module of a tool, which can also be named by its module."""
    modules = {tool.module: tool.module for tool in TOOLS.values() if tool.module}
    modules |= {command: tool.module for command, tool in TOOLS.items() if tool.module}
    if name not in modules:
        fail(f"There is no tool {name!r}; did you mean {find_nearest(name, TOOLS)}? `dat-jax` lists all tools.")
    return modules[name]


def _run_module(module: str, arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    try:
        runpy.run_module(f"dat_jax.{module}", run_name="__main__", alter_sys=True)
    except UserError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        message = explain_missing_module(error.name)
        if message is None:
            raise
        fail(message)


def run() -> None:
    """Entry point of the command ``dat-jax``."""
    run_interruptible(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    run()
