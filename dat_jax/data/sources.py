"""Random-access sources of labelled images.

A source has ``len``, ``source[i] -> {"image": uint8 (H, W, 3) RGB, "label": np.int32}`` and ``class_names``. The same index
gives the same record, always. Sources are pickled for workers and read by several threads at once.
"""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dat_jax.data.embedded import read_mnist5k
from dat_jax.data.image_files import Member, index_classes, plain_reason, read_member, scan_folder
from dat_jax.data.images import decode_image
from dat_jax.errors import UserError, name_some

SPLITS = ("train", "validation")
PREPARE_INPUTS = "progress/inputs.json"  # in a directory that `python -m dat_jax.data.prepare` writes or wrote
METADATA_FILES = ("dataset_info.json", "features.json")  # a TFDS directory has both
_DAMAGED_AT_MOST = 100  # in a row: more is not damage but a disk that is gone


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory: images uint8 (N, H, W, 3), labels int (N,)."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": np.int32(self.labels[index])}


@dataclasses.dataclass(frozen=True)
class EncodedSource:
    """Images that are decoded when asked for.

    Attributes:
      records: random access to (encoded bytes, label, name of the image).
      class_names: of the labels, in order.
      skip_damaged: gives the next readable image for a damaged one, with one warning, where an error would end a run, and
        with every record "damaged": how many it stands in for.
      advice: a sentence that follows the error.
    """

    records: Sequence[tuple[bytes, int, str]]
    class_names: tuple[str, ...]
    skip_damaged: bool
    advice: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        read = functools.partial(read_readable, self._read, index, count=len(self))
        return read(skip_damaged=self.skip_damaged, damage=UserError, advice=self.advice)

    def _read(self, index: int) -> dict:
        data, label, name = self.records[index]
        return {"image": decode_image(data, name=name), "label": np.int32(label)}


def read_readable(
    read: Callable[[int], dict],
    index: int,
    *,
    count: int,
    skip_damaged: bool,
    damage: type[UserError],
    advice: str = "",
) -> dict:
    """The record of an index, or where that is damaged and ``skip_damaged`` is set, of the next readable one.

    Args:
      read: gives the record of an index, or raises ``damage``.
      index: from 0.
      count: of records.
      skip_damaged: says each damage once, and adds "damaged" to the record: how many it stands in for.
      damage: errors of a file that cannot be read; others are raised.
      advice: a sentence that follows the error.

    Raises:
      IndexError: no such index.
      UserError: nothing readable was found.
    """
    if not 0 <= index < count:
        raise IndexError(f"index {index} of {count} images")
    for tried in range(min(count, _DAMAGED_AT_MOST) if skip_damaged else 1):
        try:
            record = read((index + tried) % count)
            return record | {"damaged": np.int32(tried)} if skip_damaged else record
        except damage as caught:
            error = caught
        if skip_damaged:
            _warn_once(f"{plain_reason(error)} The next one is taken instead.")
    raise UserError(f"{plain_reason(error)} {advice}".strip()) from error


@functools.cache  # Python's own "once" starts anew whenever any code changes a filter of warnings
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=1)


def load_source(name: str, *, split: str, directory: str = "") -> ArraySource | EncodedSource:
    """A source by its name, or of what lies in a directory.

    Args:
      name: of an embedded data set; not used where a directory is given. "mnist5k": see ``embedded.read_mnist5k``.
      split: "train" or "validation".
      directory: "", or a path that holds either a data set of TFDS in array_record, such as
        ``python -m dat_jax.data.prepare`` writes, itself or one or two folders below (imagenet2012/5.1.0), where the split
        "test" serves for a missing "validation"; or folders train/<class> and val/<class> or validation/<class> of image
        files, where a label is the rank of the class's name in train/.

    Raises:
      UserError: unknown name or split, files that are not there, or a directory that holds none of these.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if directory:
        return _load_directory(pathlib.Path(directory), split)
    if name not in _SOURCES:
        raise UserError(
            f"Unknown data set {name!r}; choose one of {', '.join(_SOURCES)}, or give the directory of a data set "
            "(config.data.directory)."
        )
    return _SOURCES[name](split)


def _load_mnist5k(split: str) -> ArraySource:
    return ArraySource(*read_mnist5k(split))


_SOURCES = {"mnist5k": _load_mnist5k}


def _load_directory(directory: pathlib.Path, split: str) -> EncodedSource:
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory} to read images from.")
    if has_metadata(directory):
        return _load_tfds(directory, split)
    if (directory / PREPARE_INPUTS).is_file():
        raise UserError(f"The data set in {directory} is not complete: run `python -m dat_jax.data.prepare` again.")
    if (directory / "train").is_dir():
        return _load_folders(directory, split)
    below = [path for pattern in ("*", "*/*") for path in sorted(directory.glob(pattern)) if has_metadata(path)]
    if len(below) == 1:
        return _load_tfds(below[0], split)
    if below:
        raise UserError(f"{directory} holds several data sets, choose one of them: {name_some(list(map(str, below)))}.")
    found = sorted(path.name for path in directory.iterdir())
    raise UserError(
        f"{directory} holds no data set: wanted {' and '.join(METADATA_FILES)} of TFDS in it or one or two folders below, "
        f"or folders train/<class> and val/<class> of images, or train/<class> and validation/<class>, found "
        f"{name_some(found) or 'nothing'}."
    )


def has_metadata(path: pathlib.Path) -> bool:
    """Whether a folder is a data set of TFDS, by the files in it."""
    return all((path / name).is_file() for name in METADATA_FILES)


@dataclasses.dataclass(frozen=True)
class _FolderRecords:
    """Image files of root/<class>/: file_names in the order of labels int32 (N,)."""

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


def _load_folders(directory: pathlib.Path, split: str) -> EncodedSource:
    class_names = scan_folder(directory / "train")[0]
    root = next((path for path in map(directory.joinpath, _FOLDERS[split]) if path.is_dir()), None)
    if root is None:
        raise UserError(f"{directory} has no folder of the {split} images: wanted {' or '.join(_FOLDERS[split])}.")
    folders = scan_folder(root)[0]
    files = {folder: scan_folder(root / folder)[1] for folder in folders}
    empty = [folder for folder in folders if not files[folder]]
    if split == "train" and empty:
        raise UserError(f"These class folders of {root} hold no images: {name_some(empty)}.")
    if not any(files.values()):
        raise UserError(f"{root} holds no images in class folders.")
    records = _FolderRecords(
        str(root),
        tuple(class_names),
        tuple(name for folder in folders for name in files[folder]),
        np.repeat(
            np.array(index_classes(folders, class_names, source=str(root)), np.int32), list(map(len, files.values()))
        ),
    )
    advice = "`python -m dat_jax.data.prepare` finds all such files."
    return EncodedSource(records, tuple(class_names), skip_damaged=split == "train", advice=advice)


_FOLDERS = {"train": ("train",), "validation": ("val", "validation")}


@dataclasses.dataclass(frozen=True)
class _TfdsRecords:
    """Records of a data source of TFDS, images not decoded; ``place`` is what messages call it."""

    data_source: Any
    place: str

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        name = f"{index} of {self.place}"
        try:
            record = self.data_source[index]
        except Exception as error:  # of array_record or of the message in it
            raise UserError(f"The image {name} cannot be read: {plain_reason(error)}.") from error
        if not record["image"]:  # what array_record gives for a file that was cut off
            raise UserError(f"The image {name} cannot be read: it has no bytes.")
        if record.get("file_name"):
            name = f"{record['file_name'].decode(errors='replace')}, {name},"
        return record["image"], int(record["label"]), name


def _load_tfds(directory: pathlib.Path, split: str) -> EncodedSource:
    import tensorflow_datasets as tfds  # late: takes a second

    try:
        builder = tfds.builder_from_directory(directory)
        info, features = builder.info, dict(builder.info.features)
    except Exception as error:  # of several kinds, for files that are not what TFDS writes
        reason = plain_reason(error)[:200] or type(error).__name__
        raise UserError(f"The metadata of the data set in {directory} cannot be read: {reason}.") from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        kind = info.file_format.value if info.file_format else "unknown"
        raise UserError(f"The data set in {directory} is in the format {kind}: wanted array_record.")
    if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
        features.get("label"), tfds.features.ClassLabel
    ):
        raise UserError(f"The data set in {directory} has {name_some(sorted(features))}: wanted an image and a label.")
    stored = next((name for name in _TFDS_SPLITS[split] if name in info.splits), None)
    if stored is None:
        wanted = " or ".join(_TFDS_SPLITS[split])
        raise UserError(f"The data set in {directory} has the splits {name_some(list(info.splits))}: wanted {wanted}.")
    missing = [path.name for path in info.splits[stored].filepaths if not path.exists()]
    if missing:
        raise UserError(f"The data set in {directory} is not complete, these files are missing: {name_some(missing)}.")
    data_source = builder.as_data_source(split=stored, decoders={"image": tfds.decode.SkipDecoding()})
    names = features["label"].names or map(str, range(features["label"].num_classes))
    records = _TfdsRecords(data_source, f"{stored} in {directory}")
    return EncodedSource(records, tuple(names), skip_damaged=split == "train")


_TFDS_SPLITS = {"train": ("train",), "validation": ("validation", "test")}
