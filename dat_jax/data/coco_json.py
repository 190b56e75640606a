"""Streaming reader for JSON files of COCO instances.

Entries are decoded one at a time into flat arrays, so that a file of 450 MB never becomes millions of Python objects at once.
"""

import collections
import json
import pathlib
import re
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dat_jax.data.image_files import check_class_names, error_text
from dat_jax.errors import UserError

MAX_COORDINATE = 1e5  # pixels; larger polygons are mistakes and would take gigabytes to fill
_MAX_NUMBER = 1e9  # of boxes and areas, in pixels
_MAX_SHOWN = 50  # characters of a value in messages
_LISTS = ("images", "annotations", "categories")
CLIPPED = "boxes clipped to the image"  # the only reason in ``skipped`` whose annotations are used
_MIN_BOXES = 5  # to recognize boxes in another format
_BYTE_ORDER_MARK = b"\xef\xbb\xbf".decode("latin-1")  # written by some editors on Windows
_BLANK = re.compile(r"[ \t\r\n]*")
_MAX_COUNT_CHARACTERS = 7  # with five bits each, enough for 2^32 pixels


class AnnotationTable(NamedTuple):
    """Content of a file in its order, with C categories, M images and N annotations.

    Attributes:
      categories: category id -> name.
      files: M file names.
      image_ids: int64 (M,).
      sizes: int32 (M, 2), height and width of the images in pixels.
      ids: int64 (N,), annotation ids for error messages; the index of an annotation without an id.
      owner_ids: int64 (N,), image id of every annotation.
      category_ids: int64 (N,).
      boxes: float64 (N, 4), x, y, width, height in pixels.
      areas: float64 (N,), in pixels.
      crowd, ignored: bool (N,).
      has_mask: bool (N,).
      mask_sizes: int64 (N, 2), height and width stated by run-length encoded masks, 0 for other annotations.
      spans: int64 (N, 2), byte offsets in the file of the first byte of an annotation and of the one after its last.
    """

    categories: dict[int, str]
    files: tuple[str, ...]
    image_ids: np.ndarray
    sizes: np.ndarray
    ids: np.ndarray
    owner_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    has_mask: np.ndarray
    mask_sizes: np.ndarray
    spans: np.ndarray


def read_table(path: str) -> AnnotationTable:
    """Read a file and check every entry on its own; ``link_annotations`` checks references between entries.

    Memory use peaks at about twice the size of the file while it is decoded, and is about its size afterwards.

    Raises:
      UserError: the file is not JSON or is truncated; a list or key is missing; a value has the wrong type, such as a number
        written as text, a boolean, NaN or infinity; "iscrowd" or "ignore" is not 0, 1, true, false or null; two images or two
        categories have the same id; a polygon or run-length encoding is invalid; something follows the JSON object.
    """
    return _read_lists(path, _LISTS, required=_LISTS).table()


def read_ids(path: str) -> tuple[dict[str, int], dict[int, str]]:
    """Read the ids of images and categories of a COCO file, which need not have annotations.

    Returns:
      {file name of an image: image id}, and {category id: name}, empty if the file has no list "categories".

    Raises:
      UserError: as ``read_table``, or a file name is listed with two ids.
    """
    table = _read_lists(path, ("images", "categories"), required=("images",)).table()
    numbers = dict(zip(table.files, table.image_ids.tolist(), strict=True))
    if len(numbers) < len(table.files):
        repeated = [name for name, count in collections.Counter(table.files).items() if count > 1]
        raise UserError(f"{path} has several image ids for the file {repeated[0]}.")
    return numbers, table.categories


def _read_lists(path: str, lists: Sequence[str], *, required: Sequence[str]) -> "_Collector":
    """Read and check the entries of some lists of a file; raises the errors of ``read_table``."""
    try:
        # One character per byte, so that indices are byte offsets.
        text = pathlib.Path(path).read_bytes().decode("latin-1")
    except OSError as error:
        raise UserError(f"The annotations {path} cannot be read: {error.strerror}.") from error
    collector = _Collector(path)
    try:
        present = _scan(text, {name: getattr(collector, f"add_{name}") for name in lists})
    except UserError:
        raise
    except IndexError as error:
        raise UserError(f"The annotations {path} are not valid JSON: the file ends too early.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The annotations {path} are not valid JSON: {error_text(error)}.") from error
    missing = [name for name in required if name not in present]
    if missing:
        raise UserError(f"The annotations {path} have no list {missing[0]!r}: expected a file of COCO instances.")
    return collector


class AnnotationLinks(NamedTuple):
    """Image and class of every annotation of a table, and whether it is usable.

    Attributes:
      category_ids: category ids in ascending order; the label of an object is the index in it.
      image_indices: int64 (N,), index of the image, -1 if it is not listed.
      labels: int64 (N,), -1 if the category is not listed.
      used: bool (N,), annotations whose image and category are listed and that are not skipped.
      skipped: reason -> number of annotations that were skipped or clipped.
    """

    category_ids: tuple[int, ...]
    image_indices: np.ndarray
    labels: np.ndarray
    used: np.ndarray
    skipped: dict[str, int]


def link_annotations(table: AnnotationTable, path: str) -> AnnotationLinks:
    """Look up the image and category of every annotation, and skip the annotations that ``coco.load_coco`` describes.

    Args:
      table: content of the file.
      path: path of the file for error messages.

    Raises:
      UserError: there are no categories or no images, a category has an impossible name, boxes are in another format, only some
        objects have masks, or a mask does not have the size of its image.
    """
    if not table.categories or not table.files:
        raise UserError(f"The annotations {path} list no {'images' if table.categories else 'categories'}.")
    check_class_names(list(table.categories.values()), source=path)
    category_ids = np.array(sorted(table.categories), np.int64)
    labels = _index_of(table.category_ids, category_ids)
    image_indices = _index_of(table.owner_ids, table.image_ids)
    bounds = table.sizes[image_indices, ::-1]
    starts, ends = table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]
    used = np.ones(len(image_indices), bool)
    skipped = {}
    for reason, mask in (
        ("annotations of unlisted images", image_indices < 0),
        ("annotations of unlisted categories", labels < 0),
        ('annotations marked "ignore"', table.ignored),
        ("empty boxes", (table.boxes[:, 2:] < 1).any(axis=1) | (table.areas <= 0)),
        ("boxes outside the image", (np.minimum(ends, bounds) <= np.maximum(starts, 0)).any(axis=1)),
    ):
        skipped[reason] = int(np.count_nonzero(used & mask))
        used &= ~mask
    skipped[CLIPPED] = int(np.count_nonzero(used & ((starts < 0) | (ends > bounds)).any(axis=1)))
    _check_box_format(table, image_indices, path)
    _check_masks(table, image_indices, used, path)
    return AnnotationLinks(tuple(category_ids.tolist()), image_indices, labels, used, skipped)


def _index_of(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the index of every value in ``keys``, which are unique; -1 for values that are not in it."""
    order = np.argsort(keys)
    indices = order[np.minimum(np.searchsorted(keys, values, sorter=order), len(keys) - 1)]
    return np.where(keys[indices] == values, indices, -1)


def _check_box_format(table: AnnotationTable, image_indices: np.ndarray, path: str) -> None:
    """Check that boxes are x, y, width and height in pixels, as far as their values show it."""
    listed = image_indices >= 0
    boxes, bounds = table.boxes[listed], table.sizes[image_indices[listed], ::-1]
    starts, ends = boxes[:, :2], boxes[:, 2:]
    if not len(boxes) or not (ends > 0).any():
        return
    if boxes.min() >= 0 and boxes.max() <= 1:
        raise UserError(
            f"All {len(boxes):,} boxes of {path} have values from 0 to 1: expected x, y, width and height in pixels, not "
            "fractions of the image."
        )
    # In the expected format, small boxes in the right or lower part of an image have x above the width or y above the height.
    outside = int(np.count_nonzero((starts + ends > bounds + 1).any(axis=1)))
    fits_corners = bool((ends > starts).all() and (ends <= bounds + 1).all())
    if len(boxes) >= _MIN_BOXES and fits_corners and 3 * outside > len(boxes):
        raise UserError(
            f"{outside:,} of {len(boxes):,} boxes of {path} reach beyond their image, and all fit as x1, y1, x2, y2: expected "
            "x, y, width and height in pixels."
        )


def _check_masks(table: AnnotationTable, image_indices: np.ndarray, used: np.ndarray, path: str) -> None:
    """Check that all used objects or none have masks, and that encoded masks have the size of their image."""
    if not table.has_mask.any():
        return
    missing = np.flatnonzero(used & ~table.has_mask)
    if len(missing):
        raise UserError(f"Annotation {table.ids[missing[0]]} of {path} has no mask, although others have one.")
    encoded = np.flatnonzero((image_indices >= 0) & (table.mask_sizes[:, 0] > 0))
    wrong = encoded[(table.mask_sizes[encoded] != table.sizes[image_indices[encoded]]).any(axis=1)]
    if len(wrong):
        first = wrong[0]
        mask_size, image_size = (f"{h} x {w}" for h, w in (table.mask_sizes[first], table.sizes[image_indices[first]]))
        raise UserError(
            f"Annotation {table.ids[first]} of {path} has a mask of {mask_size} pixels: expected {image_size}, the size of "
            "its image."
        )


class _Collector:
    """Checks entries and appends them to flat arrays."""

    def __init__(self, path: str):
        self._path, self._categories, self._images, self._files = path, {}, {}, []
        self._integers = {name: array("q") for name in ("ids", "owner_ids", "category_ids", "spans", "mask_sizes")}
        self._floats = {name: array("d") for name in ("boxes", "areas")}
        self._flags = {name: bytearray() for name in ("crowd", "ignored", "has_mask")}

    def add_categories(self, entry: Any, start: int, end: int) -> None:
        title = self._make_title("Category", entry, len(self._categories))
        number, name = _get_values(entry, title, id=int, name=str)
        if number in self._categories:
            raise UserError(f"{self._path} has the category {number} more than once.")
        self._categories[number] = name

    def add_images(self, entry: Any, start: int, end: int) -> None:
        title = self._make_title("Image", entry, len(self._files))
        number, name, height, width = _get_values(entry, title, id=int, file_name=str, height=int, width=int)
        if not (0 < height < MAX_COORDINATE and 0 < width < MAX_COORDINATE):
            raise UserError(
                f"{title} has {height} x {width} pixels: expected sides from 1 to {MAX_COORDINATE - 1:.0f}."
            )
        if not name.strip():
            raise UserError(f"{title} has an invalid 'file_name': expected a path, got {_format(name)}.")
        if number in self._images:
            raise UserError(f"{self._path} has the image {number} more than once.")
        self._images[number] = (height, width)
        self._files.append(name)

    def add_annotations(self, entry: Any, start: int, end: int) -> None:
        index = len(self._flags["crowd"])
        title = self._make_title("Annotation", entry, index)
        types = dict(image_id=int, category_id=int, bbox=list, area=float)
        owner_id, category_id, box, area = _get_values(entry, title, **types)
        number = _get_values(entry, title, id=int)[0] if entry.get("id") is not None else index
        try:
            _check_numbers("bbox", box, count=4, names="x, y, width and height")
            mask_size = _check_mask(entry.get("segmentation"))
            _check_polygon_units(entry.get("segmentation"), box)
            flags = (_read_flag(entry, "iscrowd"), _read_flag(entry, "ignore"), mask_size is not None)
        except ValueError as error:
            raise UserError(f"{title} has {error_text(error)}.") from error
        self._floats["boxes"].extend(box)
        self._floats["areas"].append(area)
        for key, value in (("ids", number), ("owner_ids", owner_id), ("category_ids", category_id)):
            self._integers[key].append(value)
        self._integers["spans"].extend((start, end))
        self._integers["mask_sizes"].extend(mask_size or (0, 0))
        for key, flag in zip(("crowd", "ignored", "has_mask"), flags, strict=True):
            self._flags[key].append(flag)

    def _make_title(self, kind: str, entry: Any, index: int) -> str:
        """Return the name of an entry for messages: by its id if it has one, otherwise by its index in the list."""
        number = entry.get("id") if isinstance(entry, dict) else None
        return f"{kind} {f'at index {index}' if number is None else _format(number)} of {self._path}"

    def table(self) -> AnnotationTable:
        """Return the entries so far as a table."""
        integers = {name: np.array(values, np.int64) for name, values in self._integers.items()}
        flags = {name: np.frombuffer(bytes(values), bool) for name, values in self._flags.items()}
        pairs = {name: integers.pop(name).reshape(-1, 2) for name in ("spans", "mask_sizes")}
        return AnnotationTable(
            categories=self._categories,
            files=tuple(self._files),
            image_ids=np.array(list(self._images), np.int64),
            sizes=np.array(list(self._images.values()), np.int32).reshape(-1, 2),
            boxes=np.array(self._floats["boxes"], np.float64).reshape(-1, 4),
            areas=np.array(self._floats["areas"], np.float64),
            **(integers | flags | pairs),
        )


_INTEGER_TYPES, _NUMBER_TYPES = frozenset((int,)), frozenset((int, float))  # bool is neither
_TYPES = {int: ("an integer", _INTEGER_TYPES), float: ("a finite number", _NUMBER_TYPES)}


def _get_values(entry: Any, title: str, /, **types: type) -> list:
    """Return the values of some keys of an entry, after checking that they are of type int, float (or int), str or list.

    Raises:
      UserError: a key is missing, or its value has another type or is too large.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{title} is not a JSON object.")
    for key, kind in types.items():
        if key not in entry:
            raise UserError(f"{title} has no {key!r}.")
        value = entry[key]
        if kind in _TYPES:
            expected, allowed = _TYPES[kind]
            limit = 2**63 if kind is int else _MAX_NUMBER
            is_valid = type(value) in allowed and abs(value) < limit
        else:
            expected, is_valid = {str: "text", list: "a list"}[kind], isinstance(value, kind)
        if not is_valid:
            raise UserError(f"{title} has an invalid {key!r}: expected {expected}, got {_format(value)}.")
    return [entry[key] for key in types]


def _check_numbers(key: str, values: list, *, count: int, names: str) -> None:
    """Check that a list has some finite numbers.

    Raises:
      ValueError: it does not. The message completes "Annotation ... has".
    """
    if len(values) != count:
        raise ValueError(f"{key} {_format(values)}: expected {count} numbers ({names}), got {len(values)}")
    _check_number_types(key, values)
    for value in values:
        if not abs(value) < _MAX_NUMBER:
            raise ValueError(f"{key} {_format(values)}: expected finite numbers, got {_format(value)}")


def _check_number_types(key: str, values: list) -> None:
    if not _NUMBER_TYPES.issuperset(map(type, values)):
        wrong = next(value for value in values if type(value) not in _NUMBER_TYPES)
        raise ValueError(f"{key} {_format(values)}: expected a number, got {_format(wrong)}")


def _read_flag(entry: dict, key: str) -> bool:
    """Return a flag: 0 or 1 as a number or boolean; 0 if it is missing or null."""
    value = entry.get(key)
    if value not in (None, 0, 1):
        raise ValueError(f"an invalid {key!r}: expected 0 or 1, got {_format(value)}")
    return bool(value)


def _format(value: Any) -> str:
    """Format a value for messages: text in quotes, other values as in JSON, long ones abbreviated."""
    text = repr(value) if not (value is None or isinstance(value, bool)) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


class _Constant:
    """NaN, Infinity or -Infinity, which are not JSON: no number, so that checks of the keys that are read refuse it."""

    def __init__(self, name: str):
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _scan(text: str, handlers: dict[str, Callable[[Any, int, int], None]]) -> set[str]:
    """Call a handler with (entry, start, end) for every entry of some lists of a JSON object.

    Args:
      text: the JSON object, decoded as latin-1.
      handlers: key of a list -> handler; start and end are offsets of the entry in ``text``.

    Returns:
      The keys of ``handlers`` that exist and are lists.

    Raises:
      ValueError, IndexError: the text is not JSON or is truncated.
    """
    decode, is_ascii, present = json.JSONDecoder(parse_constant=_Constant).raw_decode, text.isascii(), set()
    position = _skip_token(text, len(_BYTE_ORDER_MARK) if text.startswith(_BYTE_ORDER_MARK) else 0, "{")
    while text[position] != "}":
        key, position = decode(text, position)
        position = _skip_token(text, position, ":")
        if key not in handlers or text[position] != "[":
            position = _skip_comma(text, decode(text, position)[1], "}")
            continue
        present.add(key)
        position = _skip_token(text, position, "[")
        while text[position] != "]":
            entry, end = decode(text, position)
            if not is_ascii and not text[position:end].isascii():
                entry = json.loads(text[position:end].encode("latin-1"), parse_constant=_Constant)
            handlers[key](entry, position, end)
            position = _skip_comma(text, end, "]")
        position = _skip_comma(text, position + 1, "}")
    end = _skip_blank(text, position + 1)
    if end < len(text):
        raise ValueError(f"expected the end of the file at byte {end}, got {text[end : end + 10]!r}")
    return present


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _skip_token(text: str, position: int, token: str) -> int:
    """Return the position after a token and the whitespace around it."""
    position = _skip_blank(text, position)
    if text[position] != token:
        raise ValueError(f"expected {token!r} at byte {position}, got {text[position : position + 10]!r}")
    return _skip_blank(text, position + 1)


def _skip_comma(text: str, position: int, closing: str) -> int:
    """Return the position of the next entry, or of the closing bracket."""
    position = _skip_blank(text, position)
    return position if text[position] == closing else _skip_token(text, position, ",")


def _check_mask(mask: Any) -> tuple[int, int] | None:
    """Check a segmentation.

    Returns:
      (height, width) stated by a run-length encoding, (0, 0) for polygons, None if there is no mask.

    Raises:
      ValueError: the mask is invalid. The message completes "Annotation ... has".
    """
    if mask is None or mask == []:
        return None
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("a polygon that is not a list of at least three pairs of x and y")
            _check_number_types("a polygon", polygon)
            if not (min(polygon) > -MAX_COORDINATE and max(polygon) < MAX_COORDINATE):
                raise ValueError("a polygon that lies far outside any image")
        return 0, 0
    if not isinstance(mask, dict) or not {"size", "counts"} <= set(mask):
        raise ValueError("a segmentation that is neither polygons nor a size with counts")
    size, counts = mask["size"], mask["counts"]
    is_size = isinstance(size, list) and len(size) == 2
    if not is_size or not all(type(side) is int and 0 < side < MAX_COORDINATE for side in size):
        raise ValueError(f"a mask with the size {_format(size)}: expected a height and a width in pixels")
    if isinstance(counts, list) and not _INTEGER_TYPES.issuperset(map(type, counts)):
        wrong = next(count for count in counts if type(count) is not int)
        raise ValueError(f"a mask with invalid counts: expected integers, got {_format(wrong)}")
    runs = decode_counts(counts) if isinstance(counts, str) else np.array(counts)
    if runs.ndim != 1 or runs.dtype.kind != "i" or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"a mask with invalid counts: expected {size[0] * size[1]} pixels in total")
    return size[0], size[1]


def _check_polygon_units(mask: Any, box: Sequence[float]) -> None:
    """Raise a ValueError if the polygons of a box in pixels are fractions of the image. The mask and the box are valid."""
    if isinstance(mask, list) and min(box[2:]) > 2 and all(0 <= x <= 1 for polygon in mask for x in polygon) and mask:
        raise ValueError("polygons with coordinates from 0 to 1: expected pixels")


def decode_counts(text: str) -> np.ndarray:
    """Decode the compressed counts of a run-length encoding to run lengths, int64 (n,).

    A count is stored with five bits per character, as the difference from the count two positions earlier. Source:
    pycocotools, maskApi.c, which does not check the text.

    Raises:
      ValueError: the text is invalid.
    """
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("a mask with invalid compressed counts")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_COUNT_CHARACTERS:
        raise ValueError("a mask with invalid compressed counts")
    positions = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * positions), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values
