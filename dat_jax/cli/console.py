"""Console output of the commands: tables on a terminal, plain lines without wrapping elsewhere.

Rich respects the environment variable NO_COLOR.
"""

import functools
import logging
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED_WIDTH = 10_000  # columns of an output that is not a terminal, where tables are never wrapped


def make_console(*, quiet: bool = False) -> Console:
    """Make a console that prints text without markup or line wrapping; with ``quiet`` it prints nothing.

    In a notebook it writes plain lines, which form one output of the cell, instead of one HTML element per line.
    """
    make = functools.partial(
        _Console,
        quiet=quiet,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        force_jupyter=False,
        # ipykernel reports itself as a terminal
        force_terminal=False if type(sys.stdout).__module__.startswith("ipykernel") else None,
    )
    console = make()
    return console if console.is_terminal else make(width=_UNLIMITED_WIDTH)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the error to ``cli.flags.run_interruptible``; by default, rich ends the program with status 1."""
        raise


class ConsoleHandler(logging.Handler):
    """Logging handler that prints records as plain lines; warnings and errors start with "WARNING: "."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "WARNING: " if record.levelno >= logging.WARNING else ""
        self._console.print(prefix + self.format(record))


def configure_logging(*, quiet: bool = False, enabled: bool = True) -> None:
    """Print the log records of the package on the console. Replaces the settings of an earlier call.

    Only commands call this. A program that uses the package as a library configures logging itself and receives the records
    of the logger "dat_jax".

    Args:
      quiet: print only warnings and errors.
      enabled: False prints nothing, as in all processes of a run except the first.
    """
    logger = logging.getLogger("dat_jax")
    for handler in [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(ConsoleHandler(make_console(quiet=not enabled)))
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False  # absl would print the records of the root logger a second time


def print_table(console: Console, title: str, rows: dict[str, str]) -> None:
    """Print a two-column table on a terminal; elsewhere the title and one line per row, without wrapping."""
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
    """Format a number of bytes in GiB ("1.50 GiB"), or in MiB ("12.00 MiB") below 1 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
