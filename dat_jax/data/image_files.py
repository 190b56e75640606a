"""Discovery of image files in folders and tar archives.

Archives are indexed without unpacking: each image is described by its byte range.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dat_jax.errors import UserError, name_some

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
_COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_TAR_BLOCK = 512


class Member(NamedTuple):
    """Location of an image file, stand-alone or in a tar archive.

    Attributes:
      path: the file to open, which is the archive or the image itself.
      offset: offset of the image's first byte in that file.
      size: number of bytes; -1 reads to the end of the file.
      name: path of the image relative to the archive or folder that was listed.
      class_name: name of the folder or inner tar that contains the image; "" if there is none.
    """

    path: str
    offset: int
    size: int
    name: str
    class_name: str


def list_images(path: str) -> list[Member]:
    """List the images of a folder or of an uncompressed tar, sorted by class and then by name, as plain strings.

    Args:
      path: one of: a folder of class folders, a flat folder of images, a tar with one tar per class, a flat tar of images.
        Hidden files and files that are not images are ignored.

    Raises:
      UserError: the path does not exist, is not an uncompressed tar, is truncated, contains no images, or contains images both
        with and without a class.
    """
    if not os.path.exists(path):
        raise UserError(f"There is no tar or folder of images at {path}.")
    members = list(_walk_folder(path) if os.path.isdir(path) else _walk_tar(path))
    if not members:
        raise UserError(
            f"{path} contains no images: expected class folders, one tar per class, or a flat folder or tar of images."
        )
    without_class = [member.name for member in members if not member.class_name]
    if 0 < len(without_class) < len(members):
        raise UserError(f"{path} contains classes, but also images without a class: {name_some(without_class)}.")
    return sorted(members, key=lambda member: (member.class_name, member.name))


def read_member(member: Member) -> bytes:
    """Read the bytes of an image.

    Raises:
      UserError: the file cannot be read, or ends before the image does.
    """
    try:
        with open(member.path, "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise UserError(f"The image {member.name} cannot be read from {member.path}: {error.strerror}.") from error
    if member.size not in (-1, len(data)):
        raise UserError(f"{member.path} ends within the image {member.name}: it has changed since it was listed.")
    return data


def scan_folder(path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Return the names of the subfolders and of the images in a folder, each sorted as plain strings, without hidden ones.

    Raises:
      UserError: the folder cannot be read.
    """
    folders, images = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif is_image(entry.name):
                    images.append(entry.name)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be read: {error.strerror}.") from error
    return sorted(folders), sorted(images)


def index_classes(names: Iterable[str], class_names: Sequence[str], *, source: str) -> list[int]:
    """Return the label of each class, which is its index in ``class_names``.

    Args:
      names: classes to look up.
      class_names: classes of the training images, in label order.
      source: path that ``names`` come from, for error messages.

    Raises:
      UserError: names that are not in ``class_names``.
    """
    names = list(names)
    labels = {name: label for label, name in enumerate(class_names)}
    unknown = sorted({name for name in names if name not in labels})
    if unknown:
        raise UserError(f"{source} has classes that are missing in the training images: {name_some(unknown)}.")
    return [labels[name] for name in names]


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image and is not hidden."""
    return not posixpath.basename(name).startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def error_text(error: object) -> str:
    """Return the message of an error as a single line."""
    return " ".join(str(error).split())


def _walk_folder(path: str) -> Iterator[Member]:
    folders, images = scan_folder(path)
    for name in images:
        yield Member(os.path.join(path, name), 0, -1, name, "")
    for folder in folders:
        for name in scan_folder(os.path.join(path, folder))[1]:
            yield Member(os.path.join(path, folder, name), 0, -1, f"{folder}/{name}", folder)


def _walk_tar(path: str) -> Iterator[Member]:
    """Yield the images of a tar and of the tars inside it, all with offsets from the start of the outer file."""
    current = path  # the archive being read, for the error message
    try:
        with tarfile.open(path, "r:") as archive:
            for item in _walk_files(archive):
                name = posixpath.normpath(item.name)
                if name.lower().endswith(".tar"):
                    current = f"{name} in {path}"
                    yield from _walk_class_tar(archive, item, path=path, name=name)
                    current = path
                elif name.lower().endswith(_COMPRESSED_SUFFIXES):
                    raise UserError(f"{name} in {path} is compressed: expected images or uncompressed tars of images.")
                elif is_image(name):
                    yield Member(path, item.offset_data, item.size, name, "")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{current} cannot be read as an uncompressed tar ({error}): if it is compressed, unpack it first; otherwise "
            "download it again."
        ) from error


def _walk_class_tar(archive: tarfile.TarFile, item: tarfile.TarInfo, *, path: str, name: str) -> Iterator[Member]:
    """Yield the images of an inner tar, whose name is the class."""
    class_name = posixpath.basename(name)[: -len(".tar")]
    content = archive.extractfile(item)
    assert content is not None  # the item is a regular file
    with content as file, tarfile.open(fileobj=file, mode="r:") as class_archive:
        for image in _walk_files(class_archive):
            if is_image(image.name):
                offset = item.offset_data + image.offset_data
                yield Member(path, offset, image.size, f"{name}/{posixpath.normpath(image.name)}", class_name)


def _walk_files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files that are not hidden. Raises a ReadError if the archive lacks its end marker."""
    for item in archive:
        if item.isreg() and not posixpath.basename(item.name).startswith("."):
            yield item
    archive.fileobj.seek(archive.offset)  # tarfile treats an unreadable header as the end of the archive
    if archive.fileobj.read(_TAR_BLOCK).strip(b"\0"):
        raise tarfile.ReadError("it is damaged or truncated")
