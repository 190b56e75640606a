"""Random-access sources of labeled images for classification.

A source has ``len``, ``class_names``, and ``source[i]``, a record {"image": (H, W, C), "label": np.int32}. An index always gives
the same record. Sources are pickled for data workers and read by several threads at once.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dat_jax.data.embedded import read_mnist5k
from dat_jax.data.image_files import (
    DamagedFile,
    LeftOut,
    Member,
    check_class_names,
    error_text,
    index_classes,
    list_suffixes,
    read_member,
    scan_folder,
)
from dat_jax.data.image_format import RGB, ImageFormat, decode
from dat_jax.errors import UserError, name_some

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
PREPARE_INPUTS = "progress/inputs.json"  # exists in every output directory of `python -m dat_jax.data.prepare`
METADATA_FILES = ("dataset_info.json", "features.json")  # a TFDS directory contains both
_MAX_CONSECUTIVE_DAMAGED = 100  # more in a row indicate a missing disk, not damaged files


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory.

    Attributes:
      images: uint8, uint16 or float32 (N, H, W, C).
      labels: int (N,).
      class_names: names of the classes, in label order.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": np.int32(self.labels[index])}


class Records(Protocol):
    """A sequence of (encoded bytes, label, name of the image)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[bytes, int, str]: ...


@dataclasses.dataclass(frozen=True)
class EncodedSource:
    """Encoded images, decoded on access.

    Attributes:
      records: encoded images with their labels and names.
      class_names: names of the classes, in label order.
      skip_damaged: whether a damaged image is replaced by the next readable one instead of raising an error. If True, every
        record has "damaged", the number of damaged images that it replaces, int32.
      apply_orientation: see ``decode_image``.
      image_format: channels and dtype of the images.
    """

    records: Records
    class_names: tuple[str, ...]
    skip_damaged: bool
    apply_orientation: bool = True
    image_format: ImageFormat = RGB

    @property
    def labels(self) -> np.ndarray | None:
        """The labels, int32 (N,), if they are known without reading the records."""
        return getattr(self.records, "labels", None)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return read_record(self.read, index, count=len(self), skip_damaged=self.skip_damaged)

    def read(self, index: int) -> dict:
        """Return a record, or raise a DamagedFile error if its image cannot be read."""
        data, label, name = self.records[index]
        return {"image": self.decode(data, name=name), "label": np.int32(label)}

    def decode(self, data: bytes, *, name: str) -> np.ndarray:
        """Decode an image of this source, see ``image_format.decode``."""
        return decode(data, name=name, image_format=self.image_format, apply_orientation=self.apply_orientation)


def report_damage(source: Any) -> Any:
    """The source as evaluations read it: a damaged image is an error, and is not replaced by another one."""
    return dataclasses.replace(source, skip_damaged=False) if isinstance(source, EncodedSource) else source


def read_record(read: Callable[[int], dict], index: int, *, count: int, skip_damaged: bool) -> dict:
    """Read a record, or the next readable one if it is damaged and ``skip_damaged`` is True.

    Args:
      read: function that returns the record of an index or raises a DamagedFile error.
      index: index from 0.
      count: number of records.
      skip_damaged: whether damaged records are skipped. The result then has "damaged", the number of records skipped, int32.

    Raises:
      IndexError: the index is out of range.
      DamagedFile: the record cannot be read, or none of the next 100 can.
    """
    if not 0 <= index < count:
        raise IndexError(f"index {index} of {count} images")
    if not skip_damaged:
        return read(index)
    error: DamagedFile | None = None
    for skipped in range(min(count, _MAX_CONSECUTIVE_DAMAGED)):
        try:
            return read((index + skipped) % count) | {"damaged": np.int32(skipped)}
        except DamagedFile as caught:
            error = caught
    assert error is not None  # at least one record was read
    raise error


def spread_indices(length: int, count: int) -> list[int]:
    """Up to ``count`` different indices spread evenly over ``length`` examples, in ascending order."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def read_spread_examples(source: Any, count: int) -> list[dict]:
    """Read up to ``count`` records spread evenly over a source, with the next readable one in place of a damaged one."""
    indices = spread_indices(len(source), count)
    return [read_record(source.__getitem__, index, count=len(source), skip_damaged=True) for index in indices]


def warn_if_turned(source: Any, indices: Sequence[int], *, split: str, annotations: str) -> None:
    """Log a warning if images are turned by their orientation tag: annotations of the stored pixels may have the same size.

    Args:
      source: a source with ``is_turned(index)``.
      indices: images to look at.
      split: "training" or "validation", for the message.
      annotations: what belongs to the images, such as "label maps".
    """
    turned = sum(map(source.is_turned, indices))
    if turned:
        logger.warning(
            "%d of %d %s images are turned by their orientation tag: their %s must be those of the upright images. Set "
            "config.data.apply_orientation=False if they are those of the stored pixels.",
            *(turned, len(indices), split, annotations),
        )


def describe_damage(source: Any, index: int) -> str | None:
    """Return why a record of a source cannot be read, or None if it can.

    Damage is found in data workers. With this function, the main process logs it, once.
    """
    try:
        source.read(index) if hasattr(source, "read") else source[index]
    except DamagedFile as error:
        return error_text(error)
    return None


def load_source(
    name: str,
    *,
    split: str,
    directory: str = "",
    apply_orientation: bool = True,
    image_format: ImageFormat = RGB,
) -> ArraySource | EncodedSource:
    """Load a split of an embedded data set or of a directory.

    A directory has one of two layouts:

    - A TFDS data set in array_record format, such as ``python -m dat_jax.data.prepare`` writes, in the directory itself or one
      or two levels below it (imagenet2012/5.1.0). If it has no split "validation", "test" is used.
    - Folders of image files, train/<class> and either val/<class> or validation/<class>. A label is the index of the class
      among the sorted folder names of train/.

    Args:
      name: name of an embedded data set, ignored if ``directory`` is given. "mnist5k": see ``embedded.read_mnist5k``.
      split: "train" or "validation".
      directory: "" or a path.
      apply_orientation: see ``decode_image``.
      image_format: channels and dtype of the images. Files are checked when they are read.

    Raises:
      UserError: the name or the split is unknown, files are missing, or the directory has neither layout; or an embedded data
        set has images of another format.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if directory:
        try:
            records, class_names = _load_directory(pathlib.Path(directory), split)
            return EncodedSource(records, class_names, split == "train", apply_orientation, image_format)
        except OSError as error:
            raise UserError(f"{directory} cannot be read: {error.strerror}.") from error
    if name not in _SOURCES:
        raise UserError(
            f"Unknown data set {name!r}; choose one of {', '.join(_SOURCES)}, or set config.data.directory to the directory "
            "of a data set."
        )
    source = _SOURCES[name](split)
    image_format.check(source[0]["image"], name=f"of the embedded data set {name}")
    return source


def _load_mnist5k(split: str) -> ArraySource:
    return ArraySource(*read_mnist5k(split))


_SOURCES = {"mnist5k": _load_mnist5k}


def _load_directory(directory: pathlib.Path, split: str) -> tuple[Records, tuple[str, ...]]:
    """Records and class names of a split."""
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory} to read images from.")
    if has_metadata(directory):
        return _load_tfds(directory, split)
    if (directory / PREPARE_INPUTS).is_file():
        raise UserError(f"The data set in {directory} is incomplete: run `python -m dat_jax.data.prepare` again.")
    if (directory / "train").is_dir():
        return _load_folders(directory, split)
    nested = [path for pattern in ("*", "*/*") for path in sorted(directory.glob(pattern)) if has_metadata(path)]
    if len(nested) == 1:
        return _load_tfds(nested[0], split)
    if nested:
        raise UserError(f"{directory} contains several data sets; choose one of {name_some(list(map(str, nested)))}.")
    content = sorted(path.name for path in directory.iterdir())
    raise UserError(
        f"{directory} contains no data set: expected {' and '.join(METADATA_FILES)} of TFDS up to two levels below it, or "
        f"folders of images, train/<class> and val/<class> or validation/<class>; got {name_some(content) or 'nothing'}. "
        "python -m dat_jax.data.split makes them from one folder per class."
    )


def has_metadata(path: pathlib.Path) -> bool:
    """Return whether a directory contains the metadata files of a TFDS data set."""
    return all((path / name).is_file() for name in METADATA_FILES)


@dataclasses.dataclass(frozen=True)
class _FolderRecords:
    """Records of the image files root/<class>/<file name>.

    Attributes:
      root: folder of the split.
      class_names: names of the classes, in label order.
      file_names: N names.
      labels: int32 (N,).
    """

    root: str
    class_names: tuple[str, ...]
    file_names: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        label = int(self.labels[index])
        path = os.path.join(self.root, self.class_names[label], self.file_names[index])
        return read_member(Member(path, 0, -1, self.file_names[index], self.class_names[label])), label, path


_FOLDERS = {"train": ("train",), "validation": ("val", "validation")}


def _load_folders(directory: pathlib.Path, split: str) -> tuple[Records, tuple[str, ...]]:
    class_names = scan_folder(directory / "train").folders
    check_class_names(class_names, source=directory / "train")
    roots = [path for path in map(directory.joinpath, _FOLDERS[split]) if path.is_dir()]
    if not roots:
        raise UserError(f"{directory} has no folder of {split} images: expected {' or '.join(_FOLDERS[split])}.")
    if len(roots) > 1:
        raise UserError(f"{directory} has the folders {' and '.join(_FOLDERS[split])}: expected only one of them.")
    (root,) = roots
    outer, left_out = scan_folder(root, arrays=True), LeftOut()
    left_out.add("images outside class folders", outer.images)
    left_out.add_listing(outer, subfolders=True)
    folders, files = outer.folders, {}
    for folder in folders:
        listing = scan_folder(root / folder, arrays=True)
        left_out.add_listing(listing, folder=folder)
        files[folder] = listing.images
    left_out.log(root, f"{sum(map(len, files.values())):,} images in {len(folders):,} class folders")
    empty = [folder for folder in folders if not files[folder]]
    if split == "train" and empty:
        raise UserError(
            f"These class folders of {root} contain no images: {name_some(empty)}. Images are files named "
            f"{list_suffixes(arrays=True)}."
        )
    if not any(files.values()):
        raise UserError(
            f"{root} contains no images in class folders. Images are files named {list_suffixes(arrays=True)}."
        )
    folder_labels = np.array(index_classes(folders, class_names, source=str(root)), np.int32)
    records = _FolderRecords(
        str(root),
        tuple(class_names),
        tuple(name for folder in folders for name in files[folder]),
        np.repeat(folder_labels, list(map(len, files.values()))),
    )
    return records, tuple(class_names)


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
    """Records of a TFDS data source, with images that are not decoded.

    Attributes:
      data_source: the data source.
      description: name of the split and directory, for error messages.
    """

    data_source: Any
    description: str

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        name = f"{index} of {self.description}"
        try:
            record = self.data_source[index]
        except Exception as error:  # array_record and protobuf raise several types
            raise DamagedFile(f"The image {name} cannot be read: {error_text(error)}.") from error
        if not record["image"]:  # array_record returns empty bytes for a truncated file
            raise DamagedFile(f"The image {name} cannot be read: it has no bytes.")
        if record.get("file_name"):
            name = f"{record['file_name'].decode(errors='replace')}, {name},"
        return record["image"], int(record["label"]), name


_TFDS_SPLITS = {"train": ("train",), "validation": ("validation", "test")}


def _load_tfds(directory: pathlib.Path, split: str) -> tuple[Records, tuple[str, ...]]:
    import tensorflow_datasets as tfds  # imported here because it takes a second

    try:
        builder = tfds.builder_from_directory(directory)
        info = builder.info
        features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    except Exception as error:  # TFDS raises several types for invalid metadata
        reason = error_text(error)[:200] or type(error).__name__
        raise UserError(f"The metadata of the data set in {directory} cannot be read: {reason}.") from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        file_format = info.file_format.value if info.file_format else "unknown"
        raise UserError(f"The data set in {directory} has the format {file_format}: expected array_record.")
    label = features.get("label")
    if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"The data set in {directory} has the features {name_some(sorted(features)) or 'none'}: expected image and label."
        )
    stored = next((name for name in _TFDS_SPLITS[split] if name in info.splits), None)
    if stored is None:
        expected = " or ".join(_TFDS_SPLITS[split])
        raise UserError(
            f"The data set in {directory} has the splits {name_some(list(info.splits))}: expected {expected}."
        )
    missing = [path.name for path in info.splits[stored].filepaths if not path.exists()]
    if missing:
        raise UserError(f"The data set in {directory} is incomplete; these files are missing: {name_some(missing)}.")
    decoders = {"image": tfds.decode.SkipDecoding()}
    data_source = builder.as_data_source(split=stored, decoders=decoders)  # pyright: ignore[reportCallIssue] (decorated)
    names = label.names or map(str, range(label.num_classes or 0))
    return _TfdsRecords(data_source, f"{stored} in {directory}"), tuple(names)
