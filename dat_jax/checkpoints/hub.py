"""Exports in repositories of the Hugging Face Hub, as folders on this machine."""

import json
import os
import pathlib

from dat_jax.checkpoints.integrity import DamagedError, check_digests, hash_file
from dat_jax.errors import UserError
from dat_jax.storage import download_repository, is_on_hub

_DESCRIPTION, _MANIFEST, _ARRAYS = "model.json", "manifest.json", "params/"


def resolve_address(path: str | os.PathLike, *, only_description: bool = False) -> str | os.PathLike:
    """Local folder of an export on the Hub; any other path is returned unchanged.

    The files are compared with the manifest of the export. Whoever reads several parts of an export resolves its address once,
    because a branch may change in between.

    Args:
      path: an address such as hf://USER/REPOSITORY@REVISION, or another path.
      only_description: whether model.json suffices. Otherwise the weights are downloaded, too.

    Returns:
      Folder in the cache of the Hub's library, with model.json and params/.

    Raises:
      UserError: the address is wrong, the repository cannot be read or is not an export, or the copy is damaged.
    """
    if not is_on_hub(path):
        return path
    patterns = [_DESCRIPTION] if only_description else [_DESCRIPTION, _MANIFEST, f"{_ARRAYS}*"]
    folder = download_repository(path, patterns=patterns)
    if not (folder / _DESCRIPTION).is_file():
        raise UserError(
            f"{os.fspath(path)} is not an export of dat_jax: it has no {_DESCRIPTION}. `dat-jax export TRAINED OUT_DIR "
            "--push=hf://USER/REPOSITORY` makes one."
        )
    if not only_description and (folder / _MANIFEST).is_file():
        _check_copy(folder, os.fspath(path))
    return folder


def _check_copy(folder: pathlib.Path, address: str) -> None:
    """Compare the downloaded files of an export with its manifest."""
    name = f"The copy of {address} in {folder}"
    try:
        records = json.loads((folder / _MANIFEST).read_text())["files"]
        saved = {
            file: record["sha256"]
            for file, record in records.items()
            if file == _DESCRIPTION or file.startswith(_ARRAYS)
        }
        actual = {file: hash_file(folder / file) if (folder / file).is_file() else None for file in saved}
        check_digests(name, saved=saved, actual=actual)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # also that of check_digests
        reason = str(error) if isinstance(error, DamagedError) else f"{name} is damaged: {_MANIFEST} cannot be read."
        raise DamagedError(f"{reason} Delete the folder {folder.parents[1]} to download it again.") from error
