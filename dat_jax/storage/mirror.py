"""A folder whose files are written on the local disk and, if it is in a bucket, uploaded again and again.

Objects cannot be appended to, and a file that grows, such as one of metrics, would be rewritten at each line. So the files of a
bucket's folder are copied to a temporary folder first, are written there, and those that changed are uploaded from time to time.
"""

import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable

from dat_jax.storage.paths import as_path, is_in_bucket
from dat_jax.storage.transfer import download, list_objects, upload

logger = logging.getLogger(__name__)
_LAST_UPLOAD_SECONDS = 120.0


class Mirror:
    """Local files of a folder that may be in a bucket. Uploads run in a thread; failed ones are tried again at the next call.

    Attributes:
      path: the folder.
      local: local folder with its files: ``path`` itself, or a temporary folder of the same name.

    Args:
      path: a folder on a disk or in a bucket.
      uploads: whether this process uploads; in a run of several processes one does.
    """

    def __init__(self, path: str | os.PathLike, *, uploads: bool = True):
        self.path = as_path(path)
        self._uploads, self._sent, self._warned = uploads, {}, False
        self._thread: threading.Thread | None = None
        self._wanted, self._ended = threading.Event(), False
        if is_in_bucket(self.path):
            self._temporary = tempfile.mkdtemp(prefix="dat_jax_")
            self.local = pathlib.Path(self._temporary) / self.path.name
            self.local.mkdir()
        else:
            self._temporary, self.local = None, self.path

    def open(self, *, may_upload: Callable[[], bool] = lambda: True) -> None:
        """Copy the files directly in the folder, without those of its folders, and start the thread of uploads.

        Args:
          may_upload: called before each upload; if it returns False, nothing is uploaded any more.

        Raises:
          OSError: they cannot be read.
        """
        if self._temporary is None or not self._uploads:
            return
        download(self.path, self.local, wanted=lambda name: "/" not in name)
        self._sent, self._may_upload = self._find_files(), may_upload
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def upload(self) -> None:
        """Start to upload the files that are new or changed since the last time. Returns at once."""
        self._wanted.set()

    def close(self) -> None:
        """Upload the last changes and remove the temporary folder. After two minutes, or a failure, it is kept and named."""
        if self._thread is not None:
            self._ended = True
            self._wanted.set()
            self._thread.join(_LAST_UPLOAD_SECONDS)
            if missing := self._find_changed():
                logger.warning(
                    "%d files are not in %s: %s. They are kept in %s.",
                    *(len(missing), self.path, ", ".join(sorted(missing)[:5]), self.local),
                )
                return
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _run(self) -> None:
        ended = False
        while not ended:
            self._wanted.wait()
            self._wanted.clear()
            ended = self._ended  # read before the files, so that the last ones are uploaded
            try:
                if not self._may_upload():
                    return
                self._upload_changed()
                self._warned = False
            except Exception as error:  # the next upload is tried, whatever it was
                if not self._warned:
                    reason = getattr(error, "strerror", None) or repr(error)
                    logger.warning("Files cannot be uploaded to %s: %s. It is tried again.", self.path, reason)
                self._warned = True

    def _upload_changed(self) -> None:
        for name, version in self._find_changed().items():
            upload(self.local / name, self.path / name)
            self._sent[name] = version

    def _find_changed(self) -> dict[str, tuple[int, int]]:
        return {name: version for name, version in self._find_files().items() if self._sent.get(name) != version}

    def _find_files(self) -> dict[str, tuple[int, int]]:
        """Name -> (size, time of the last change) of the files that are not being written as a whole."""
        found = {}
        for name in list_objects(self.local):
            if not name.rpartition("/")[2].startswith("."):
                try:
                    status = os.stat(self.local / name)
                except FileNotFoundError:  # renamed meanwhile
                    continue
                found[name] = (status.st_size, status.st_mtime_ns)
        return found
