"""For mkdocs: the measured tables and pictures of experiments/ belong to the site, at the same relative places."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
MEASURED = ("results.md", "results.png", "README.md")


def on_files(files, config):
    """Adds experiments/<study>/results.md, results.png and README.md."""
    for path in sorted(ROOT.glob("experiments/*/*")):
        if path.name in MEASURED:
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/ to what was added become links inside the site."""
    return re.sub(r"\]\(\.\./(experiments/[^)]+)\)", r"](\1)", markdown)
