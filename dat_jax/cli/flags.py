"""Command-line machinery: reading flags, printing help, and ending with a one-line error message."""

import contextlib
import difflib
import errno
import inspect
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging

from dat_jax import __version__
from dat_jax.errors import UserError
from dat_jax.storage import restore_names

HELP_FLAGS = ("--help", "-help", "--helpshort", "-helpshort", "-h", "-?")
_INTERRUPTED, _CLOSED = 130, 141  # exit status after SIGINT and SIGPIPE, by the convention of shells
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MAX_HELP_WIDTH = 120


def run_tool(
    main: Callable[[list[str]], None],
    *,
    groups: Mapping[str, Sequence[str]],
    define_flags: Callable[[flags.FlagValues], None] = lambda values: None,
    interrupted: str = "Interrupted: every file that was written is complete.",
) -> None:
    """Run a command: print its help or version, or parse its flags and call ``main`` with the other arguments.

    Args:
      main: function of the positional arguments. It imports slow packages itself, so that --help and errors in flags are
        printed at once.
      groups: title -> flags, see ``format_help``.
      define_flags: defines the flags that importing the module does not define.
      interrupted: message printed after Ctrl-C, before the program ends with status 130.
    """
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.set_verbosity(logging.ERROR)
    define_flags(flags.FLAGS)
    sys.argv[1:] = expand_home(sys.argv[1:])
    arguments = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    if any(argument in HELP_FLAGS for argument in arguments):
        text = sys.modules[main.__module__].__doc__ or ""
        columns = shutil.get_terminal_size((_MAX_HELP_WIDTH, 24)).columns
        help_text = format_help(text, flags.FLAGS, groups=groups, width=min(columns, _MAX_HELP_WIDTH))
        run_interruptible(lambda: print(help_text))
    elif "--version" in arguments:
        print(f"dat_jax {__version__}")
    else:
        run_interruptible(lambda: app.run(main, flags_parser=parse_flags), interrupted)


def expand_home(arguments: Sequence[str]) -> list[str]:
    """Replace ~ in --FLAG=~/PATH by the home directory. Shells expand it only at the start of an argument."""
    return [
        re.sub(r"^(--?[\w.]+=)(~)(?=/|$)", lambda match: match[1] + os.path.expanduser(match[2]), argument)
        for argument in arguments
    ]


def run_interruptible(function: Callable[[], None], interrupted: str = "Interrupted.") -> None:
    """Call a function. What ends it from outside is one line instead of a traceback.

    - Ctrl-C: the message ``interrupted``, status 130.
    - A reader of the output that ends, such as ``head``: no message, status 141.
    - A full or read-only disk, a deleted working directory, JAX without a device, or matplotlib with an unknown backend: an error
      message, status 1.

    Characters that the encoding of the output does not have are printed as escapes.
    """
    with contextlib.suppress(AttributeError, ValueError):  # not a text file, or closed
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        try:
            function()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # errors would otherwise occur after the end of the program
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr, flush=True)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        _discard_output()
        sys.exit(_CLOSED)
    except OSError as error:
        message = _explain_os_error(error)
        if message is None:
            raise
        _discard_output()
        fail(message)
    except (RuntimeError, AssertionError) as error:
        if not _is_raised_by(error, "xla_bridge.py"):
            raise
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split()).rstrip(".") or "no such device"
        platforms = os.environ.get("JAX_PLATFORMS")
        setting = "JAX_PLATFORMS is not set" if platforms is None else f"JAX_PLATFORMS={platforms}"
        fail(f"JAX cannot start ({setting}): {reason}. JAX_PLATFORMS=cpu runs on the CPU.")
    except ValueError as error:
        if not str(error).startswith("Key backend:"):
            raise
        fail(
            f"matplotlib cannot start (MPLBACKEND={os.environ.get('MPLBACKEND')}): {error}. Figures need no backend; unset it."
        )


def _explain_os_error(error: OSError) -> str | None:
    """Return a sentence about a problem of the machine; None for other errors."""
    if error.errno in _NO_SPACE:
        return f"{error.filename or 'The output'} cannot be written: {error.strerror}."
    try:
        os.getcwd()
    except FileNotFoundError:
        return "The working directory has been deleted; change to another one."
    return None


def _discard_output() -> None:
    """Discard what is still buffered for stdout, so that Python does not fail to write it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_raised_by(error: BaseException, file_name: str) -> bool:
    """Return whether an error was raised in a file of this name."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and os.path.basename(traceback.tb_frame.f_code.co_filename) == file_name


def format_help(text: str, values: flags.FlagValues, *, groups: Mapping[str, Sequence[str]], width: int) -> str:
    """Help text of a command: the docstring of its module, then its flags with their meanings and defaults.

    Args:
      text: docstring of the module.
      values: defined flags.
      groups: title -> flags as they are typed, without the dashes, such as "output=DIR".
      width: number of columns for the meanings of flags. The docstring and flags are not wrapped.
    """
    lines = [inspect.cleandoc(text), ""]
    for title, forms in groups.items():
        lines.append(f"{title}:")
        for form in forms:
            flag = values[form.partition("=")[0]]
            short = f"-{flag.short_name}, " if flag.short_name else ""
            # absl puts the choices before the meaning of an enum; ``form`` has them already.
            meaning = re.sub(r"^<[^>]*>: ", "", flag.help) + _format_default(flag)
            indent = " " * 6
            wrapped = textwrap.wrap(
                meaning, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
            lines += [f"  {short}--{form}", *wrapped]
        lines.append("")
    return "\n".join(
        [*lines, "--help prints this text, --version the version, --helpfull also the flags of libraries."]
    )


def _format_default(flag: flags.Flag) -> str:
    if flag.default in (None, False, "", 0, []):
        return ""
    return f" Default: {(flag.default_as_str or '').strip(chr(39))}."


def find_nearest(name: str, choices: Iterable[str]) -> str:
    """The choice whose spelling is closest to ``name``."""
    return difflib.get_close_matches(name, list(choices), n=1, cutoff=0)[0]


def fail(message: str) -> NoReturn:
    """Print an error message to stderr and end the program with status 1."""
    print(f"error: {restore_names(message)}", file=sys.stderr)
    sys.exit(1)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse flags and return the positional arguments; a flag that cannot be parsed ends the program with one line.

    It serves as ``flags_parser`` of absl's ``app.run``.
    """
    try:
        return values(argv)
    except Exception as error:  # errors in flags, and any error that the code of a configuration file raises
        if isinstance(error.__context__, UserError):  # raised while the value of a flag was parsed
            fail(str(error.__context__))
        fail(f"Flags: {_format_flag_error(error)}")


def _format_flag_error(error: Exception) -> str:
    """Message of an error in one line. ml_collections raises KeyError or AttributeError(KeyError) for an unknown key."""
    reason = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if isinstance(reason, KeyError) and reason.args:
        lines = f"there is no key {reason.args[0]}".splitlines()
        return ". ".join(line.strip() for line in lines if line.strip())
    return " ".join(str(reason).split())
