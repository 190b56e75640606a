"""The tools of the package: python -m dat_jax [TOOL [ARGUMENT ...]] [--version]"""

import runpy
import sys
from typing import NamedTuple

from dat_jax import __version__
from dat_jax.command_line import HELP_FLAGS, fail, find_nearest, run_interruptible


class Tool(NamedTuple):
    """What a tool is for, in a line, and a call of it, after its name."""

    purpose: str
    example: str


TOOLS = {
    "main": Tool("trains and evaluates", "--config=configs/quickstart.py --workdir=runs/quickstart"),
    "predict": Tool("says what is in images", "runs/quickstart photo.jpg"),
    "visualize": Tool("draws what a model sees", "runs/quickstart photo.jpg --output=seen --html"),
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
    lines = [f"dat_jax {__version__}: the tools, each with its own --help.", ""]
    for name, tool in TOOLS.items():
        lines += [f"{name}: {tool.purpose}", f"    python -m dat_jax.{name} {tool.example}"]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Lists the tools, or calls one: ``python -m dat_jax predict ...`` is ``python -m dat_jax.predict ...``."""
    if not arguments or arguments[0] in HELP_FLAGS:
        print(describe())
    elif arguments[0] == "--version":
        print(f"dat_jax {__version__}")
    elif arguments[0] not in TOOLS:
        near = find_nearest(arguments[0], TOOLS)
        fail(f"There is no tool {arguments[0]!r}; did you mean {near}? `python -m dat_jax` lists all.")
    else:
        sys.argv[1:] = arguments[1:]
        runpy.run_module(f"dat_jax.{arguments[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_interruptible(lambda: main(sys.argv[1:]))
