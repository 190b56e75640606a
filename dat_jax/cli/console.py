"""How the programs print: whole lines where nobody looks at a terminal, tables on one, NO_COLOR respected (by rich)."""

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
