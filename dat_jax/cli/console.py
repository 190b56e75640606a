"""Console output of the commands: tables on a terminal, plain unbroken lines elsewhere. Rich respects NO_COLOR."""

import logging
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 10_000  # of what is no terminal: a table there is as wide as it must be


def make_console(*, quiet: bool = False) -> Console:
    """Prints text as it is, without markup, and never breaks a line; ``quiet`` prints nothing.

    In a notebook it writes plain lines, all of them one output of the cell, instead of an HTML element a line.
    """
    options = dict(quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True, force_jupyter=False)
    if type(sys.stdout).__module__.startswith("ipykernel"):  # which calls itself a terminal
        options["force_terminal"] = False
    console = Console(**options)
    return console if console.is_terminal else Console(**options, width=_WIDE)


class ConsoleHandler(logging.Handler):
    """Prints log records as plain lines; those of warnings and errors start with "WARNING: "."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "WARNING: " if record.levelno >= logging.WARNING else ""
        self._console.print(prefix + self.format(record))


def configure_logging(*, quiet: bool = False, enabled: bool = True) -> None:
    """Print what the package logs on the console, as commands do. Replaces the settings of an earlier call.

    Modules log with ``logging.getLogger(__name__)``. A program that uses the package as a library does not call this, and
    gets the records by its own configuration of logging.

    Args:
      quiet: print only warnings.
      enabled: False prints nothing, for all processes of a run but the first.
    """
    logger = logging.getLogger("dat_jax")
    for handler in [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(ConsoleHandler(make_console(quiet=not enabled)))
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False  # absl prints records of the root logger a second time


def print_table(console: Console, title: str, rows: dict[str, str]) -> None:
    """A two-column table on a terminal; else the title and a line a row, nothing of which is broken or cut."""
    if not console.is_terminal:
        widest = max(map(len, rows), default=0)
        lines = [f"  {name:{widest}}  {value}" for name, value in rows.items()]
        console.print("\n".join([*([title] if title else []), *lines]), soft_wrap=True, markup=False, highlight=False)
        return
    table = Table(title=title or None, title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table, soft_wrap=False)


def format_size(size: float) -> str:
    """Bytes as 1.50 GiB, or 12.00 MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
