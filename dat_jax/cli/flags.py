"""What the programs of the package share: flags are read, mistakes end with one sentence and status 1, files are written."""

import contextlib
import difflib
import inspect
import os
import pathlib
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging

from dat_jax import __version__
from dat_jax.errors import UserError

HELP_FLAGS = ("--help", "-help", "--helpshort", "-helpshort", "-h", "-?")
_INTERRUPTED = 130  # the status of what SIGINT ended, as shells have it


def run_tool(
    main: Callable[[list[str]], None],
    *,
    groups: Mapping[str, Sequence[str]],
    define_flags: Callable[[flags.FlagValues], None] = lambda values: None,
    interrupted: str = "Interrupted: every file that was written is whole.",
) -> None:
    """Calls a tool's ``main`` with the arguments that are no flags; --help and --version are answered before.

    Args:
      main: imports what takes long itself, so that --help and mistakes in the flags are said at once.
      groups: title -> flags, see ``format_help``.
      define_flags: defines those that importing the tool does not define.
      interrupted: a sentence for Ctrl-C, upon which the status is 130.
    """
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.set_verbosity(logging.ERROR)
    define_flags(flags.FLAGS)
    asked = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    if any(argument in HELP_FLAGS for argument in asked):
        text = sys.modules[main.__module__].__doc__
        print(
            format_help(text, flags.FLAGS, groups=groups, width=min(shutil.get_terminal_size((120, 24)).columns, 120))
        )
    elif "--version" in asked:
        print(f"dat_jax {__version__}")
    else:
        run_interruptible(lambda: app.run(main, flags_parser=parse_flags), interrupted)


def run_interruptible(function: Callable[[], None], interrupted: str = "Interrupted.") -> None:
    """Calls a function; Ctrl-C ends the program with one sentence and status 130."""
    try:
        function()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr, flush=True)
        sys.exit(_INTERRUPTED)


def format_help(text: str, values: flags.FlagValues, *, groups: Mapping[str, Sequence[str]], width: int) -> str:
    """What a tool says of itself: its module's text, then its own flags with their meanings and defaults.

    Args:
      text: the docstring.
      values: the flags.
      groups: title -> flags as they are written, such as "--output=DIR", without the dashes.
      width: columns; names and the text stay as they are.
    """
    lines = [inspect.cleandoc(text), ""]
    for title, written in groups.items():
        lines.append(f"{title}:")
        for form in written:
            flag = values[form.partition("=")[0]]
            short = f"-{flag.short_name}, " if flag.short_name else ""
            default = "" if flag.default in (None, False, "", 0) else f" Default: {flag.default_as_str.strip(chr(39))}."
            option = {"initial_indent": " " * 6, "subsequent_indent": " " * 6, "break_on_hyphens": False}
            meaning = (
                re.sub(r"^<[^>]*>: ", "", flag.help) + default
            )  # absl puts the choices before, as ``form`` has them
            lines += [f"  {short}--{form}", *textwrap.wrap(meaning, width, **option)]
        lines.append("")
    return "\n".join([*lines, "--help and --version answer and end; --helpfull has the flags of the libraries too."])


def find_nearest(name: str, choices: Iterable[str]) -> str:
    """The choice that is written most like ``name``."""
    return difflib.get_close_matches(name, list(choices), n=1, cutoff=0)[0]


def fail(message: str) -> NoReturn:
    """Ends the program with a sentence on stderr and status 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Reads the flags, as absl's ``app.run`` wants it; a mistake in them ends the program with one sentence."""
    try:
        return values(argv)
    except Exception as error:  # of the flags, and whatever a configuration's own code raises
        if isinstance(error.__context__, UserError):  # raised while the value of a flag was parsed
            fail(str(error.__context__))
        # ml_collections says an unknown key as '\'key\'\nDid you mean ...'
        message = " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").split())
        fail(f"Flags: {message.strip(chr(34))}")


def name_outputs(inputs: Sequence[pathlib.Path], directory: str | os.PathLike) -> list[pathlib.Path]:
    """DIRECTORY/<stem>.png of every file; UserError where two are the same."""
    named: dict[str, pathlib.Path] = {}
    for path in inputs:
        if path.stem in named:
            raise UserError(f"{named[path.stem]} and {path} would both become {path.stem}.png; call it for each alone.")
        named[path.stem] = path
    return [pathlib.Path(directory) / f"{stem}.png" for stem in named]


def check_outputs(outputs: Sequence[pathlib.Path], *, inputs: Sequence[pathlib.Path], overwrite: bool) -> None:
    """Refuses files to write before anything is done.

    Args:
      outputs: files to write.
      inputs: files that are read, which are never written.
      overwrite: whether other files that exist are replaced.

    Raises:
      UserError: the first that would be written twice, is read, exists, or whose folder is a file.
    """
    read, written = {path.resolve() for path in inputs}, set()
    for path in outputs:
        place = path.resolve()
        if place in written:
            raise UserError(f"{path} would be written twice: wanted inputs and outputs that differ in their names.")
        written.add(place)
        if place in read:
            raise UserError(f"{path} is read and would be overwritten; name another place.")
        if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
            raise UserError(f"{path} cannot be written: {path if path.is_dir() else path.parent} is in the way.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; --overwrite replaces it.")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name to write to, of the same suffix, that becomes ``path`` at the end; nothing is left of it after a failure.

    Raises:
      UserError: it cannot be written.
    """
    unfinished = path.with_name(f".{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def process(files: Sequence[pathlib.Path], handle: Callable[[int], None]) -> bool:
    """Calls ``handle(index)`` for every file. A UserError is said on stderr, with the file, and the others are done.

    Returns:
      Whether there was none.
    """
    failed = False
    for index, path in enumerate(files):
        try:
            handle(index)
        except UserError as error:
            failed = True
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            print(f"error: {message}", file=sys.stderr, flush=True)
    return not failed
