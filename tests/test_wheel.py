"""The distribution: its dependencies, and a wheel that is installed and used from an empty folder."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest
from PIL import Image

import dat_jax
from dat_jax import errors
from dat_jax.config import list_configs
from dat_jax.errors import UserError, explain_missing_module, require_extra
from tests.helpers import documents
from tests.helpers.documents import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd, **variables):
    """What a command prints; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    options = dict(capture_output=True, text=True, cwd=cwd, env=environment, timeout=600, check=False)
    result = subprocess.run(list(map(str, command)), **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_requirements_are_the_dependencies_with_the_extras_inference_train_gcs_and_hub():
    lines = [line.partition("  #") for line in (ROOT / "requirements.txt").read_text().splitlines()]
    requirements = {name: reason for name, _, reason in lines if name and not name.startswith("#")}
    extras = PROJECT["optional-dependencies"]
    train = [name for name in extras["train"] if name != "dat-jax[inference]"]
    packages = [*PROJECT["dependencies"], *extras["inference"], *train, *extras["gcs"], *extras["hub"]]
    assert list(requirements) == packages
    assert all(requirements.values())  # each has a reason


def test_a_missing_module_of_an_extra_is_reported_with_the_command_that_installs_it(monkeypatch):
    assert set(errors._EXTRAS) <= set(PROJECT["optional-dependencies"])
    require_extra("train")
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r'grain is not installed: pip install "dat-jax\[train\]"'):
        require_extra("train")
    assert "dat-jax[inference]" in explain_missing_module("cv2.dnn")
    assert explain_missing_module("json") is None
    assert explain_missing_module(None) is None


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The executables' folder of an environment with the wheel, which also sees the packages of this one."""
    place = tmp_path_factory.mktemp("wheel")
    (place / "project").mkdir()
    documents.copy_project(place / "project")
    version = re.match(r"\d+", importlib.metadata.version("setuptools")) if _has_setuptools() else None
    offline = ["--no-build-isolation"] if version and int(version[0]) >= 77 else []  # else pip downloads setuptools
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", *offline, "--wheel-dir", place, place / "project", cwd=place)
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')", cwd=place)
    with open(os.path.join(packages, "tests.pth"), "w", encoding="utf-8") as file:
        file.write("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    (wheel,) = place.glob("*.whl")
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dat_jax").rglob("*.py")}
    modules |= {f"dat_jax/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").glob("*.py")}
    assert modules == {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    return python.parent


def _has_setuptools():
    try:
        importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_from_an_empty_folder(installed, tmp_path):
    command, python = installed / "dat-jax", installed / "python"
    variables = dict(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    place = run(python, "-c", "import dat_jax; print(dat_jax.__file__)", cwd=tmp_path)
    assert str(installed.parent) in place
    listed = run(python, "-c", "from dat_jax import config; print(*config.list_configs())", cwd=tmp_path)
    assert listed.split() == list_configs()

    for arguments in ((), ("--help",)):
        assert "dat-jax train --config=quickstart" in run(command, *arguments, cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path) == f"dat_jax {dat_jax.__version__}\n"
    assert "dat_pp_nano" in run(command, "models", cwd=tmp_path)
    assert "name: dat_pp_base" in run(command, "train", "--config=upernet:dat_pp_b", "--print_config", cwd=tmp_path)

    printed = run(command, "train", "--config=tiny", "--workdir=runs/tiny", cwd=tmp_path, **variables)
    assert "step 4/4" in printed
    again = ("-m", "dat_jax.main", "--config=configs/tiny.py", "--workdir=runs/tiny")
    assert "Resumed at step 4 of 4" in run(python, *again, cwd=tmp_path, **variables)
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    assert "black.png: " in run(command, "predict", "runs/tiny", "black.png", cwd=tmp_path, **variables)
