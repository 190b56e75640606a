"""The work directory of a run, on a disk or in a bucket."""

import json
import os
import pathlib
import platform
import time
import uuid

import jax

from dat_jax.errors import UserError
from dat_jax.parallel import multihost
from dat_jax.storage import Mirror, Path, atomic_write_text, check_writable, os_errors
from dat_jax.training.monitoring.hooks import Hook

_OWNER = ".run.json"  # the run that writes to the directory


class WorkDirectory:
    """Paths of a work directory, and which run writes to it.

    Checkpoints are written to the directory itself. Its other files are written to ``files`` by the first process: on a disk that
    is the directory, and for a bucket a temporary folder whose files are uploaded, see ``storage.Mirror``. Use as a context
    manager: at its end, the last files are uploaded.

    Attributes:
      path: the directory.
      files: local folder of its files.

    Args:
      path: a folder on a disk, or gs://BUCKET/NAME.

    Raises:
      UserError: ``path`` is not the name of such a folder.
    """

    def __init__(self, path: str | os.PathLike):
        if os.fspath(path).startswith("s3://"):
            raise UserError(f"{path} cannot be a work directory: expected a folder on a disk, or gs://BUCKET/NAME.")
        self._mirror = Mirror(path, uploads=jax.process_index() == 0)
        self.path: Path = self._mirror.path
        self.files: pathlib.Path = self._mirror.local
        self._token = uuid.uuid4().hex

    def __str__(self):
        return str(self.path)

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._mirror.close()

    def open_for_reading(self) -> None:
        """Copy the files of a directory in a bucket to ``files``. Files that are written there are uploaded at the end.

        Raises:
          UserError: they cannot be read.
        """
        try:
            self._mirror.open()
        except OSError as error:
            raise UserError(f"{self} cannot be read: {error.strerror}.") from error

    def open_for_writing(self) -> None:
        """Check that the directory can be written and that all processes share it, and become the run that writes to it.

        Raises:
          UserError: it cannot be written or read, or the processes have different directories of this name.
        """
        failure = ""
        try:
            if jax.process_index() == 0:
                check_writable(self.path)
                self._mirror.open(may_upload=lambda: self._read_owner().get("run") in (None, self._token))
                owner = {"run": self._token, "host": platform.node(), "process": os.getpid(), "started": time.ctime()}
                atomic_write_text(self.path / _OWNER, json.dumps(owner) + "\n")
        except (UserError, OSError) as error:
            failure = str(error) if isinstance(error, UserError) else f"{self} cannot be written: {error.strerror}."
        if not multihost.everywhere(not failure):
            raise UserError(failure or f"The first process cannot write {self}.")
        if jax.process_count() == 1:
            return
        self._token = multihost.broadcast_text(self._token)
        shared = self._read_owner().get("run")
        if not multihost.everywhere(shared == self._token):
            raise UserError(
                f"The processes of the run do not share {self}: each of them has a folder of this name. Choose a folder on a "
                "common disk, or gs://BUCKET/NAME."
            )

    def check_owner(self) -> None:
        """Check that no other run has been started in the directory since. All processes call it.

        Raises:
          UserError: another run has been started; it is named.
        """
        owner = self._read_owner() if jax.process_index() == 0 else {}
        if not multihost.everywhere(owner.get("run") in (None, self._token)):
            known = [str(owner[name]) for name in ("host", "process", "started") if name in owner]
            other = f" ({', '.join(known)})" if known else ""
            raise UserError(
                f"Another run was started in {self}{other}. This one ends, so that they do not replace each other's checkpoints."
            )

    def upload(self) -> None:
        """Start to upload the files that changed, if the directory is in a bucket. Returns at once."""
        self._mirror.upload()

    def _read_owner(self) -> dict[str, str]:
        """The run that writes to the directory; {} if that is not known."""
        try:
            with os_errors(self.path):
                return dict(json.loads((self.path / _OWNER).read_text()))
        except (OSError, ValueError, TypeError):
            return {}


class Uploads(Hook):
    """Uploads the files of a work directory whenever metrics were logged."""

    def __init__(self, directory: WorkDirectory):
        self._directory = directory

    def on_log(self, step, metrics):
        """See ``Hook``."""
        del step, metrics
        self._directory.upload()
        return {}

    def after_evaluation(self, step):
        """See ``Hook``."""
        del step
        self._directory.upload()
