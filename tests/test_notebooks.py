"""The notebooks: they run in a kernel with small settings, and the .ipynb files are what their sources give."""

import json
import os
import pathlib
import re

import jupytext
import nbclient
import nbformat
import pytest

from notebooks.__main__ import SOURCES, make_notebook
from tests.helpers.xla_flags import fast_compilation_flags

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


def run(name, workdir):
    """What a notebook prints, and the data of what it shows: a list of {type: value}."""
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    environment = {
        **os.environ,
        "DAT_JAX_SMALL": "1",
        "DAT_JAX_WORKDIR": str(workdir),
        "XLA_FLAGS": " ".join(fast_compilation_flags()),
    }
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "".join(output.text for output in outputs if output.get("name") == "stderr") == ""
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return text, [output["data"] for output in outputs if "data" in output]


def count_pictures(shown):
    return sum("image/png" in data for data in shown)


def test_a_run_is_pretrained_and_its_points_are_inspected(tmp_path):
    text, shown = run("pretrain_tpu", tmp_path / "run")
    assert count_pictures(shown) == 2
    assert "step 2/4" in text  # progress, in plain lines
    assert "\x1b" not in text  # of a terminal's tables
    assert "Resumed at step 4 of 6." in text
    assert "% of 1000 images" in text

    text, shown = run("inspect_points", tmp_path / "run")
    assert count_pictures(shown) == 1
    assert "images/s" not in text  # of a training
    assert "stages_0/blocks_0: map (8, 8), positions (1, 64, 2), weights (1, 64, 64)" in text
    assert text.count("of group") == 5
    assert "srcdoc" in shown[-1]["text/html"]
    assert "even or odd: accuracy" in text


def test_images_in_folders_are_trained_on(tmp_path):
    text, shown = run("finetune_your_images", tmp_path / "run")
    assert count_pictures(shown) == 4
    assert "100 to train, 50 to validate" in text
    assert "of 50" in re.search(r"correct: .*", text)[0]
    assert json.loads((tmp_path / "run" / "export" / "model.json").read_text())["classes"] == list("0123456789")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_ipynb_is_what_the_source_gives(source):
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == make_notebook(source), "regenerate with: python -m notebooks"
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_colab_is_told_which_machine_a_notebook_wants():
    kinds = {source.stem: json.loads(make_notebook(source))["metadata"].get("accelerator") for source in SOURCES}
    assert kinds == {"finetune_your_images": "GPU", "inspect_points": None, "pretrain_tpu": "TPU"}


def test_what_the_notebooks_name_is_there():
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    files = re.findall(r"(?:configs|docs)/[\w/]+\.(?:py|md|sh)", text)
    assert len(files) > 5
    assert [file for file in files if not (ROOT / file).is_file()] == []
    modules = set(re.findall(r"python -m (dat_jax[\w.]*)", text))
    assert {"dat_jax.main", "dat_jax.predict", "dat_jax.visualize"} <= modules
    places = [ROOT.joinpath(*module.split(".")) for module in modules]
    assert [place for place in places if not (place.with_suffix(".py").is_file() or place.is_dir())] == []
