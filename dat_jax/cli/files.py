"""Files that commands read and write: names of outputs, checks before work starts, errors per file."""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from dat_jax.errors import UserError
from dat_jax.storage import Path, as_path, check_replaceable, exists, is_in_bucket, name_original, restore_names


def name_outputs(inputs: Sequence[pathlib.Path], directory: str | os.PathLike) -> list[pathlib.Path]:
    """Output file of each input: DIRECTORY/<stem>.png.

    If files in different folders have the same stem, outputs are in folders as the inputs are, below their common folder.

    Raises:
      UserError: two inputs in one folder have the same stem.
    """
    places = [pathlib.Path(path.name) for path in inputs]
    if len({path.stem for path in inputs}) < len(inputs):
        paths = [pathlib.Path(os.path.abspath(path)) for path in inputs]
        common = os.path.commonpath([path.parent for path in paths])
        places = [path.relative_to(common) for path in paths]
    by_output: dict[pathlib.Path, pathlib.Path] = {}
    for path, place in zip(inputs, places, strict=True):
        output = place.with_name(f"{place.stem}.png")
        if output in by_output:
            raise UserError(
                f"{by_output[output]} and {path} would both be written to {output}; process them separately."
            )
        by_output[output] = path
    return [as_path(directory) / output for output in by_output]


def check_outputs(outputs: Sequence[pathlib.Path], *, inputs: Sequence[pathlib.Path], overwrite: bool) -> None:
    """Check output files before any work is done.

    Args:
      outputs: files to write.
      inputs: files to read, which are never overwritten.
      overwrite: whether other existing files may be replaced.

    Raises:
      UserError: an output is written twice, is also an input, exists already, or lies below a file instead of a folder.
    """
    read, written = {_name(path) for path in inputs}, set()
    for path in outputs:
        resolved = _name(path)
        if resolved in written:
            raise UserError(f"{path} would be written twice; choose inputs and outputs with different names.")
        written.add(resolved)
        if resolved in read:
            raise UserError(f"{path} is an input and would be overwritten; choose another output.")
        if is_in_bucket(path):
            _check_bucket_output(path, overwrite=overwrite)
            continue
        if path.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder.")
        if path.parent.exists() and not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: {path.parent} is not a folder.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; --overwrite replaces it.")


def _name(path: Path) -> str:
    """Name of a file, in a bucket if it is a copy of what is there."""
    original = name_original(path)
    return original if is_in_bucket(original) else str(path.resolve())


def _check_bucket_output(path: Path, *, overwrite: bool) -> None:
    check_replaceable(path)
    try:
        found = exists(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    if found and not overwrite:
        raise UserError(f"{path} exists already; --overwrite replaces it.")


def process_files(files: Sequence[pathlib.Path], process: Callable[[int], None]) -> bool:
    """Call ``process(index)`` for every file. A UserError is printed to stderr and the next file is processed.

    Returns:
      True if all files succeeded.
    """
    succeeded = True
    for index, path in enumerate(files):
        try:
            process(index)
        except UserError as error:
            succeeded = False
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            print(f"error: {restore_names(message)}", file=sys.stderr, flush=True)
    return succeeded
