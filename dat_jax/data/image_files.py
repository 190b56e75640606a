"""Discovery of image files in folders and tar archives.

Archives are indexed without unpacking: each image is described by its byte range.
"""

import collections
import logging
import os
import posixpath
import re
import tarfile
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dat_jax.errors import UserError, name_some

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = (
    *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
ARRAY_SUFFIX = ".npy"  # of class folders and images to predict
_COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_TAR_BLOCK = 512


class DamagedFile(UserError):
    """A file that cannot be read, as opposed to a readable file with unsupported or invalid content."""


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


class Listing(NamedTuple):
    """Content of a folder, each list sorted as plain strings.

    Attributes:
      folders, images: names of its subfolders and images.
      others: names of files that are not images.
      hidden: names of images that start with a dot.
    """

    folders: list[str]
    images: list[str]
    others: list[str]
    hidden: list[str]


class LeftOut:
    """Files that were left out of a data set, by reason, with an example of each."""

    def __init__(self):
        self._counts: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, names: Sequence[str], *, folder: str = "") -> None:
        """Add the names of files or folders in ``folder``."""
        if names:
            self._counts[reason] += len(names)
            self._examples.setdefault(reason, posixpath.join(folder, names[0]))

    def add_listing(self, listing: Listing, *, folder: str = "", subfolders: bool = False) -> None:
        """Add what is left out of a folder of which the images are taken, and its subfolders unless ``subfolders`` is True."""
        self.add("files that are no images", listing.others, folder=folder)
        self.add("hidden images", listing.hidden, folder=folder)
        if not subfolders:
            self.add("folders at a level that is not read", listing.folders, folder=folder)

    def log(self, place: object, taken: str) -> None:
        """Log what was taken from a place, and as a warning what was left out, if anything was."""
        if not self._counts:
            logger.info("%s: %s.", place, taken)
            return
        reasons = ", ".join(
            f"{count:,} {reason} (such as {self._examples[reason]})" for reason, count in self._counts.items()
        )
        logger.warning("%s: %s. Left out: %s.", place, taken, reasons)


def list_images(path: str) -> list[Member]:
    """List the images of a folder or of an uncompressed tar, sorted by class and then by name, as plain strings.

    Args:
      path: one of: a folder of class folders, a flat folder of images, a tar with one tar per class, a flat tar of images.
        Hidden files and files that are not images are left out, which is logged.

    Raises:
      UserError: the path does not exist, is not an uncompressed tar, is truncated, contains no images, or contains images both
        with and without a class.
    """
    if not os.path.exists(path):
        raise UserError(f"There is no tar or folder of images at {path}.")
    left_out = LeftOut()
    members = list(_walk_folder(path, left_out) if os.path.isdir(path) else _walk_tar(path, left_out))
    left_out.log(path, f"{len(members):,} images")
    if not members:
        raise UserError(
            f"{path} contains no images: expected class folders, one tar per class, or a flat folder or tar of images. Images "
            f"are files named {list_suffixes()}."
        )
    check_class_names(sorted({member.class_name for member in members} - {""}), source=path)
    without_class = [member.name for member in members if not member.class_name]
    if 0 < len(without_class) < len(members):
        raise UserError(f"{path} contains classes, but also images without a class: {name_some(without_class)}.")
    return sorted(members, key=lambda member: (member.class_name, member.name))


def read_member(member: Member) -> bytes:
    """Read the bytes of an image.

    Raises:
      DamagedFile: the file cannot be read, or ends before the image does.
    """
    try:
        with open(member.path, "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise DamagedFile(f"The image {member.name} cannot be read from {member.path}: {error.strerror}.") from error
    if member.size not in (-1, len(data)):
        raise DamagedFile(f"{member.path} ends within the image {member.name}: it has changed since it was listed.")
    return data


def scan_folder(path: str | os.PathLike, *, arrays: bool = False) -> Listing:
    """List a folder.

    Args:
      path: the folder.
      arrays: whether files of NumPy arrays are images.

    Raises:
      UserError: the folder cannot be read.
    """
    listing = Listing([], [], [], [])
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    if entry.name.lower().endswith(IMAGE_SUFFIXES):
                        listing.hidden.append(entry.name)
                elif entry.is_dir():
                    listing.folders.append(entry.name)
                else:
                    (listing.images if is_image(entry.name, arrays=arrays) else listing.others).append(entry.name)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be read: {error.strerror}.") from error
    return Listing(*map(sorted, listing))


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
        raise UserError(
            f"{source} has classes that are missing in the training images: {name_some(unknown)}."
            f"{suggest_name(unknown[0], class_names, place='The training images have')}"
        )
    return [labels[name] for name in names]


def check_class_names(names: Sequence[str], *, source: object) -> None:
    """Check that class names can be written as lines of a text file in UTF-8, and look different from each other.

    Args:
      names: the names; a name may occur twice.
      source: path that ``names`` come from, for error messages.

    Raises:
      UserError: a name is blank, has a line break or is not valid Unicode, or two names differ only in their Unicode form.
    """
    forms: dict[str, str] = {}
    for name in names:
        if not name.strip() or len(name.splitlines()) != 1 or not _is_unicode(name):
            raise UserError(f"{source} has a class named {name!r}: expected text in UTF-8 without line breaks.")
        first = forms.setdefault(unicodedata.normalize("NFC", name), name)
        if first != name:
            raise UserError(
                f"{source} has two classes that both look like {name}, {first!a} and {name!a}: expected one of them."
            )


def _is_unicode(name: str) -> bool:
    """Return whether a name can be encoded; file names in other encodings have surrogates in Python."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def suggest_name(name: str, names: Iterable[str], *, place: str) -> str:
    """Return a sentence about the name that is likely meant, with a space in front; "" if there is none.

    Args:
      name: a name that is missing.
      names: the existing names, of which one may differ in its folder, letter case, percent-encoding, Unicode form or suffix.
      place: start of the sentence, such as "The folder has".
    """
    names = list(names)
    for simplify in (_simplify, lambda text: posixpath.splitext(_simplify(text))[0]):
        similar = next((other for other in names if simplify(other) == simplify(name)), None)
        if similar is not None:
            return f" {place} {similar!a}, which is similar to {name!a}."
    return ""


def _simplify(name: str) -> str:
    last = re.split(r"[/\\]", urllib.parse.unquote(name))[-1]
    return unicodedata.normalize("NFC", last).casefold().strip()


def is_image(name: str, *, arrays: bool = False) -> bool:
    """Return whether a file name has the suffix of an image (with ``arrays``, also of a NumPy array) and is not hidden."""
    suffixes = (*IMAGE_SUFFIXES, ARRAY_SUFFIX) if arrays else IMAGE_SUFFIXES
    return not posixpath.basename(name).startswith(".") and name.lower().endswith(suffixes)


def list_suffixes(*, arrays: bool = False) -> str:
    """Return the suffixes of images in words."""
    *suffixes, last = (*IMAGE_SUFFIXES, ARRAY_SUFFIX) if arrays else IMAGE_SUFFIXES
    return f"{', '.join(f'*{suffix}' for suffix in suffixes)} or *{last}"


def error_text(error: object) -> str:
    """Return the message of an error as a single line."""
    return " ".join(str(error).split())


def _walk_folder(path: str, left_out: LeftOut) -> Iterator[Member]:
    listing = scan_folder(path)
    left_out.add_listing(listing, subfolders=True)
    for name in listing.images:
        yield Member(os.path.join(path, name), 0, -1, name, "")
    for folder in listing.folders:
        inner = scan_folder(os.path.join(path, folder))
        left_out.add_listing(inner, folder=folder)
        for name in inner.images:
            yield Member(os.path.join(path, folder, name), 0, -1, f"{folder}/{name}", folder)


def _walk_tar(path: str, left_out: LeftOut) -> Iterator[Member]:
    """Yield the images of a tar and of the tars inside it, all with offsets from the start of the outer file."""
    current = path  # the archive being read, for the error message
    try:
        with tarfile.open(path, "r:") as archive:
            for item in _walk_files(archive):
                name = posixpath.normpath(item.name)
                if name.lower().endswith(".tar"):
                    current = f"{name} in {path}"
                    yield from _walk_class_tar(archive, item, left_out, path=path, name=name)
                    current = path
                elif name.lower().endswith(_COMPRESSED_SUFFIXES):
                    raise UserError(f"{name} in {path} is compressed: expected images or uncompressed tars of images.")
                elif is_image(name):
                    yield Member(path, item.offset_data, item.size, name, "")
                else:
                    left_out.add("files that are no images", [name])
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{current} cannot be read as an uncompressed tar ({error}): if it is compressed, unpack it first; otherwise "
            "download it again."
        ) from error


def _walk_class_tar(
    archive: tarfile.TarFile, item: tarfile.TarInfo, left_out: LeftOut, *, path: str, name: str
) -> Iterator[Member]:
    """Yield the images of an inner tar, whose name is the class."""
    class_name = posixpath.basename(name)[: -len(".tar")]
    content = archive.extractfile(item)
    assert content is not None  # the item is a regular file
    with content as file, tarfile.open(fileobj=file, mode="r:") as class_archive:
        for image in _walk_files(class_archive):
            if is_image(image.name):
                offset = item.offset_data + image.offset_data
                yield Member(path, offset, image.size, f"{name}/{posixpath.normpath(image.name)}", class_name)
            else:
                left_out.add("files that are no images", [image.name], folder=name)


def _walk_files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files that are not hidden. Raises a ReadError if the archive lacks its end marker."""
    for item in archive:
        if item.isreg() and not posixpath.basename(item.name).startswith("."):
            yield item
    archive.fileobj.seek(archive.offset)  # tarfile treats an unreadable header as the end of the archive
    if archive.fileobj.read(_TAR_BLOCK).strip(b"\0"):
        raise tarfile.ReadError("it is damaged or truncated")
