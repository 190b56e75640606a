"""Additional evaluation sets of a classifier: other images of its classes, or other labels of its validation images.

Supported are ImageNet-V2 (1902.10811), -A (1907.07174), -R (2006.16241), -Sketch (1905.13549) and the Reassessed Labels
(2006.07159).
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dat_jax.data.image_files import Member, list_images, read_member
from dat_jax.data.image_format import RGB
from dat_jax.data.sources import EncodedSource, has_metadata, load_source
from dat_jax.errors import UserError, name_some
from dat_jax.storage import check_local

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def load_eval_sets(paths: dict[str, str], eval_source) -> dict[str, tuple[Any, np.ndarray | None]]:
    """Load the evaluation sets that have a path.

    Args:
      paths: name -> path; sets with the path "" are omitted. The path of "real" is the file real.json. Any other path is a
        directory: one folder per class, named by class or by label, or a TFDS data set in array_record format.
      eval_source: source of the validation images, which defines the classes and how images are decoded.

    Returns:
      name -> (source, labels of the classes that occur in the set, or None if all classes occur).

    Raises:
      UserError: a path does not exist, or a set has classes that are not among those of ``eval_source``.
    """
    for name, path in paths.items():
        check_local(path, key=f"config.eval.sets.{name}")
    return {
        name: (load_reassessed(path, eval_source), None)
        if name == "real"
        else _load_set(pathlib.Path(path), eval_source)
        for name, path in paths.items()
        if path
    }


def _load_set(directory: pathlib.Path, eval_source):
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory} of images to evaluate.")
    class_names = eval_source.class_names
    decoding: dict[str, Any] = {
        "apply_orientation": getattr(eval_source, "apply_orientation", True),
        "image_format": getattr(eval_source, "image_format", RGB),
    }
    if has_metadata(directory):
        source = load_source("", split="validation", directory=str(directory), **decoding)
        labels = index_by_name_or_number(source.class_names, class_names, place=str(directory))
        source = _RelabeledSource(source, labels, tuple(class_names))
    else:
        members = list_images(str(directory))
        folders = sorted({member.class_name for member in members})
        labels = index_by_name_or_number(folders, class_names, place=str(directory))
        label_of = dict(zip(folders, labels.tolist(), strict=True))
        member_labels = np.array([label_of[member.class_name] for member in members], np.int32)
        records = _MemberRecords(tuple(members), member_labels)
        source = EncodedSource(records, tuple(class_names), skip_damaged=False, **decoding)
    classes = np.unique(labels)
    return source, None if len(classes) == len(class_names) else classes


def index_by_name_or_number(names: Sequence[str], class_names: Sequence[str], *, place: str) -> np.ndarray:
    """Return the label of each name, int32 (N,). If all names are decimal numbers, they are the labels.

    Args:
      names: N names or numbers.
      class_names: names of the classes, in label order.
      place: path that ``names`` come from, for error messages.

    Raises:
      UserError: names that are neither classes nor labels.
    """
    index = {name: label for label, name in enumerate(class_names)}
    if all(name.isdecimal() and name not in index for name in names):
        index = {name: int(name) for name in names if int(name) < len(class_names)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise UserError(
            f"{place} has classes that the model's data set does not have: {name_some(unknown)}; expected folders named "
            f"after the {len(class_names)} classes or their labels."
        )
    return np.array([index[name] for name in names], np.int32)


@dataclasses.dataclass(frozen=True)
class _MemberRecords:
    """Records of ``EncodedSource`` from image files and their labels."""

    members: tuple[Member, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        member = self.members[index]
        return read_member(member), int(self.labels[index]), member.name


@dataclasses.dataclass(frozen=True)
class _RelabeledSource:
    """A source whose label k is replaced by ``labels[k]``."""

    source: Any
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record = self.source[index]
        return {**record, "label": self.labels[record["label"]]}


@dataclasses.dataclass(frozen=True)
class _ReassessedSource:
    """Records with "acceptable", bool (K,): the classes that are correct for the image, possibly none."""

    source: EncodedSource
    acceptable: tuple[tuple[int, ...], ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        data, label, name = self.source.records[index]
        number = _VALIDATION_NAME.search(name)
        if number is None or not 0 < int(number[1]) <= len(self.acceptable):
            raise UserError(
                f"The Reassessed Labels expect images named ILSVRC2012_val_00000001 to {len(self.acceptable):08}, got {name}."
            )
        acceptable = np.zeros(len(self.class_names), bool)
        acceptable[list(self.acceptable[int(number[1]) - 1])] = True
        return {"image": self.source.decode(data, name=name), "label": np.int32(label), "acceptable": acceptable}


def load_reassessed(path: str, eval_source: EncodedSource) -> _ReassessedSource:
    """Load the validation images with all classes that are correct for them.

    Args:
      path: the file real.json, a list with one list of labels per image, in the order of the image numbers.
      eval_source: source of the validation images, with their published file names.

    Raises:
      UserError: the file cannot be read or has other content, or the source has no file names.
    """
    if not isinstance(eval_source, EncodedSource):
        raise UserError("The Reassessed Labels (config.eval.sets.real) require the validation images of ImageNet.")
    try:
        lists = json.loads(pathlib.Path(path).read_text())
        acceptable = tuple(tuple(int(label) for label in labels) for labels in lists)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"The Reassessed Labels {path} cannot be read: {error}.") from error
    count = len(eval_source.class_names)
    if any(not 0 <= label < count for labels in acceptable for label in labels):
        raise UserError(
            f"The Reassessed Labels {path} have labels outside the {count} classes of the validation images."
        )
    return _ReassessedSource(eval_source, acceptable)
