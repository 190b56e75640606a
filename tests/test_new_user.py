"""The documents' commands for a bare machine, as they are: a clean copy, an environment of its own, packages, a training.

One epoch of it is done, of as many as the configuration has. They want a network for the packages. Those of extras, which are
large or for devices that are not there, pip finds and does not install.
"""

import json
import os
import re
import shlex
import subprocess

import pytest

from tests.helpers import documents
from tests.helpers.documents import ROOT

pytestmark = pytest.mark.slow

PATH_HEADING = "## From installation to an exported model"
# What installs packages; `make train` also trains. The rest of the path is in its block.
INSTALLS = r"make train$|python3 -m venv |(python -m )?pip install "


@pytest.fixture
def bare(tmp_path):
    """A function that runs a line of a shell in a copy of the project; without what these tests' environment sets."""
    documents.copy_project(tmp_path)
    quickstart = tmp_path / "configs" / "quickstart.py"
    text, count = re.subn(r"config\.epochs = \d+", "config.epochs = 1", quickstart.read_text())
    assert count == 1
    quickstart.write_text(text)
    ours = ("XLA_FLAGS", "JAX_ENABLE_COMPILATION_CACHE", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }  # not in the home directory

    def run(line):
        options = dict(capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1200, check=False)
        result = subprocess.run(["bash", "-c", line], **options)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    run.place = tmp_path
    return run


def test_a_bare_machine(bare):
    """One test, in one environment: packages take most of a minute to install."""
    check_path(bare)
    check_packages(bare)


def check_path(bare):
    """`make train` goes first and does what three of the lines do; done again, they find it."""
    bare("make train")
    series = [json.loads(line) for line in (bare.place / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert [row["eval/top1"] for row in series if "eval/top1" in row][-1] > 80  # 97.6 to 97.9 after all epochs
    section = (ROOT / "docs/get_started.md").read_text().split(PATH_HEADING, 1)[1]
    lines = documents.read_blocks(section)[0].text.splitlines()
    assert [line.split()[0] for line in lines] == ["python3", *[".venv/bin/python"] * 6]
    printed = [bare(line) for line in lines]
    assert "Resumed at step 62 of 62." in printed[2]
    assert {path.suffix for path in (bare.place / "shown").iterdir()} == {".png", ".html"}
    assert printed[-1].startswith("digit.png: 0 ")


def check_packages(bare):
    """The project's own are installed, and all that another command would install is found by pip."""
    commands = [command for command in documents.commands() if re.match(r"(python -m )?pip install ", command)]
    for command in commands:
        wanted = shlex.split(command.removeprefix("python -m "))[2:]
        ours = wanted in (["-r", "requirements.txt"], ["-e", "."], ["-r", "requirements.txt", "-e", "."])
        bare(shlex.join([".venv/bin/python", "-m", "pip", "install", *([] if ours else ["--dry-run"]), *wanted]))
    assert "pip install -e ." in commands
    assert "dat_pp_nano" in bare(
        f"cd / && {bare.place}/.venv/bin/python -c 'import dat_jax; print(dat_jax.list_models())'"
    )
