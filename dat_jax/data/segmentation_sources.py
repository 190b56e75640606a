"""Random-access sources of images with a class index for every pixel.

A source has ``len``, ``source[i] -> {"image": uint8 (H, W, 3) RGB, "label": uint8 (H, W)}``, ``class_names`` and
``size(i) -> (H, W)``, which does not decode. A label of 255 belongs to no class and counts nowhere. The same index gives the
same record, always. Sources are pickled for workers and read by several threads at once.
"""

import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dat_jax.data import ade20k
from dat_jax.data.image_files import Member, plain_reason, read_member, scan_folder
from dat_jax.data.images import DAMAGE, decode_image
from dat_jax.data.segmentation_transforms import IGNORED
from dat_jax.data.sources import SPLITS, read_readable
from dat_jax.data.synthetic import ComposedSource
from dat_jax.errors import UserError, name_some

LABEL_FOLDERS = ("annotations", "labels", "masks")
SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("val", "validation")}
ADE20K_FILE = "objectInfo150.txt"
CLASS_FILE = "classes.txt"
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


@dataclasses.dataclass(frozen=True)
class SegmentationArraySource:
    """Images and labels in memory: N images uint8 (H, W, 3), N label maps uint8 (H, W), of any sizes."""

    images: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": self.labels[index]}

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return self.images[index].shape[:2]


class _DamagedFile(UserError):
    """A file that cannot be read, as against one that holds what it must not."""


@dataclasses.dataclass(frozen=True)
class SegmentationFileSource:
    """Image and label files in two folders, read when asked for.

    Attributes:
      image_folder, label_folder: paths.
      files: names of (image, label) in them.
      class_names: of the indices, in order; at most 255, or 254 with ``zero_is_ignored``.
      zero_is_ignored: label files count the classes from 1; their 0 becomes 255. Their 255 stays in either case.
      skip_damaged: gives the next readable pair for one with a damaged file, with one warning, where an error would end a
        run, and with every record "damaged": how many it stands in for. Whole files with a fault in them are errors also then.
    """

    image_folder: str
    label_folder: str
    files: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    zero_is_ignored: bool
    skip_damaged: bool

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        options = dict(count=len(self), skip_damaged=self.skip_damaged, damage=_DamagedFile)
        return read_readable(self._read, index, **options)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from the header of its file."""
        path = self._paths(index)[0]
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except DAMAGE as error:
            reason = getattr(error, "strerror", None) or plain_reason(error)
            raise UserError(f"The size of the image {path} cannot be read: {reason}.") from error

    def _paths(self, index: int) -> tuple[str, str]:
        image, label = self.files[index]
        return os.path.join(self.image_folder, image), os.path.join(self.label_folder, label)

    def _read(self, index: int) -> dict:
        image_path, label_path = self._paths(index)
        image = _decode_photograph(_read_file(image_path), path=image_path)
        label = decode_label(_read_file(label_path), path=label_path)
        if image.shape[:2] != label.shape:
            sizes = [f"{height} x {width}" for height, width in (label.shape, image.shape[:2])]
            raise UserError(f"The label file {label_path} has {sizes[0]} pixels: wanted {sizes[1]} as in {image_path}.")
        label = _index_classes(
            label, zero_is_ignored=self.zero_is_ignored, count=len(self.class_names), path=label_path
        )
        return {"image": image, "label": label}


def _read_file(path: str) -> bytes:
    try:
        return read_member(Member(path, 0, -1, os.path.basename(path), ""))
    except UserError as error:
        raise _DamagedFile(str(error)) from error


def _decode_photograph(data: bytes, *, path: str) -> np.ndarray:
    """As ``decode_image``, which would clip an image of more than 8 bits: so that one is refused."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
    except Exception:  # decode_image says what is wrong
        mode = ""
    if mode.startswith(("I", "F")) or (_png_header(data) or (8,))[0] == 16:
        raise UserError(f"The image {path} has more than 8 bits a value: wanted an image of 8 bits.")
    try:
        return decode_image(data, name=path)
    except UserError as error:
        raise _DamagedFile(str(error)) from error


def decode_label(data: bytes, *, path: str) -> np.ndarray:
    """Bytes of a PNG -> its values, uint8 (H, W).

    Taken are one channel of exactly 8 bits, and a palette, whose indices count and whose colours do not. Not 1, 2 or 4 bits
    of grey: decoders spread these over 0..255; not 16 bits, even where the values would fit.

    Raises:
      UserError: another kind of PNG, no PNG, or a damaged one; names it by ``path``.
    """
    header = _png_header(data)
    if header is None:
        raise _DamagedFile(f"The label file {path} is no PNG that can be read: its first bytes are not a PNG's.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            values = np.array(image)
    except DAMAGE as error:
        raise _DamagedFile(f"The label file {path} cannot be decoded: {plain_reason(error)}.") from error
    bits, colours = header  # looked at last: a damaged header is damage
    if colours != 3 and header != (8, 0):
        came = f"{_PNG_COLOURS.get(colours, 'unknown colours')} of {bits} bits"
        raise UserError(f"The label file {path} is {came}: wanted one channel of 8 bits that holds class indices.")
    return values


def _png_header(data: bytes) -> tuple[int, int] | None:
    """Bits a value and kind of colours, bytes 24 and 25 of a PNG, where its first chunk is; None for another file."""
    if len(data) < 26 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return None
    return data[24], data[25]


def _index_classes(values: np.ndarray, *, zero_is_ignored: bool, count: int, path: str) -> np.ndarray:
    """Values of a label file -> class indices, uint8 (H, W); refuses a value that is none of ``count`` classes."""
    first = int(zero_is_ignored)
    wrong = np.flatnonzero(np.bincount(values.ravel(), minlength=256)[first + count : IGNORED])
    if len(wrong):
        wanted = f"{first}..{first + count - 1} for the {count} classes, {'0 or ' if first else 'or '}255 for no class"
        raise UserError(f"The label file {path} has the value {first + count + wrong[0]}: wanted {wanted}.")
    # 0 - 1 is 255 in uint8
    return np.where(values == IGNORED, np.uint8(IGNORED), values - np.uint8(1)) if zero_is_ignored else values


def load_segmentation_source(
    name: str, *, split: str, directory: str = "", zero_is_ignored: bool = False
) -> SegmentationFileSource | ComposedSource:
    """A source by its name, or of the image and label files in a directory.

    The directory has images/<split> and annotations/<split>, or labels/ or masks/ for annotations/, with the split's folder
    called train or training, val or validation. Every image has a label file of the same name up to the suffix, a PNG (see
    ``decode_label``), and every label file an image; files of other kinds, hidden ones and folders are passed over.

    ADEChallengeData2016 is known by its objectInfo150.txt, or, with ``zero_is_ignored`` and without a classes.txt, by
    images/training and annotations/training or images/validation and annotations/validation. Its label files hold 0 for
    everything else and k + 1 for class k, whatever ``zero_is_ignored`` says. Its classes are called what comes first in each
    row of objectInfo150.txt if that has 150, else ``ade20k.CLASS_NAMES``. Other directories have their class names in
    classes.txt, one a line.

    Args:
      name: of an embedded data set; not used where a directory is given. "digits_on_photographs": see ``data.synthetic``.
      split: "train" or "validation".
      directory: "" or a path.
      zero_is_ignored: the value 0 of label files is no class and class k is k + 1.

    Raises:
      UserError: unknown name or split, folders or files that are not there, images without labels, labels without images.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if directory:
        return _load_directory(pathlib.Path(directory), split, zero_is_ignored)
    if name not in _SOURCES:
        raise UserError(
            f"Unknown data set {name!r} for segmentation; choose one of {', '.join(_SOURCES)}, or give the directory of a "
            "data set (config.data.directory)."
        )
    return _SOURCES[name](split)


_SOURCES = {"digits_on_photographs": ComposedSource}


def _load_directory(directory: pathlib.Path, split: str, zero_is_ignored: bool) -> SegmentationFileSource:
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory} to read images from.")
    images = _choose_folder(_choose_folder(directory, ("images",)), SPLIT_FOLDERS[split])
    labels = _choose_folder(_choose_folder(directory, LABEL_FOLDERS), SPLIT_FOLDERS[split])
    is_ade20k = (directory / ADE20K_FILE).is_file()
    has_names = (directory / CLASS_FILE).is_file()
    if is_ade20k and has_names:
        raise UserError(f"{directory} has both {ADE20K_FILE} and {CLASS_FILE}: wanted one of them to name the classes.")
    if zero_is_ignored and not has_names and labels.parent.name == "annotations":
        is_ade20k |= images.name == labels.name and images.name in ("training", "validation")
    zero_is_ignored |= is_ade20k
    most = IGNORED - zero_is_ignored
    return SegmentationFileSource(
        str(images),
        str(labels),
        _pair(images, labels),
        _read_ade20k_names(directory / ADE20K_FILE) if is_ade20k else _read_names(directory / CLASS_FILE, most),
        zero_is_ignored=zero_is_ignored,
        skip_damaged=split == "train",
    )


def _choose_folder(parent: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """The one folder of these names."""
    folders = scan_folder(parent)[0]
    found = [name for name in names if name in folders]
    if len(found) == 1:
        return parent / found[0]
    if found:
        raise UserError(f"{parent} has the folders {' and '.join(found)}: wanted one of them.")
    raise UserError(f"{parent} has no folder {' or '.join(names)}: found {name_some(folders) or 'no folder'}.")


def _pair(images: pathlib.Path, labels: pathlib.Path) -> tuple[tuple[str, str], ...]:
    """Names of (image, label) files, sorted by the images' names."""
    image_names, label_names = scan_folder(images)[1], scan_folder(labels)[1]
    if not image_names:
        raise UserError(f"{images} holds no images.")
    others = [name for name in label_names if not name.lower().endswith(".png")]
    if others:
        raise UserError(f"{labels} holds label files that are not PNG: {name_some(others)}.")
    image_of, label_of = _by_stem(images, image_names), _by_stem(labels, label_names)
    missing = [name for stem, name in image_of.items() if stem not in label_of]
    if missing:
        raise UserError(
            f"These images of {images} have no label file of the same name in {labels}: {name_some(missing)}."
        )
    surplus = [name for stem, name in label_of.items() if stem not in image_of]
    if surplus:
        raise UserError(
            f"These label files of {labels} have no image of the same name in {images}: {name_some(surplus)}."
        )
    return tuple((name, label_of[stem]) for stem, name in image_of.items())


def _by_stem(folder: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
    """Names by what they are up to the suffix."""
    found = {}
    for name in names:
        first = found.setdefault(pathlib.PurePath(name).stem, name)
        if first != name:
            raise UserError(f"{folder} holds both {first} and {name}: wanted names that differ before the suffix.")
    return found


def _read_text(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The class names in {path} cannot be read: {plain_reason(error)}.") from error


def _read_ade20k_names(path: pathlib.Path) -> tuple[str, ...]:
    """The first word for every class, from rows of a number, shares, counts and words, tabs between, below a header."""
    rows = [line.split("\t") for line in _read_text(path)[1:]] if path.is_file() else []
    if len(rows) != len(ade20k.CLASS_NAMES):
        return ade20k.CLASS_NAMES
    return tuple(row[-1].split(",")[0].strip() for row in rows)


def _read_names(path: pathlib.Path, most: int) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(
            f"There is no {path}: wanted the names of the classes in it, one a line, in the order of the labels."
        )
    names = tuple(line.strip() for line in _read_text(path))
    if "" in names:
        raise UserError(f"Line {names.index('') + 1} of {path} is empty: wanted the name of a class in every line.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has these classes more than once: {name_some(twice)}.")
    if len(names) > most:
        raise UserError(f"{path} has {len(names)} classes: wanted at most {most}, as label files have 8 bits.")
    return names
