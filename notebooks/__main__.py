"""Generate the .ipynb files from the .py sources in this folder: python -m notebooks

The output is deterministic.
"""

import hashlib
import pathlib

import jupytext
import nbformat

SOURCES = sorted(pathlib.Path(__file__).parent.glob("[!_]*.py"))


def make_notebook(source: pathlib.Path) -> str:
    """Text of the .ipynb file of a source in jupytext's percent format. The id of a cell is a hash of its source."""
    notebook = jupytext.read(source)
    del notebook.metadata["jupytext"]  # describes the source file only
    notebook.nbformat_minor = 5  # the first version with cell ids
    for cell in notebook.cells:
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    for source in SOURCES:
        source.with_suffix(".ipynb").write_text(make_notebook(source), encoding="utf-8")
        print(source.with_suffix(".ipynb"))
