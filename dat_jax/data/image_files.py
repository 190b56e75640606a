"""Image files in folders and tars, listed without unpacking: where the bytes of each one lie."""

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
    """An image file, in an archive or by itself.

    Attributes:
      path: of the file to open, the archive or the image.
      offset: of the image's first byte in it.
      size: in bytes; -1 is up to the end.
      name: path within the archive or folder that was listed.
      class_name: the folder or the inner tar that the image is in, "" for none.
    """

    path: str
    offset: int
    size: int
    name: str
    class_name: str


def list_images(path: str) -> list[Member]:
    """The images of a folder or of an uncompressed tar, sorted by class and then by name, as plain strings.

    Args:
      path: a folder of class folders, a flat folder of images, a tar of one tar a class, or a flat tar of images. Other
        files and hidden ones are passed over.

    Raises:
      UserError: nothing there, not an uncompressed tar, cut off, no images, or images with and without a class.
    """
    if not os.path.exists(path):
        raise UserError(f"There is no tar or folder of images at {path}.")
    members = list(_walk_folder(path) if os.path.isdir(path) else _walk_tar(path))
    if not members:
        raise UserError(
            f"{path} holds no images: wanted files in class folders, tars of one class each, or flat files."
        )
    loose = [member.name for member in members if not member.class_name]
    if 0 < len(loose) < len(members):
        raise UserError(f"{path} holds classes, but also images without one: {name_some(loose)}.")
    return sorted(members, key=lambda member: (member.class_name, member.name))


def read_member(member: Member) -> bytes:
    """The bytes of an image.

    Raises:
      UserError: they cannot be read, or the archive ends before them.
    """
    try:
        with open(member.path, "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise UserError(f"The image {member.name} cannot be read from {member.path}: {error.strerror}.") from error
    if member.size not in (-1, len(data)):
        raise UserError(f"{member.path} ends within the image {member.name}: it was changed since it was listed.")
    return data


def scan_folder(path: str) -> tuple[list[str], list[str]]:
    """The names of the folders and of the images in a folder, each sorted as plain strings, without hidden ones.

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


def index_classes(wanted: Iterable[str], class_names: Sequence[str], *, source: str) -> list[int]:
    """The label of each wanted class, its place in ``class_names``.

    Raises:
      UserError: classes that are not there; named, with ``source``, the path that they come from.
    """
    wanted = list(wanted)
    labels = {name: label for label, name in enumerate(class_names)}
    unknown = sorted({name for name in wanted if name not in labels})
    if unknown:
        raise UserError(f"{source} has classes that the training images have not: {name_some(unknown)}.")
    return [labels[name] for name in wanted]


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and not hidden."""
    return not posixpath.basename(name).startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def plain_reason(error: object) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


def _walk_folder(path: str) -> Iterator[Member]:
    folders, images = scan_folder(path)
    for name in images:
        yield Member(os.path.join(path, name), 0, -1, name, "")
    for folder in folders:
        for name in scan_folder(os.path.join(path, folder))[1]:
            yield Member(os.path.join(path, folder, name), 0, -1, f"{folder}/{name}", folder)


def _walk_tar(path: str) -> Iterator[Member]:
    """Images of the tar itself, and of the tars in it. Offsets of both count from the start of the outer file."""
    inner = path  # what is being read, for the message
    try:
        with tarfile.open(path, "r:") as archive:
            for item in _walk_files(archive):
                name = posixpath.normpath(item.name)
                if name.lower().endswith(".tar"):
                    inner = f"{name} in {path}"
                    class_name = posixpath.basename(name)[: -len(".tar")]
                    with archive.extractfile(item) as file, tarfile.open(fileobj=file, mode="r:") as class_archive:
                        for image in _walk_files(class_archive):
                            if is_image(image.name):
                                place = item.offset_data + image.offset_data
                                image_name = f"{name}/{posixpath.normpath(image.name)}"
                                yield Member(path, place, image.size, image_name, class_name)
                    inner = path
                elif name.lower().endswith(_COMPRESSED_SUFFIXES):
                    raise UserError(f"{name} in {path} is compressed: wanted images, or uncompressed tars of them.")
                elif is_image(name):
                    yield Member(path, item.offset_data, item.size, name, "")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{inner} cannot be read as an uncompressed tar ({error}): where it is compressed unpack it first, otherwise "
            "fetch it again."
        ) from error


def _walk_files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The plain files that are not hidden. Raises a ReadError where the archive does not end as tars do."""
    for item in archive:
        if item.isreg() and not posixpath.basename(item.name).startswith("."):
            yield item
    archive.fileobj.seek(archive.offset)  # tarfile takes a header that it cannot read for the end
    if archive.fileobj.read(_TAR_BLOCK).strip(b"\0"):
        raise tarfile.ReadError("it is damaged or cut off")
