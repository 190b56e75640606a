"""Integrity of saved data: digests of files, JSON and arrays, and their comparison when the data is read again.

Whatever is written is stored with its digests, and ``check_digests`` compares them on reading. Bytes on the host have the
SHA-256, as 64 hexadecimal digits. Arrays of a training state have a fingerprint that is computed on the devices that hold
them, because no single host may hold all of an array.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dat_jax.errors import UserError, name_some
from dat_jax.storage import Path, atomic_write_text, exists, is_in_bucket, list_objects, os_errors

MANIFEST = "files.json"
_COMMIT_FILE = "commit_success.txt"  # Orbax's, in a bucket
_POLL_SECONDS, _BUCKET_POLL_SECONDS = 0.05, 0.5


class DamagedError(UserError):
    """Saved data that cannot be read, or that differs from what was written."""


def check_digests(name: str, *, saved: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    """Compare the digests of what was read with the digests stored with it.

    Args:
      name: what errors call the data, such as "The checkpoint runs/a/4".
      saved: stored digests, by the name of a file or an array.
      actual: digests of what was read; None or no entry for what is missing or cannot be read.

    Raises:
      DamagedError: entries are missing, unexpected or different; each is named.
    """
    problems = []
    for entry in sorted(saved.keys() | actual.keys()):
        if entry not in saved:
            problems.append(f"{entry} is unexpected")
        elif actual.get(entry) is None:
            problems.append(f"{entry} is missing or cannot be read")
        elif actual[entry] != saved[entry]:
            problems.append(f"{entry} differs from what was written")
    if problems:
        raise DamagedError(f"{name} is damaged: {name_some(problems)}.")


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes of arrays, in the order of the names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype.name}\n".encode())
        digest.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def compute_fingerprints(tree: Any) -> Any:
    """Fingerprint of every array of a tree, for ``jax.jit``: it runs on the devices that hold the arrays.

    The bits of each element, as an unsigned integer, are multiplied by an odd number that depends on the position of the
    element, and summed modulo 2^32. So the fingerprint changes with any single bit, and does not depend on how an array is
    split over devices.

    Args:
      tree: arrays. Those whose elements do not have 2 or 4 bytes are converted to float32 first.

    Returns:
      The same tree with a uint32 scalar for each array.
    """

    def compute(array):
        if array.dtype.itemsize not in (2, 4) or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = array.astype(jnp.float32)
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
        position = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        return (bits * (position * jnp.uint32(2654435760) + jnp.uint32(1))).sum(dtype=jnp.uint32)

    return jax.tree.map(compute, tree)


def name_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by their path, such as "params/stages_0/proj/kernel".

    The name is the same for attributes, dictionary keys and indices, so that a state and what Orbax stores of it agree.
    """
    return {join_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def join_path(path) -> str:
    """Name of a place in a tree, see ``name_leaves``."""
    keys = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in path)
    return "/".join(str(key) for key in keys)


def write_manifest(directory: Path) -> None:
    """Write the digests of all files of a checkpoint to ``MANIFEST`` in its folder, atomically.

    Raises:
      OSError: a file cannot be read or the manifest cannot be written.
    """
    atomic_write_text(directory / MANIFEST, json.dumps(_hash_files(directory)) + "\n")


def check_manifest(directory: Path) -> None:
    """Compare the files of a checkpoint with its manifest. In a run of several processes the first one does it for all.

    Raises:
      DamagedError: files are missing, unexpected or different, or the manifest cannot be read.
    """
    if jax.process_index() > 0:
        return
    try:
        with os_errors(directory):
            saved = json.loads((directory / MANIFEST).read_text())
        actual = _hash_files(directory)
    except (OSError, ValueError) as error:
        raise DamagedError(f"The checkpoint {directory} is damaged: {MANIFEST} cannot be read.") from error
    if not isinstance(saved, dict):
        raise DamagedError(f"The checkpoint {directory} is damaged: {MANIFEST} is not a list of digests.")
    check_digests(f"The checkpoint {directory}", saved=saved, actual=actual)


def _hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but its manifest."""
    files = [file for file in list_objects(directory) if file != MANIFEST]
    with os_errors(directory):
        return {file: hash_file(directory / file) for file in files}


class ManifestWriter:
    """Thread that writes the manifest of a checkpoint as soon as Orbax has committed it.

    On a disk Orbax renames the folder to its final name; in a bucket it adds a file to it. A checkpoint without a manifest does
    not count as complete, so the time between the two is kept short.
    """

    def __init__(self, directory: Path):
        self._directory, self._error, self._cancelled = directory, None, threading.Event()
        remote = is_in_bucket(directory)
        self._committed = directory / _COMMIT_FILE if remote else directory
        self._poll_seconds = _BUCKET_POLL_SECONDS if remote else _POLL_SECONDS
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            while not exists(self._committed):
                if self._cancelled.wait(self._poll_seconds):
                    return
            write_manifest(self._directory)
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        """Wait until the manifest is written. Raises an OSError if it cannot be written."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Stop waiting for the folder, because the save failed."""
        self._cancelled.set()
        self._thread.join()
