"""Paths of files and folders, on a disk or in a bucket (gs://BUCKET/NAME, s3://BUCKET/NAME).

A path in a bucket is an ``etils.epath.Path``, which has the methods of a ``pathlib.Path``, and is read and written by gcsfs or
s3fs. What differs from a disk: objects cannot be appended to, nothing is renamed atomically, and a folder is no more than the
beginning of the names of its objects.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import cast

from dat_jax.errors import UserError, explain_missing_module

Path = pathlib.Path  # or, in a bucket, an etils.epath.Path with the same methods
BUCKET_SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> package that reads and writes its buckets
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
# Control characters, and what the libraries take for patterns.
_REFUSED_CHARACTERS = re.compile(r"[\x00-\x1f\x7f*?\[\]#]")
_LONGEST_NAME = 900  # bytes; the services allow 1,024, and names of files are added
_LONGEST_PART = 200  # bytes; a file on a disk may have 255
_LIBRARIES = (
    "aiobotocore",
    "aiohttp",
    "asyncio",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "requests",
    "s3fs",
    "urllib3",
)
_CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or give the service account of the machine the role Storage Object User",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role that may read and write the bucket",
}


def as_path(path: str | os.PathLike) -> Path:
    """The path of a file or folder that a user gave.

    Args:
      path: a local path, or gs://BUCKET/NAME or s3://BUCKET/NAME, of which a ``pathlib.Path`` would drop a slash.

    Raises:
      UserError: another scheme, an impossible name of a bucket or an object, or the package for the scheme is missing.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.strip().partition(":/")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return pathlib.Path(text)
    _check_url(text, scheme, rest)
    _check_installed(scheme, text)
    _configure_libraries()
    from etils import epath

    return cast(Path, epath.Path(text.rstrip("/")))


def check_local(path: str | os.PathLike, *, key: str) -> None:
    """Check that data are on a disk, which the libraries that read them need.

    Args:
      path: a path that a user gave.
      key: name of the setting that holds the path, for the message.

    Raises:
      UserError: it is in a bucket; the command that makes the bucket a folder is named.
    """
    if not is_in_bucket(as_path(path)):
        return
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, name = rest.partition("/")
    mount = {"gs": f"gcsfuse --implicit-dirs {bucket} /mnt/{bucket}", "s3": f"mount-s3 {bucket} /mnt/{bucket}"}[scheme]
    raise UserError(
        f"{key}={path}: data are read from a disk. Copy them to one, or mount the bucket with `{mount}` and set "
        f"{key}=/mnt/{bucket}/{name}."
    )


def is_in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket, gs:// or s3://."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKET_SCHEMES))


def _check_url(text: str, scheme: str, rest: str) -> None:
    """Raise a UserError unless a text with a scheme is the URL of a folder or file in a bucket."""
    expected = f"{text!r}: expected a local path, gs://BUCKET/NAME or s3://BUCKET/NAME"
    known = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}.get(scheme.lower(), scheme.lower())
    if known not in BUCKET_SCHEMES:
        hints = {"file": "leave out file://", "hf": "the Hugging Face Hub is for weights and `dat-jax export --push`"}
        hint = hints.get(known, f"a folder {scheme}: in this one is ./{scheme}:")
        raise UserError(f"{expected}, got the scheme {scheme}; {hint}.")
    meant = f"{known}://{rest.strip().lstrip('/') or 'BUCKET/NAME'}"
    if scheme != known or text != text.strip() or not rest.startswith("/") or rest.startswith("//"):
        raise UserError(f"{expected}; did you mean {meant}?")
    bucket, *names = rest[1:].rstrip("/").split("/")
    if not _BUCKET_NAME.fullmatch(bucket) or ".." in bucket:
        raise UserError(
            f"{text!r}: {bucket!r} cannot be the name of a bucket, which has 3 to 222 lower-case letters, digits, dots, hyphens "
            "and underscores."
        )
    name = "/".join(names)
    if not names:
        raise UserError(f"{text!r}: expected a folder in the bucket, such as {text.rstrip('/')}/runs/1.")
    if any(part in ("", ".", "..") for part in names):
        raise UserError(f"{text!r}: the parts between slashes must not be empty, '.' or '..'.")
    if (found := _REFUSED_CHARACTERS.search(name)) is not None:
        raise UserError(f"{text!r}: {found[0]!r} is not allowed in the name of an object.")
    if any(len(part.encode(errors="surrogateescape")) > _LONGEST_PART for part in names):
        raise UserError(f"{text[:80]}...: a part between slashes has more than {_LONGEST_PART} bytes.")
    if len(name.encode(errors="surrogateescape")) > _LONGEST_NAME:
        raise UserError(f"{text[:80]}...: the name has more than {_LONGEST_NAME} bytes.")


def _check_installed(scheme: str, text: str) -> None:
    package = BUCKET_SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{text} cannot be used. {explain_missing_module(package)}")


@functools.cache
def _configure_libraries() -> None:
    """Settings of the libraries: files are listed anew each time, and errors are reported by this package only."""
    import fsspec.config

    for scheme in (*BUCKET_SCHEMES, "gcs"):
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):  # gcsfs reads it; TensorStore has a variable of its own
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)


@contextlib.contextmanager
def os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Context in which every error of a bucket's libraries becomes an OSError whose ``strerror`` is the reason.

    Args:
      path: the file or folder that is read or written. Errors of local files stay as they are.
    """
    if not is_in_bucket(path):
        yield
        return
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        is_foreign = type(error).__module__.split(".")[0] in _LIBRARIES
        if isinstance(error, OSError) and error.strerror and not is_foreign:
            raise
        if not isinstance(error, OSError) and not is_foreign and not isinstance(error, ValueError):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(getattr(error, "errno", None) or 5, _describe(error, os.fspath(path)), os.fspath(path)) from error


def _describe(error: Exception, path: str) -> str:
    """The reason of a failure in a bucket, in words."""
    scheme, _, rest = path.partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    text = " ".join(str(error).split()) or type(error).__name__
    code = str(getattr(error, "code", ""))
    if code in ("401", "403") or re.search(
        r"Forbidden|denied|Anonymous caller|credentials|Unauthorized", text, re.IGNORECASE
    ):
        return f"access to {bucket} is denied; {_CREDENTIALS[scheme]}"
    if isinstance(error, FileNotFoundError):
        return f"it is not there, or there is no bucket {bucket}"
    if re.search(r"NoSuchBucket|bucket does not exist", text):
        return f"there is no bucket {bucket}"
    if re.search(r"[Cc]onnect|[Tt]imeout|resolve", f"{type(error).__name__} {text}"):
        return f"{bucket} does not answer ({type(error).__name__})"
    return text[:200].rstrip(".")
