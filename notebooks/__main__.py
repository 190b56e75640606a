"""Makes the .ipynb files of the sources beside this one, always the same bytes: python -m notebooks"""

import hashlib
import pathlib

import jupytext
import nbformat

SOURCES = sorted(pathlib.Path(__file__).parent.glob("[!_]*.py"))


def make_notebook(source: pathlib.Path) -> str:
    """The text of the .ipynb of a jupytext percent source. A cell's id comes from what it says, and so stays with it."""
    notebook = jupytext.read(source)
    del notebook.metadata["jupytext"]  # of the source's header only
    notebook.nbformat_minor = 5  # the first with ids
    for cell in notebook.cells:
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    for source in SOURCES:
        source.with_suffix(".ipynb").write_text(make_notebook(source), encoding="utf-8")
        print(source.with_suffix(".ipynb"))
