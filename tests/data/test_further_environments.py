"""Machines as containers, clusters and notebooks have them: commands work there, or end in one sentence."""

import csv
import errno
import json
import os
import pathlib
import pwd
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dat_jax.cli.console import make_console
from dat_jax.cli.flags import expand_home, run_interruptible
from dat_jax.data.image_format import RGB
from dat_jax.inference.command import report_predictions
from dat_jax.training.compilation import enable_cache
from tests.helpers.logs import collect_logs

ROOT = pathlib.Path(__file__).parents[2]
SPLIT = [sys.executable, "-m", "dat_jax.data.split"]


def run(command, *, cwd=ROOT, remove=(), **environment):
    """Run a command, with changes of the environment, and return its status, stdout and stderr."""
    variables = {key: value for key, value in os.environ.items() if key not in remove}
    variables |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, timeout=60)
    return done.returncode, done.stdout, done.stderr


def run_in_shell(line, **environment):
    return run(["bash", "-c", line.replace("python", sys.executable)], **environment)


@pytest.fixture
def classes(tmp_path):
    for name in ("a/1.png", "a/2.png", "é/1.png", "é/2.png"):
        path = tmp_path / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path / "all"


# Changes of the environment with which a command works.
ENVIRONMENTS = {
    "no HOME": {"remove": ("HOME",)},
    "read-only HOME": {"HOME": "/proc"},
    "no TMPDIR": {"TMPDIR": "/missing"},
    "locale C": {"LANG": "C", "LC_ALL": "C"},
    "output in ASCII": {"PYTHONIOENCODING": "ascii"},
    "output in Windows' encoding": {"PYTHONIOENCODING": "cp1251"},
    "narrow terminal": {"COLUMNS": "20", "TERM": "dumb", "NO_COLOR": "1"},
    "number of threads that is none": {"OMP_NUM_THREADS": "0"},
    "warnings as errors": {"PYTHONWARNINGS": "error"},
    "another folder": {"cwd": "/"},
}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
@pytest.mark.slow
def test_commands_work_in_unusual_environments(kind, classes, tmp_path):
    output = tmp_path / "猫"
    status, text, errors = run([*SPLIT, str(classes), f"--output={output}"], **ENVIRONMENTS[kind])
    assert (status, errors) == (0, "")
    assert text.endswith(": 2 images to train, 2 to validate\n")
    assert sorted(os.listdir(output / "train")) == ["a", "é"]


@pytest.mark.parametrize("columns", ["0", "20", "x"])
def test_help_is_printed_at_any_width(columns):
    status, text, errors = run([*SPLIT, "--help"], COLUMNS=columns)
    assert (status, errors) == (0, "")
    assert "validation." in text


@pytest.mark.parametrize(
    "arguments",
    ["dat_jax.data.split --help", "dat_jax", "dat_jax.main --config=quickstart --print_config"],
)
def test_a_reader_that_ends_early_causes_no_message(arguments):
    # The reader ends before the command has started to write.
    line = f"(sleep 0.3; python -m {arguments}; echo $? >&2) | true"
    status, text, errors = run_in_shell(line)
    assert (status, text, errors) == (0, "", "141\n")


def test_a_closed_output_is_no_error():
    assert run_in_shell("python -m dat_jax.main --config=quickstart --print_config >&-") == (0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence():
    expected = "error: The output cannot be written: No space left on device.\n"
    assert run_in_shell("python -m dat_jax --help > /dev/full") == (1, "", expected)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_file_that_cannot_be_written_for_want_of_space_is_one_sentence(number, capsys):
    def write():
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    with pytest.raises(SystemExit) as ended:
        run_interruptible(write)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: metrics.jsonl cannot be written: {os.strerror(number)}.\n"


def test_other_errors_keep_their_traceback():
    for error in (PermissionError(13, "no"), RuntimeError("defect"), AssertionError()):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            run_interruptible(fail)


def test_a_deleted_working_directory_is_one_sentence(classes, tmp_path):
    line = f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; python -m dat_jax.data.split {classes} --output="
    assert run_in_shell(f"{line}{tmp_path}/out")[0] == 0
    expected = "error: The working directory has been deleted; change to another one.\n"
    assert run_in_shell(f"{line.replace('mkdir', 'mkdir -p')}out") == (1, "", expected)


@pytest.mark.parametrize("platforms", ["nonsense", "cuda"])
def test_a_platform_that_jax_does_not_have_is_one_sentence(platforms):
    code = "import jax; from dat_jax.cli.flags import run_interruptible; run_interruptible(jax.devices)"
    status, text, errors = run([sys.executable, "-c", code], JAX_PLATFORMS=platforms)
    assert (status, text) == (1, "")
    (message,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert message.startswith(f"error: JAX cannot start (JAX_PLATFORMS={platforms}): ")
    assert message.endswith(". JAX_PLATFORMS=cpu runs on the CPU.")
    assert "Traceback" not in errors
    assert ".." not in message


def test_a_backend_that_matplotlib_does_not_have_is_one_sentence():
    code = (
        "import importlib; from dat_jax.cli.flags import run_interruptible; "
        "run_interruptible(lambda: importlib.import_module('dat_jax.visualization.charts'))"
    )
    status, text, errors = run([sys.executable, "-c", code], MPLBACKEND="nonsense")
    assert (status, text) == (1, "")
    assert errors.startswith("error: matplotlib cannot start (MPLBACKEND=nonsense): ")
    assert errors.endswith("unset it.\n")
    assert "Traceback" not in errors


def test_the_home_directory_is_expanded_in_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    arguments = [
        "--workdir=~/runs/x",
        "--config.data.directory=~",
        "-output=~/a=~/b",
        "x~/y",
        "--name=a~/b",
        "--to=~you/x",
    ]
    expected = [
        "--workdir=/home/me/runs/x",
        "--config.data.directory=/home/me",
        "-output=/home/me/a=~/b",
        *arguments[3:],
    ]
    assert expand_home(arguments) == expected


def test_the_home_directory_is_expanded_by_commands(classes, tmp_path):
    assert run([*SPLIT, str(classes), "--output=~/out"], HOME=str(tmp_path), cwd=tmp_path)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "out"]
    command = [sys.executable, "-m", "dat_jax.main", "--mode=eval", "--workdir=~/run"]
    status, _, errors = run(command, HOME=str(tmp_path), cwd=tmp_path)
    assert status == 1
    assert errors.startswith(f"error: There is no {tmp_path}/run/config.json, which training writes")


def test_a_user_without_a_home_directory_trains_without_a_cache(monkeypatch):
    def find_nobody(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", find_nobody)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with collect_logs() as messages:
            assert enable_cache("auto") is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert messages == ["Compiled programs are not kept: there is no home directory. Set config.compilation_cache."]


@pytest.mark.parametrize("backend", ["TkAgg", "module://matplotlib_inline.backend_inline"])
def test_figures_need_no_display(backend, tmp_path):
    code = (
        "import sys; from dat_jax.visualization import charts; figure = charts.Figure(figsize=(1, 1)); "
        "figure.savefig(sys.argv[1])"
    )
    status, _, _ = run([sys.executable, "-c", code, tmp_path / "x.png"], MPLBACKEND=backend, remove=("DISPLAY",))
    assert status == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "module", ["main", "predict", "visualize", "export", "conversion", "data.prepare", "data.split", "compile_report"]
)
def test_commands_without_arguments_print_what_they_expect(module):
    status, text, errors = run([sys.executable, "-m", f"dat_jax.{module}"])
    assert (status, text) == (1, "")
    assert errors.startswith("error: ")
    assert "xpected" in errors
    assert errors.count("\n") == 1


class Brightness:
    """A predictor whose prediction is the brightness of the image."""

    columns = ("image", "brightness")
    image_format = RGB

    def __call__(self, image):
        return float(np.mean(image))

    def describe(self, prediction):
        return {"brightness": f"{prediction:.0f}"}

    def to_entries(self, prediction, *, image, number, output):
        return [{"image": image, "brightness": prediction}]

    def to_rows(self, prediction, *, image):
        return [(image, prediction)]


def test_results_have_the_names_of_images_in_any_encoding(tmp_path):
    names = ["猫.png", "two\nlines.png", "a,b.png", os.fsdecode(b"caf\xe9.png")]
    images = [tmp_path / name for name in names]
    for image in images:
        Image.new("RGB", (8, 8), (7, 7, 7)).save(image)
    files = {"json_file": tmp_path / "x.json", "csv_file": tmp_path / "x.csv"}
    assert report_predictions(Brightness(), images, **files, console=make_console(quiet=True))
    expected = [(str(image), 7.0) for image in images]
    assert [tuple(entry.values()) for entry in json.loads((tmp_path / "x.json").read_text())] == expected
    with (tmp_path / "x.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [[name, "7.0"] for name, _ in expected]
