"""Copies between the local disk and buckets, and what else is done with the objects of a bucket."""

import atexit
import concurrent.futures
import functools
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import Any

from dat_jax.errors import UserError
from dat_jax.storage.hub import download_repository, is_on_hub
from dat_jax.storage.paths import BUCKET_SCHEMES, Path, as_path, is_in_bucket, os_errors

_PARALLEL_COPIES = 8
_FETCHING = threading.Lock()
_COPIED: dict[pathlib.Path, tuple[Any, ...]] = {}  # versions of the objects that ``fetch`` has copied


def exists(path: Path) -> bool:
    """Whether a file or folder exists. Raises an OSError if that cannot be found out in a bucket."""
    if not is_in_bucket(path):
        return os.path.exists(path)  # unlike pathlib's method, False for a name that the system refuses to look up
    with os_errors(path):
        return path.exists()


def list_objects(path: Path) -> list[str]:
    """Names of all files below a folder, relative to it, in ascending order. Raises an OSError."""
    if not is_in_bucket(path):
        return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    with os_errors(path):
        system, prefix = _get_filesystem(path)
        found = system.find(prefix)
    return sorted(name[len(prefix) + 1 :] for name in found if name != prefix and not name.endswith("/"))


def upload(source: pathlib.Path, target: Path) -> None:
    """Copy a local file or folder to a bucket.

    Of a folder, the files in it that describe the rest (``*.json`` at the top) come last, so that an upload that is cut short is
    not taken for a whole one.

    Raises:
      OSError: a file could not be copied, also after the library's retries.
    """
    if source.is_file():
        _copy_all([(source, target)], _put)
        return
    names = list_objects(source)
    last = [name for name in names if "/" not in name and name.endswith(".json")]
    _copy_all([(source / name, target / name) for name in names if name not in last], _put)
    _copy_all([(source / name, target / name) for name in last], _put)


def download(source: Path, target: pathlib.Path, *, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy the files of a folder in a bucket to a local folder.

    Args:
      source: a folder in a bucket.
      target: local folder, created if missing.
      wanted: which files to copy, by their names relative to ``source``.

    Raises:
      OSError: a file could not be copied.
    """
    _copy_all([(source / name, target / name) for name in list_objects(source) if wanted(name)], _get)


def remove(path: Path) -> None:
    """Delete an object, or a folder with all its objects. Raises an OSError."""
    with os_errors(path):
        system, name = _get_filesystem(path)
        system.rm(name, recursive=True)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder. In a bucket its objects are copied and deleted, one after the other. Raises an OSError."""
    if not is_in_bucket(path):
        path.rename(target)
        return
    with os_errors(path):
        system, name = _get_filesystem(path)
        system.mv(name, _get_filesystem(target)[1], recursive=True)


def fetch(path: str | os.PathLike, *, wanted: Callable[[str], bool] = lambda name: True) -> pathlib.Path:
    """A local path with the content of a file or folder: the path itself, or a copy of what is in a bucket or on the Hub.

    Copies of what is in a bucket are kept until the process ends. Files that have changed in the bucket are copied again.
    Repositories of the Hugging Face Hub are kept in the cache of its library.

    Args:
      path: a path that a user gave, or the address of a repository, hf://USER/REPOSITORY@REVISION.
      wanted: which files of a folder in a bucket are needed, by their names relative to it. Repositories are copied as a whole.

    Raises:
      UserError: there is nothing at a path in a bucket or on the Hub, or it cannot be read.
    """
    if is_on_hub(path):
        return download_repository(path)
    path = as_path(path)
    if not is_in_bucket(path):
        return path
    copy = _make_copy_folder() / str(path).replace("://", "/", 1)
    try:
        with _FETCHING:
            found = _update_copy(path, copy, wanted)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not found:
        raise UserError(f"{path} cannot be read: there is nothing.")
    return copy


def _update_copy(path: Path, copy: pathlib.Path, wanted: Callable[[str], bool]) -> bool:
    """Make a local copy agree with what is in a bucket. Returns whether there is a file."""
    with os_errors(path):
        system, prefix = _get_filesystem(path)
        found = system.find(prefix, detail=True)
    versions = {name[len(prefix) + 1 :]: _get_version(info) for name, info in found.items()}  # "" if path is a file
    names = [name for name in versions if not name.endswith("/") and (not name or wanted(name))]
    is_file = "" in versions
    if copy.exists() and copy.is_file() != is_file:  # a file has become a folder, or a folder a file
        copy.unlink() if copy.is_file() else shutil.rmtree(copy)
    if copy.is_dir():
        for name in set(list_objects(copy)) - set(versions):
            (copy / name).unlink()
    changed = [name for name in names if not (copy / name).exists() or _COPIED.get(copy / name) != versions[name]]
    _copy_all([(path / name, copy / name) for name in changed], _get)
    _COPIED.update({copy / name: versions[name] for name in changed})
    return bool(names)


def name_original(path: str | os.PathLike) -> str:
    """Name of a file as the user knows it: in the bucket if ``path`` is a copy of ``fetch``."""
    return restore_names(os.fspath(path))


def restore_names(text: str) -> str:
    """Replace the paths of copies in a text by their names in buckets."""
    if _make_copy_folder.cache_info().currsize:
        for scheme in BUCKET_SCHEMES:
            text = text.replace(f"{_make_copy_folder()}/{scheme}/", f"{scheme}://")
    return text


def _get_version(info: dict[str, Any]) -> tuple[Any, ...]:
    """Properties of an object that differ between any two versions of it."""
    return tuple(info.get(key) for key in ("size", "generation", "etag", "ETag", "updated", "LastModified"))


@functools.cache
def _make_copy_folder() -> pathlib.Path:
    folder = tempfile.mkdtemp(prefix="dat_jax_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


def _copy_all(pairs: Iterable[tuple[Any, Any]], copy: Callable[[Any, Any], None]) -> None:
    """Copy (source, target) pairs, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(_PARALLEL_COPIES) as pool:
        for done in [pool.submit(copy, *pair) for pair in pairs]:
            done.result()


def _put(source: pathlib.Path, target: Path) -> None:
    with os_errors(target):
        system, name = _get_filesystem(target)
        system.put_file(str(source), name)


def _get(source: Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    with os_errors(source):
        system, name = _get_filesystem(source)
        system.get_file(name, str(unfinished))
    unfinished.replace(target)


def _get_filesystem(path: Path) -> tuple[Any, str]:
    """The library's file system of a bucket, and the name of a path in it."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))
