"""Exported folders as repositories of the Hugging Face Hub."""

import os

from dat_jax.errors import UserError
from dat_jax.exporting.files import ONNX, WEIGHTS, check_files
from dat_jax.exporting.manifest import MANIFEST, PROGRAM_SUFFIX
from dat_jax.exporting.model_card import MODEL_CARD, format_model_card
from dat_jax.storage import commit_folder, fetch

_FILES = ("model.json", MANIFEST, WEIGHTS, ONNX)


def push_exported(
    directory: str | os.PathLike, address: str, *, license_id: str = "unknown", private: bool = False
) -> str:
    """Push an exported folder to a repository of the Hugging Face Hub, as one commit.

    The repository then has the files of the folder. Files of an earlier export that the folder does not have are deleted; other
    files are kept. If neither the folder nor the repository has a README.md, a model card is made from the manifest.

    Args:
      directory: folder that ``write_exported`` wrote, with the format "orbax".
      address: hf://USER/REPOSITORY or hf://USER/REPOSITORY@BRANCH. A missing repository or branch is created.
      license_id: license of the weights for the model card, an identifier of the Hub such as "apache-2.0".
      private: whether a missing repository is created as a private one.

    Returns:
      URL of the commit.

    Raises:
      UserError: the folder is damaged or lacks the format "orbax", the address is wrong, the repository is public despite
        ``private``, or the Hub refuses the commit. The repository is unchanged then.
    """
    manifest = check_files(directory)
    if "model.json" not in manifest["files"]:
        raise UserError(f"{directory} has no model.json, which dat_jax.load reads: export with the format orbax.")
    return commit_folder(
        fetch(directory),
        address,
        defaults={MODEL_CARD: format_model_card(manifest, address=address, license_id=license_id)},
        is_replaced=_belongs_to_export,
        message=f"Export of dat_jax {manifest['dat_jax']}",
        private=private,
    )


def _belongs_to_export(file: str) -> bool:
    """Whether a file of a repository can be that of an earlier export."""
    return file in _FILES or file.startswith("params/") or file.endswith(PROGRAM_SUFFIX)
