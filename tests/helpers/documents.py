"""Parsing of the documents: fenced blocks, commands, inline code and links."""

import dataclasses
import pathlib
import re
import shlex
import shutil

from dat_jax.__main__ import TOOLS

ROOT = pathlib.Path(__file__).parents[2]
WALKTHROUGHS = ("docs/add_stage_type.md", "docs/add_task.md")  # applied to a copy of the project
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
_FENCE = re.compile(r"^```(?P<language>[a-z]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_CALLED = re.compile(r"(\.venv/bin/)?(python3? -m|dat-jax|pip install|make|pre-commit) \S")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: path of its document relative to the root, its language ("" if it has none), and its text."""

    document: str
    language: str
    text: str

    @property
    def named_file(self) -> str | None:
        """The path in a first line "# path/to/file.py": the block is the content of that file."""
        match = re.match(r"# ([\w/]+\.py)\n", self.text)
        return match and match[1]


def read_blocks(text: str, document: str = "") -> list[Block]:
    """Return all blocks of a document in order."""
    return [Block(document, match["language"], match["text"]) for match in _FENCE.finditer(text)]


def all_blocks() -> list[Block]:
    """Return the blocks of all documents."""
    return [block for path in DOCUMENTS for block in read_blocks(path.read_text(), path.relative_to(ROOT).as_posix())]


def split_command(line: str) -> list[str]:
    """Split a line as a shell does, without its comment or the path of python, and with ``dat-jax TOOL`` as a module."""
    words = shlex.split(line, comments=True)
    if words:
        words[0] = words[0].removeprefix(".venv/bin/")
    if words[:1] == ["dat-jax"]:
        tool = TOOLS.get(words[1]) if len(words) > 1 else None
        module = [f"dat_jax.{tool.module}", *words[2:]] if tool and tool.module else ["dat_jax", *words[1:]]
        words = ["python", "-m", *module]
    return words


def commands() -> list[str]:
    """Return every command once: the lines of blocks without a language, and calls in backticks in the prose.

    Code with a placeholder, a word of capitals or dots, is not a command.
    """
    lines = [line for block in all_blocks() if block.language == "" for line in block.text.splitlines()]
    called = [code for path in DOCUMENTS for code in inline_code(path.read_text()) if _CALLED.match(code)]
    lines += [code for code in called if not re.search(r"(^|[ =])[A-Z]{3,}\b| \.\.\.", code)]
    return list(dict.fromkeys(shlex.join(words) for words in map(split_command, lines) if words))


def without_blocks(text: str) -> str:
    """Return the prose of a document."""
    return _FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    """Return the text between single backticks in the prose."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks(text))]


def links(text: str) -> list[str]:
    """Return the targets of links and pictures in the prose."""
    prose = re.sub(r"`[^`]*`", "", without_blocks(text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """Return the anchors of all headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its header."""
    section = text.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def copy_project(place: pathlib.Path) -> None:
    """Copy the project to an existing folder, without recorded arrays and outputs of runs."""
    for name in ("dat_jax", "configs", "docs", "experiments", "notebooks", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in (
        "LICENSE",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "requirements.txt",
        "requirements-dev.txt",
        "setup.py",
    ):
        shutil.copy(ROOT / name, place)
    shutil.copy(ROOT / ".pre-commit-config.yaml", place)
