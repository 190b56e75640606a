"""MkDocs hooks that add results of experiments/ to the site.

The tables and figures keep their relative paths.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
RESULT_FILES = ("results.md", "results.png", "README.md")


def on_files(files, config):
    """Add experiments/<study>/results.md, results.png and README.md to the files of the site."""
    for path in sorted(ROOT.glob("experiments/*/*")):
        if path.name in RESULT_FILES:
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links from docs/ to experiments/ into links inside the site."""
    return re.sub(r"\]\(\.\./(experiments/[^)]+)\)", r"](\1)", markdown)
