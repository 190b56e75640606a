"""New files and folders that appear when they are whole. Nothing that exists is overwritten."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from dat_jax.errors import UserError


def refuse_existing(path: str | os.PathLike) -> None:
    """UserError where there is something of that name."""
    if os.path.exists(path):  # unlike that of pathlib, of a name that cannot be looked up too
        raise UserError(f"{path} exists already and nothing is overwritten; name another place.")


@contextlib.contextmanager
def appearing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A name beside ``path`` for a new file or folder, which becomes ``path`` at the end.

    Folders around it are made. After a failure nothing is left of it and of them.

    Raises:
      UserError: ``path`` exists, or cannot be written, which is what an OSError within means.
    """
    path = pathlib.Path(path)
    refuse_existing(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    made = [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        for parent in reversed(made):
            parent.mkdir(exist_ok=True)
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a folder
        with contextlib.suppress(OSError):
            unfinished.unlink()
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: all went well
                parent.rmdir()
