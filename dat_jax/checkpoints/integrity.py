"""The manifest of a checkpoint: the SHA-256 of each of its files, written last, by which damage is found."""

import hashlib
import json
import pathlib
import threading

import jax

from dat_jax.errors import UserError, name_some

MANIFEST = "files.json"


class DamagedError(UserError):
    """A checkpoint that cannot be read, or whose numbers are not those that were saved."""


class Listing:
    """Writes the manifest of a checkpoint, a folder, as soon as that is there, in a thread."""

    def __init__(self, path: pathlib.Path):
        self._path, self._error, self._stopped = path, None, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._path.exists():
            if self._stopped.wait(0.05):
                return
        try:
            write_manifest(self._path)
        except OSError as error:
            self._error = error

    def finish(self):
        """Raises an OSError where it could not be written."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def give_up(self):
        """Ends without one."""
        self._stopped.set()
        self._thread.join()


def write_manifest(path: pathlib.Path) -> None:
    """Lists the files of a checkpoint in it. It appears when it is whole."""
    unfinished = path / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(_list_files(path)) + "\n")
    unfinished.rename(path / MANIFEST)


def _list_files(path: pathlib.Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(MANIFEST))
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            digests[str(file.relative_to(path))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def check_files(path: pathlib.Path) -> None:
    """Compares the files of a checkpoint with its manifest; the first process reads for all.

    Raises:
      DamagedError: they differ, or the manifest cannot be read.
    """
    if jax.process_index() > 0:
        return
    try:
        saved, found = json.loads((path / MANIFEST).read_text()), _list_files(path)
    except (OSError, ValueError) as error:
        raise DamagedError(f"The checkpoint {path} is damaged: {MANIFEST} cannot be read.") from error
    if not isinstance(saved, dict):
        raise DamagedError(f"The checkpoint {path} is damaged: {MANIFEST} is not what was saved.")
    changed = [name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
    if changed:
        raise DamagedError(f"The checkpoint {path} is damaged: {name_some(changed)} differ from what was saved.")
