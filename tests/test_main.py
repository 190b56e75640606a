"""The command line: every mistake ends with one sentence and a non-zero status."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "dat_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected --config=CONFIG --workdir=DIR"),
        (["--config=configs/quickstart.py"], "Expected --config=CONFIG --workdir=DIR"),
        (
            ["--config=configs/quickstart.py", "--config.batchsize=4"],
            'Did you mean "batch_size" instead of "batchsize"',
        ),
        (["--config=configs/quickstart.py", "--config.batch_size=many"], "invalid literal for int"),
        (["--config={tmp}/broken.py", "--workdir={tmp}"], "invalid syntax"),
        (["--config=configs/quickstart.py", "--workdir={tmp}", "runs/x"], "Unexpected argument runs/x"),
        (["--config=configs/nothing.py", "--workdir={tmp}"], "no configuration configs/nothing.py. Similar names: "),
        (["--config=configs/quickstart.py", "--workdir={tmp}", "--mode=predict"], "should be one of"),
        pytest.param(
            ["--config=configs/quickstart.py", "--workdir={tmp}/file/run"],
            "cannot be written: Not a directory",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config=configs/quickstart.py", "--workdir={tmp}", "--config.batch_size=60"],
            "60 is not a multiple of 8",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config=configs/quickstart.py", "--workdir={tmp}", "--mode=eval"],
            "There are no checkpoints in",
            marks=pytest.mark.slow,
        ),
        (["--workdir={tmp}/none", "--mode=eval", "--config.seed=1"], "There is no {tmp}/none/config.json"),
        (["--workdir={tmp}", "--mode=eval"], "config.json is damaged"),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, message, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "broken.py").write_text("def get_config(:")
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == 1
    assert message.format(tmp=tmp_path) in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stdout + result.stderr
