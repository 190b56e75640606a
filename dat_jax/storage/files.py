"""Writing of files and folders: atomically, and checked before work starts.

Everything in the package that is written as a whole (checkpoint manifests, folders of weights, exports, figures, reports) is
written by ``atomic_path`` or ``atomic_write_text``, so that a reader never finds half of it. For a bucket, a folder is written on
the local disk and then uploaded, its descriptions last: without them it counts as nothing.
"""

import contextlib
import errno
import itertools
import os
import pathlib
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator

from dat_jax.errors import UserError
from dat_jax.storage.paths import Path, as_path, is_in_bucket, os_errors
from dat_jax.storage.transfer import exists, list_objects, remove, upload

_NUMBERS = itertools.count()  # of temporary paths in this process


def check_absent(path: str | os.PathLike) -> None:
    """Check that nothing exists at a path that will be created, before the work for it starts.

    Raises:
      UserError: a file or folder of that name exists.
    """
    path = as_path(path)
    try:
        found = exists(path)
        if is_in_bucket(path):
            _check_parents(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    if found:
        raise UserError(f"{path} exists already and nothing is overwritten; choose another path.")


def check_replaceable(path: str | os.PathLike) -> None:
    """Check that a path in a bucket is not a folder and does not lie below a file, so that a file can be written there.

    Raises:
      UserError: it is a folder, or lies below a file.
    """
    path = as_path(path)
    try:
        with os_errors(path):
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder", str(path))
        _check_parents(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def _check_parents(path: Path) -> None:
    """Raise an OSError if one of the folders of a path in a bucket is a file."""
    with os_errors(path):
        for parent in path.parents[:-2]:  # up to the bucket
            if parent.is_file():
                raise NotADirectoryError(20, f"{parent} is a file", str(path))


def check_writable(directory: str | os.PathLike) -> None:
    """Create a folder, with its parents, unless it exists, and check that files can be created in it.

    Raises:
      UserError: the folder cannot be created or written to.
    """
    directory = as_path(directory)
    try:
        if is_in_bucket(directory):
            _check_bucket_writable(directory)
            return
        directory.mkdir(parents=True, exist_ok=True)
        probe = _temporary_name(directory / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"The folder {directory} cannot be written: {error.strerror}.") from error


def _check_bucket_writable(directory: Path) -> None:
    probe = directory / f".{uuid.uuid4().hex}.unfinished"
    _check_parents(probe)
    with os_errors(directory):
        probe.write_text("")
        probe.unlink()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Context with a temporary path for a new file or folder, which is renamed to ``path`` at the end.

    The temporary path lies beside ``path`` and has the same suffix; the caller creates the file or folder there. Missing
    parent folders are created. After a failure, the temporary file or folder and the new parents are removed, and ``path`` is
    unchanged.

    Args:
      path: the file or folder.
      overwrite: whether an existing file is replaced.

    Raises:
      UserError: ``path`` exists and ``overwrite`` is False, or it cannot be written. An OSError inside the context counts as
        a failure to write.
    """
    path = as_path(path)
    if not overwrite:
        check_absent(path)
    if is_in_bucket(path):
        if overwrite:
            check_replaceable(path)
        with _uploaded_at_end(path, is_new=not overwrite) as temporary:
            yield temporary
        return
    new_parents = [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        for parent in reversed(new_parents):
            parent.mkdir(exist_ok=True)
        with _rename_at_end(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        for parent in new_parents:
            with contextlib.suppress(OSError):  # not empty: the write succeeded
                parent.rmdir()


def atomic_write_text(path: str | os.PathLike, text: str, *, errors: str = "strict") -> None:
    """Write a text file in UTF-8, replacing an existing one as a whole.

    Args:
      path: the file.
      text: its content.
      errors: handling of characters that cannot be encoded, as in ``open``.

    Raises:
      OSError: it cannot be written. An existing file is unchanged then. It is not a UserError because most callers log it
        and continue.
    """
    path = as_path(path)
    if is_in_bucket(path):
        with os_errors(path):
            path.write_bytes(text.encode(errors=errors))  # an object appears as a whole
        return
    with _rename_at_end(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


@contextlib.contextmanager
def _uploaded_at_end(path: Path, *, is_new: bool) -> Iterator[pathlib.Path]:
    """Context with a temporary local path for a file or folder, which is uploaded at the end."""
    try:
        with tempfile.TemporaryDirectory(prefix="dat_jax_") as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            try:
                upload(temporary, path)
            except BaseException:
                # What was uploaded of a new folder counts as nothing, but is in the way of another attempt. A single file appears
                # as a whole or not at all.
                if is_new and temporary.is_dir():
                    for name in list_objects(temporary):
                        with contextlib.suppress(OSError):
                            remove(path / name)
                raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def _rename_at_end(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Context with a temporary path that becomes ``path`` at the end, or is removed after a failure."""
    with contextlib.suppress(FileNotFoundError):
        # It raises an OSError before any work is done if the system refuses the name.
        if stat.S_ISDIR(path.lstat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = _temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a folder
        with contextlib.suppress(OSError):
            temporary.unlink()


def _temporary_name(path: pathlib.Path) -> pathlib.Path:
    """A short name, because that of ``path`` may be as long as the system allows."""
    return path.with_name(f".{os.getpid()}-{next(_NUMBERS)}.unfinished{path.suffix}")
