"""The tools of the package: python -m dat_jax [TOOL [ARGUMENT ...]] [--version] [--list_models[=PATTERN]]"""

import runpy
import sys
from typing import NamedTuple

from dat_jax import __version__
from dat_jax.cli.flags import HELP_FLAGS, fail, find_nearest, run_interruptible


class Tool(NamedTuple):
    """What a tool is for, in a line, and a call of it, after its name."""

    purpose: str
    example: str


TOOLS = {
    "main": Tool("trains and evaluates", "--config=configs/quickstart.py --workdir=runs/quickstart"),
    "predict": Tool("says what is in images", "runs/quickstart photo.jpg"),
    "visualize": Tool("draws what a model sees", "runs/quickstart photo.jpg --output=seen --html"),
    "export": Tool("a trained model for other programs", "runs/quickstart exported/quickstart"),
    "compile_report": Tool(
        "memory, FLOPs and bytes of a step on a chip that is not there",
        "--config=configs/dat_pp_t.py --topology=v5e:2x2",
    ),
    "conversion": Tool("published weights to ours, and back", "upernet_dat_s.pth weights/upernet_dat_pp_s"),
    "data.prepare": Tool(
        "ImageNet's archives, or folders of images, to a data set that loads fast",
        "--train=ILSVRC2012_img_train.tar --validation=ILSVRC2012_img_val.tar --output=/data/imagenet",
    ),
}


def describe() -> str:
    """What is printed without arguments."""
    lines = [f"dat_jax {__version__}: the tools, each with its own --help; --list_models[='*pp*'] lists models.", ""]
    for name, tool in TOOLS.items():
        lines += [f"{name}: {tool.purpose}", f"    python -m dat_jax.{name} {tool.example}"]
    return "\n".join(lines)


def print_models(pattern: str) -> None:
    """A table of the models whose names match; a mistake where none does."""
    from dat_jax.cli.console import make_console
    from dat_jax.models.catalogue import describe_models

    found = describe_models(pattern)
    if not found:
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
        for model in found
    ]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    console = make_console()
    for name, *values in (columns, *rows):
        numbers = (f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
        console.print("  ".join([f"{name:{widths[0]}}", *numbers]))


def main(arguments: list[str]) -> None:
    """Lists the tools, or calls one: ``python -m dat_jax predict ...`` is ``python -m dat_jax.predict ...``."""
    if not arguments or arguments[0] in HELP_FLAGS:
        print(describe())
    elif arguments[0] == "--version":
        print(f"dat_jax {__version__}")
    elif arguments[0].partition("=")[0] == "--list_models":
        print_models(arguments[0].partition("=")[2] or (arguments[1:] or ["*"])[0])
    elif arguments[0] not in TOOLS:
        near = find_nearest(arguments[0], TOOLS)
        fail(f"There is no tool {arguments[0]!r}; did you mean {near}? `python -m dat_jax` lists all.")
    else:
        sys.argv[1:] = arguments[1:]
        runpy.run_module(f"dat_jax.{arguments[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_interruptible(lambda: main(sys.argv[1:]))
