"""What the programs of the package share: flags are read, mistakes end with one sentence and status 1, files are written."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import flags

from dat_jax.errors import UserError


def fail(message: str) -> NoReturn:
    """Ends the program with a sentence on stderr and status 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Reads the flags, as absl's ``app.run`` wants it; a mistake in them ends the program with one sentence."""
    try:
        return values(argv)
    except Exception as error:  # of the flags, and whatever a configuration's own code raises
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
