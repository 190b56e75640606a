"""Files and folders on disks, in buckets and on the Hugging Face Hub. No other package knows the difference."""

from dat_jax.storage.files import atomic_path, atomic_write_text, check_absent, check_replaceable, check_writable
from dat_jax.storage.hub import check_hub_address, commit_folder, download_repository, is_on_hub, parse_hub_address
from dat_jax.storage.mirror import Mirror
from dat_jax.storage.paths import Path, as_path, check_local, is_in_bucket, os_errors
from dat_jax.storage.transfer import (
    download,
    exists,
    fetch,
    list_objects,
    move,
    name_original,
    remove,
    restore_names,
    upload,
)

__all__ = [
    "Mirror",
    "Path",
    "as_path",
    "atomic_path",
    "atomic_write_text",
    "check_absent",
    "check_hub_address",
    "check_local",
    "check_replaceable",
    "check_writable",
    "commit_folder",
    "download",
    "download_repository",
    "exists",
    "fetch",
    "is_in_bucket",
    "is_on_hub",
    "list_objects",
    "move",
    "name_original",
    "os_errors",
    "parse_hub_address",
    "remove",
    "restore_names",
    "upload",
]
