"""The notebooks: they run in a kernel with small settings, and the .ipynb files are what their sources give."""

import os
import pathlib

import jupytext
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def run(name, workdir):
    """Everything that a notebook prints, and how many pictures it shows."""
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    environment = {
        **os.environ,
        "DAT_JAX_SMALL": "1",
        "DAT_JAX_WORKDIR": str(workdir),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "".join(output.text for output in outputs if output.get("name") == "stderr") == ""
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def test_a_run_is_pretrained_and_its_points_are_inspected(tmp_path):
    text, pictures = run("pretrain_tpu", tmp_path / "run")
    assert pictures == 2
    assert "Resumed at step 4 of 6." in text
    assert "% of 1000 images" in text
    assert "--distributed=on --config=configs/tiny.py --config.seed=1 --workdir=/mnt/bucket/run" in text
    assert "\x1b" not in text  # of a terminal's tables

    text, pictures = run("inspect_points", tmp_path / "run")
    assert pictures == 2
    assert "images/s" not in text  # of a training
    assert "stages_0/blocks_0 (1, 1, 8, 8, 2)" in text
    assert "even or odd, right" in text


def test_images_in_folders_are_trained_on(tmp_path):
    text, pictures = run("finetune_your_images", tmp_path / "run")
    assert pictures == 4
    assert "100 to train, 50 to validate" in text
    assert "right: " in text
    assert (tmp_path / "run" / "export" / "model.json").is_file()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_ipynb_is_what_the_source_gives(source):
    """jupytext --to ipynb notebooks/*.py makes them."""
    made, kept = jupytext.read(source), nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ]
    assert kept.metadata.kernelspec == made.metadata.kernelspec
    assert kept.metadata.get("accelerator") == made.metadata.get("accelerator")
    assert not any(cell.get("outputs") for cell in kept.cells)
