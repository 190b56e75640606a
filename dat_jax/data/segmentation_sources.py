"""Random-access sources of images with a label map, for semantic segmentation.

A source has ``len``, ``class_names``, ``size(i) -> (H, W)``, which does not decode the image, and ``source[i]``, a record
{"image": uint8 (H, W, 3) RGB, "label": uint8 (H, W)}. The label 255 marks pixels without a class, which are ignored. An index
always gives the same record. Sources are pickled for data workers and read by several threads at once.
"""

import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from dat_jax.data import ade20k
from dat_jax.data.image_files import DamagedFile, LeftOut, Member, error_text, list_suffixes, read_member, scan_folder
from dat_jax.data.images import (
    DAMAGE,
    decode_image,
    explain_turned,
    is_turned,
    read_orientation,
    read_size,
    turn_upright,
)
from dat_jax.data.segmentation_transforms import IGNORED
from dat_jax.data.sources import SPLITS, read_record
from dat_jax.data.synthetic import ComposedSource
from dat_jax.errors import UserError, name_some

LABEL_FOLDERS = ("annotations", "labels", "masks")
SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("val", "validation")}
ADE20K_FILE = "objectInfo150.txt"
CLASS_FILE = "classes.txt"
_PNG_COLORS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray and alpha", 6: "RGBA"}


@dataclasses.dataclass(frozen=True)
class SegmentationArraySource:
    """Images and label maps in memory, of any sizes.

    Attributes:
      images: N images, uint8 (H, W, 3).
      labels: N label maps, uint8 (H, W).
      class_names: names of the classes, in label order.
    """

    images: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": self.labels[index]}

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        return self.images[index].shape[:2]


@dataclasses.dataclass(frozen=True)
class SegmentationFileSource:
    """Image and label files in two folders, read on access.

    Attributes:
      image_folder, label_folder: paths of the folders.
      files: (image file name, label file name) pairs.
      class_names: names of the classes in label order, at most 255, or 254 with ``zero_is_ignored``.
      zero_is_ignored: whether label files number the classes from 1 and 0 marks pixels without a class.
      label_values: value in label files of each class, in label order; empty: their indices, or with ``zero_is_ignored`` the
        indices plus 1. The value 255 marks pixels without a class, unless it is one of ``label_values``.
      skip_damaged: whether a pair with a damaged file is replaced by the next readable one instead of raising an error. If True,
        every record has "damaged", the number of pairs that it replaces, int32. Readable files with invalid content raise an
        error in either case.
      apply_orientation: see ``decode_image``. Label files belong to the upright image if it is True.
    """

    image_folder: str
    label_folder: str
    files: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    zero_is_ignored: bool
    skip_damaged: bool
    apply_orientation: bool = True
    label_values: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return read_record(self.read, index, count=len(self), skip_damaged=self.skip_damaged)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels, from the header of its file."""
        return read_size(self._paths(index)[0], apply_orientation=self.apply_orientation)

    def is_turned(self, index: int) -> bool:
        """Return whether the orientation tag of an image is applied and changes it."""
        return self.apply_orientation and is_turned(self._paths(index)[0])

    def _paths(self, index: int) -> tuple[str, str]:
        image, label = self.files[index]
        return os.path.join(self.image_folder, image), os.path.join(self.label_folder, label)

    def read(self, index: int) -> dict:
        """Return a record, or raise a DamagedFile error if one of its files cannot be read."""
        image_path, label_path = self._paths(index)
        image = decode_image(_read_file(image_path), name=image_path, apply_orientation=self.apply_orientation)
        label = self.read_label(index)
        if image.shape[:2] != label.shape:
            label_size, image_size = (f"{height} x {width}" for height, width in (label.shape, image.shape[:2]))
            advice = explain_turned(image_path, label.shape, apply_orientation=self.apply_orientation)
            raise UserError(
                f"The label file {label_path} has {label_size} pixels: expected {image_size}, the size of {image_path}.{advice}"
            )
        return {"image": image, "label": label}

    def read_label(self, index: int) -> np.ndarray:
        """Return the label map of an index, uint8 (H, W), or raise a DamagedFile error if its file cannot be read."""
        path = self._paths(index)[1]
        values = decode_label(_read_file(path), path=path, apply_orientation=self.apply_orientation)
        first = int(self.zero_is_ignored)
        class_values = self.label_values or tuple(range(first, first + len(self.class_names)))
        ignored = {0, IGNORED} if self.zero_is_ignored else {IGNORED}
        return _to_class_indices(values, class_values=class_values, ignored=ignored, path=path)


def _read_file(path: str) -> bytes:
    return read_member(Member(path, 0, -1, os.path.basename(path), ""))


def decode_label(data: bytes, *, path: str, apply_orientation: bool = True) -> np.ndarray:
    """Decode a label file, a PNG, to its values, uint8 (H, W).

    Accepted are a single channel of exactly 8 bits and palette images, whose indices are the values and whose colors are
    ignored. Gray PNGs of 1, 2 or 4 bits are rejected, because decoders spread their values over 0..255, and so are 16 bits,
    even if the values would fit into 8.

    Args:
      data: content of the file.
      path: path of the file for error messages.
      apply_orientation: whether the label map is turned by its own orientation tag, which label files rarely have.

    Raises:
      UserError: the file is not a PNG, is damaged, or is a PNG of another kind.
    """
    header = _png_header(data)
    if header is None:
        raise DamagedFile(f"The label file {path} is not a readable PNG: it does not start with a PNG header.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            values = np.array(image)
            orientation = read_orientation(image) if apply_orientation else 1
    except DAMAGE as error:
        raise DamagedFile(f"The label file {path} cannot be decoded: {error_text(error)}.") from error
    bits, color_type = header  # checked after decoding, because a damaged header is damage
    if color_type != 3 and header != (8, 0):
        kind = f"{_PNG_COLORS.get(color_type, 'unknown color type')} with {bits} bits"
        raise UserError(
            f"The label file {path} is {kind} per channel: expected a single channel with 8 bits that holds class indices."
        )
    return turn_upright(values, orientation)


def _png_header(data: bytes) -> tuple[int, int] | None:
    """Return the bits per channel and the color type, bytes 24 and 25 of a PNG; None if the file is not a PNG."""
    if len(data) < 26 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return None
    return data[24], data[25]


def _to_class_indices(
    values: np.ndarray, *, class_values: Sequence[int], ignored: Iterable[int], path: str
) -> np.ndarray:
    """Convert the values of a label file to class indices, uint8 (H, W), with ``IGNORED`` for pixels without a class.

    Args:
      values: uint8 (H, W).
      class_values: value of each class.
      ignored: values of pixels without a class, unless they are in ``class_values``.
      path: path of the file for error messages.

    Raises:
      UserError: another value occurs.
    """
    index_of = {value: IGNORED for value in ignored} | {value: index for index, value in enumerate(class_values)}
    invalid = [value for value in np.flatnonzero(np.bincount(values.ravel(), minlength=256)) if value not in index_of]
    if invalid:
        first, last = class_values[0], class_values[-1]
        is_range = list(class_values) == list(range(first, last + 1))
        expected = f"{first}..{last}" if is_range else ", ".join(map(str, class_values))
        no_class = " or ".join(str(value) for value in sorted(ignored) if value not in class_values)
        raise UserError(
            f"The label file {path} has the value {invalid[0]}: expected {expected} for the {len(class_values)} classes"
            f"{no_class and f', or {no_class} for no class'}. config.data.label_values sets the value of each class."
        )
    lookup = np.full(256, IGNORED, np.uint8)
    lookup[list(index_of)] = list(index_of.values())
    return lookup[values]


def load_segmentation_source(
    name: str,
    *,
    split: str,
    directory: str = "",
    zero_is_ignored: bool = False,
    label_values: tuple[int, ...] = (),
    apply_orientation: bool = True,
) -> SegmentationFileSource | ComposedSource:
    """Load a split of an embedded data set or of a directory of image and label files.

    A directory contains images/<split> and annotations/<split>; the latter folder may also be called labels or masks. The
    folder of a split is train or training, or val or validation. Every image has a label file with the same name up to the
    suffix, a PNG (see ``decode_label``), and every label file has an image. Hidden files, folders and files of other types are
    ignored. The class names are the lines of classes.txt.

    ADEChallengeData2016 is recognized by its objectInfo150.txt. It is also recognized with ``zero_is_ignored`` and without a
    classes.txt if the folders are images/training and annotations/training, or images/validation and annotations/validation.
    Its label files have k + 1 for class k and 0 for everything else, whatever the value of ``zero_is_ignored``. Class names are
    the first name in each row of objectInfo150.txt if that has 150 rows, and ``ade20k.CLASS_NAMES`` otherwise.

    Args:
      name: name of an embedded data set, ignored if ``directory`` is given. "digits_on_photographs": see ``data.synthetic``.
      split: "train" or "validation".
      directory: "" or a path.
      zero_is_ignored: whether the value 0 of label files is no class and class k is k + 1.
      label_values: value of each class in label files, see ``SegmentationFileSource``.
      apply_orientation: see ``decode_image``.

    Raises:
      UserError: the name or the split is unknown, folders or files are missing, or an image or label file has no counterpart.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if directory:
        return _load_directory(
            pathlib.Path(directory),
            split,
            zero_is_ignored,
            label_values=tuple(label_values),
            apply_orientation=apply_orientation,
        )
    if name not in _SOURCES:
        raise UserError(
            f"Unknown data set {name!r} for segmentation; choose one of {', '.join(_SOURCES)}, or set config.data.directory to "
            "the directory of a data set."
        )
    return _SOURCES[name](split)


_SOURCES = {"digits_on_photographs": ComposedSource}


def _load_directory(
    directory: pathlib.Path,
    split: str,
    zero_is_ignored: bool,
    *,
    label_values: tuple[int, ...],
    apply_orientation: bool,
) -> SegmentationFileSource:
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory} to read images from.")
    images = _choose_folder(_choose_folder(directory, ("images",)), SPLIT_FOLDERS[split])
    labels = _choose_folder(_choose_folder(directory, LABEL_FOLDERS), SPLIT_FOLDERS[split])
    is_ade20k = (directory / ADE20K_FILE).is_file()
    has_names = (directory / CLASS_FILE).is_file()
    if is_ade20k and has_names:
        raise UserError(
            f"{directory} has both {ADE20K_FILE} and {CLASS_FILE}: expected only one of them, which names the classes."
        )
    if zero_is_ignored and not has_names and labels.parent.name == "annotations":
        is_ade20k |= images.name == labels.name and images.name in ("training", "validation")
    zero_is_ignored |= is_ade20k
    files = _pair_files(images, labels)
    if is_ade20k:
        class_names = _read_ade20k_names(directory / ADE20K_FILE)
    else:
        class_names = _read_names(directory / CLASS_FILE, max_classes=IGNORED - zero_is_ignored)
    if label_values:
        _check_label_values(label_values, class_names, zero_is_ignored, directory)
    return SegmentationFileSource(
        str(images),
        str(labels),
        files,
        class_names,
        zero_is_ignored=zero_is_ignored,
        skip_damaged=split == "train",
        apply_orientation=apply_orientation,
        label_values=label_values,
    )


def _check_label_values(
    values: tuple[int, ...], class_names: Sequence[str], zero_is_ignored: bool, directory: pathlib.Path
) -> None:
    if zero_is_ignored:
        raise UserError(
            "config.data.label_values cannot be combined with config.data.zero_is_ignored or ADE20K, which number the classes "
            "from 1."
        )
    if len(set(values)) != len(values) or not set(values) <= set(range(256)) or len(values) != len(class_names):
        raise UserError(
            f"config.data.label_values is {', '.join(map(str, values))}: expected {len(class_names)} different values from 0 "
            f"to 255, one for each class of {directory / CLASS_FILE}."
        )


def _choose_folder(parent: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """Return the only subfolder that has one of several names."""
    folders = scan_folder(parent).folders
    matches = [name for name in names if name in folders]
    if len(matches) == 1:
        return parent / matches[0]
    if matches:
        raise UserError(f"{parent} has the folders {' and '.join(matches)}: expected only one of them.")
    raise UserError(
        f"{parent} has no folder named {' or '.join(names)}; its folders are: {name_some(folders) or 'none'}."
    )


def _pair_files(images: pathlib.Path, labels: pathlib.Path) -> tuple[tuple[str, str], ...]:
    """Return (image file name, label file name) pairs, sorted by the name of the image."""
    listings = {folder: scan_folder(folder) for folder in (images, labels)}
    image_names, label_names = (listing.images for listing in listings.values())
    for folder, listing in listings.items():
        left_out = LeftOut()
        left_out.add_listing(listing)
        left_out.log(folder, f"{len(listing.images):,} images")
    if not image_names:
        raise UserError(f"{images} contains no images. Images are files named {list_suffixes()}.")
    others = [name for name in label_names if not name.lower().endswith(".png")]
    if others:
        raise UserError(f"{labels} contains label files that are not PNG: {name_some(others)}.")
    image_of, label_of = _index_by_stem(images, image_names), _index_by_stem(labels, label_names)
    unlabeled = [name for stem, name in image_of.items() if stem not in label_of]
    if unlabeled:
        raise UserError(
            f"These images of {images} have no label file with the same name in {labels}: {name_some(unlabeled)}."
        )
    without_image = [name for stem, name in label_of.items() if stem not in image_of]
    if without_image:
        raise UserError(
            f"These label files of {labels} have no image with the same name in {images}: {name_some(without_image)}."
        )
    return tuple((name, label_of[stem]) for stem, name in image_of.items())


def _index_by_stem(folder: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
    """Map file names without their suffix to file names."""
    name_of = {}
    for name in names:
        first = name_of.setdefault(pathlib.PurePath(name).stem, name)
        if first != name:
            raise UserError(f"{folder} contains both {first} and {name}: expected names that differ before the suffix.")
    return name_of


def _read_lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The class names in {path} cannot be read: {error_text(error)}.") from error


def _read_ade20k_names(path: pathlib.Path) -> tuple[str, ...]:
    """Return the first name of every class in objectInfo150.txt.

    After a header line, each row has a class number, statistics and comma-separated names, with tabs in between.
    """
    rows = [line.split("\t") for line in _read_lines(path)[1:]] if path.is_file() else []
    if len(rows) != len(ade20k.CLASS_NAMES):
        return ade20k.CLASS_NAMES
    return tuple(row[-1].split(",")[0].strip() for row in rows)


def _read_names(path: pathlib.Path, max_classes: int) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(
            f"There is no {path}: expected a file with the names of the classes, one per line, in label order."
        )
    names = tuple(line.strip() for line in _read_lines(path))
    if "" in names:
        raise UserError(f"Line {names.index('') + 1} of {path} is empty: expected the name of a class in every line.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path} has these classes more than once: {name_some(repeated)}.")
    if len(names) > max_classes:
        raise UserError(f"{path} has {len(names)} classes: expected at most {max_classes}, as label files have 8 bits.")
    return names
