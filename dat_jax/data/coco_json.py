"""Reads a JSON file of COCO's instances, entry by entry: a file of 450 MB never becomes millions of Python objects at once."""

import json
import pathlib
import re
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dat_jax.data.image_files import plain_reason
from dat_jax.errors import UserError

FARTHEST = 1e5  # pixels: a polygon that reaches farther is a mistake, and would take gigabytes to fill
_LISTS = ("images", "annotations", "categories")
_BLANK = re.compile(r"[ \t\r\n]*")
_MOST_COUNT_BYTES = 7  # of five bits each: 2^32 pixels


class Table(NamedTuple):
    """What a file says, in its order: C categories, M images, N annotations.

    Attributes:
      categories: name of every category id.
      files: M names.
      image_ids: int64 (M,).
      sizes: int32 (M, 2), height and width.
      ids: int64 (N,), numbers of the annotations, for messages; where the file has none, their place from 0.
      owners: int64 (N,), the ids of their images.
      category_ids: int64 (N,).
      boxes: float64 (N, 4), x, y, width, height.
      areas: float64 (N,).
      crowd, ignored: bool (N,).
      masked: bool (N,), those with a mask.
      mask_sizes: int64 (N, 2), height and width that a run-length encoded mask says; 0 for others.
      spans: int64 (N, 2), their first byte in the file and the one after the last.
    """

    categories: dict[int, str]
    files: tuple[str, ...]
    image_ids: np.ndarray
    sizes: np.ndarray
    ids: np.ndarray
    owners: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    masked: np.ndarray
    mask_sizes: np.ndarray
    spans: np.ndarray


def read_table(path: str) -> Table:
    """Reads and checks every entry by itself; what entries must have in common is the caller's.

    Takes as much memory as twice the file for a moment, then as much as the file.

    Raises:
      UserError: not JSON, cut off, NaN, a list or a key that is not there, a value of another kind, an id that two images or
        categories have, a polygon or a run-length encoding that is broken.
    """
    try:
        text = pathlib.Path(path).read_bytes().decode("latin-1")  # one character a byte, so places are the file's
    except OSError as error:
        raise UserError(f"The annotations {path} cannot be read: {error.strerror}.") from error
    found = _Collector(path)
    try:
        seen = _scan(text, {name: getattr(found, f"add_{name}") for name in _LISTS})
    except UserError:
        raise
    except IndexError as error:
        raise UserError(f"The annotations {path} are no JSON that can be read: the file ends too early.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The annotations {path} are no JSON that can be read: {plain_reason(error)}.") from error
    missing = [name for name in _LISTS if name not in seen]
    if missing:
        raise UserError(f"The annotations {path} have no list {missing[0]!r}: wanted a file of COCO's instances.")
    return found.table()


class Joined(NamedTuple):
    """How the entries of a table belong together.

    Attributes:
      category_ids: ascending; an object's label is the place in it.
      owners: int64 (N,), place of an annotation's image, -1 for none.
      labels: int64 (N,), -1 for none.
      used: bool (N,), those that belong to an image and a category and are not passed over.
      skipped: what was passed over or mended, and how often.
    """

    category_ids: tuple[int, ...]
    owners: np.ndarray
    labels: np.ndarray
    used: np.ndarray
    skipped: dict[str, int]


def join(table: Table, path: str) -> Joined:
    """Looks up images and categories, and passes over what ``coco.load_coco`` says.

    Raises:
      UserError: no category, no image, masks of another size than their image, masks of some objects only; names ``path``.
    """
    if not table.categories or not table.files:
        raise UserError(f"The annotations {path} list no {'images' if table.categories else 'categories'}.")
    category_ids = np.array(sorted(table.categories), np.int64)
    labels, owners = _find(table.category_ids, category_ids), _find(table.owners, table.image_ids)
    bounds = table.sizes[owners, ::-1]
    starts, ends = table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]
    left = np.ones(len(owners), bool)  # what is not passed over so far
    skipped = {}
    for name, wrong in (
        ("annotations of images that are not listed", owners < 0),
        ("annotations of categories that are not listed", labels < 0),
        ('annotations marked "ignore"', table.ignored),
        ("boxes without a size", (table.boxes[:, 2:] < 1).any(axis=1) | (table.areas <= 0)),
        ("boxes outside the image", (np.minimum(ends, bounds) <= np.maximum(starts, 0)).any(axis=1)),
    ):
        skipped[name] = int(np.count_nonzero(left & wrong))
        left &= ~wrong
    skipped["boxes cut to the image"] = int(np.count_nonzero(left & ((starts < 0) | (ends > bounds)).any(axis=1)))
    _check_masks(table, owners, left, path)
    return Joined(tuple(category_ids.tolist()), owners, labels, left, skipped)


def _find(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The place of every value among others, all different; -1 for one that is not there."""
    order = np.argsort(among)
    places = order[np.minimum(np.searchsorted(among, values, sorter=order), len(among) - 1)]
    return np.where(among[places] == values, places, -1)


def _check_masks(table: Table, owners: np.ndarray, used: np.ndarray, path: str) -> None:
    """Masks of all objects that are used or of none, run-length encoded ones of their image's size."""
    if not table.masked.any():
        return
    bare = np.flatnonzero(used & ~table.masked)
    if len(bare):
        raise UserError(f"Annotation {table.ids[bare[0]]} of {path} has no mask, while others have one.")
    sized = np.flatnonzero((owners >= 0) & (table.mask_sizes[:, 0] > 0))
    wrong = sized[(table.mask_sizes[sized] != table.sizes[owners[sized]]).any(axis=1)]
    if len(wrong):
        sizes = [f"{h} x {w}" for h, w in (table.mask_sizes[wrong[0]], table.sizes[owners[wrong[0]]])]
        raise UserError(
            f"Annotation {table.ids[wrong[0]]} of {path} has a mask of {sizes[0]} pixels: wanted {sizes[1]} as its image."
        )


class _Collector:
    """Entries in flat arrays, as they come."""

    def __init__(self, path: str):
        self._path, self._categories, self._images, self._files = path, {}, {}, []
        self._whole = {name: array("q") for name in ("ids", "owners", "category_ids", "spans", "mask_sizes")}
        self._real = {name: array("d") for name in ("boxes", "areas")}
        self._flags = {name: bytearray() for name in ("crowd", "ignored", "masked")}

    def add_categories(self, entry: Any, start: int, end: int) -> None:
        number, name = self._take(entry, f"Category {len(self._categories)}", id=int, name=str)
        if number in self._categories:
            raise UserError(f"{self._path} has the category {number} more than once.")
        self._categories[number] = name

    def add_images(self, entry: Any, start: int, end: int) -> None:
        wanted = dict(id=int, file_name=str, height=int, width=int)
        number, name, height, width = self._take(entry, f"Image {len(self._files)}", **wanted)
        if not (0 < height < FARTHEST and 0 < width < FARTHEST):
            raise UserError(
                f"Image {number} of {self._path} has {height} x {width} pixels: wanted a size that images have."
            )
        if number in self._images:
            raise UserError(f"{self._path} has the image {number} more than once.")
        self._images[number] = (height, width)
        self._files.append(name)

    def add_annotations(self, entry: Any, start: int, end: int) -> None:
        number = entry.get("id") if isinstance(entry, dict) else None
        number = number if isinstance(number, int) and abs(number) < 2**63 else len(self._flags["crowd"])
        name = f"Annotation {number}"
        wanted = dict(image_id=int, category_id=int, bbox=list, area=(int, float))
        owner, category, box, area = self._take(entry, name, **wanted)
        try:
            if len(box) != 4 or not all(abs(x) < 1e9 for x in (*box, area)):
                raise ValueError(f"the box {box} and the area {area}: wanted x, y, width and height, all finite")
            size = _check_mask(entry.get("segmentation"))
            self._real["boxes"].extend(box)
            self._real["areas"].append(area)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} of {self._path} has {plain_reason(error)}.") from error
        for key, values in (("ids", (number,)), ("owners", (owner,)), ("category_ids", (category,))):
            self._whole[key].extend(values)
        self._whole["spans"].extend((start, end))
        self._whole["mask_sizes"].extend(size or (0, 0))
        flags = (bool(entry.get("iscrowd")), bool(entry.get("ignore")), size is not None)
        for key, flag in zip(("crowd", "ignored", "masked"), flags, strict=True):
            self._flags[key].append(flag)

    def _take(self, entry: Any, title: str, /, **wanted) -> list:
        """The values of an entry, each of the wanted kind."""
        if not isinstance(entry, dict):
            raise UserError(f"{title} of {self._path} is no JSON object.")
        for key, kind in wanted.items():
            if key not in entry:
                raise UserError(f"{title} of {self._path} lacks {key!r}.")
            value = entry[key]
            if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and abs(value) >= 2**63):
                kinds = {int: "a whole number", str: "a text", list: "a list"}.get(kind, "a number")
                raise UserError(f"{title} of {self._path} has {str(value)[:50]!r} as {key!r}: wanted {kinds}.")
        return [entry[key] for key in wanted]

    def table(self) -> Table:
        whole = {name: np.array(values, np.int64) for name, values in self._whole.items()}
        flags = {name: np.frombuffer(bytes(values), bool) for name, values in self._flags.items()}
        pairs = {name: whole.pop(name).reshape(-1, 2) for name in ("spans", "mask_sizes")}
        return Table(
            categories=self._categories,
            files=tuple(self._files),
            image_ids=np.array(list(self._images), np.int64),
            sizes=np.array(list(self._images.values()), np.int32).reshape(-1, 2),
            boxes=np.array(self._real["boxes"], np.float64).reshape(-1, 4),
            areas=np.array(self._real["areas"], np.float64),
            **(whole | flags | pairs),
        )


def _scan(text: str, take: dict[str, Callable[[Any, int, int], None]]) -> set[str]:
    """Hands over (entry, start, end) of the lists under the keys of ``take`` in an object; gives the keys that were there.

    Raises:
      ValueError, IndexError: not JSON, or cut off.
    """
    decode, plain, seen = json.JSONDecoder(parse_constant=_refuse).raw_decode, text.isascii(), set()
    place = _pass(text, 0, "{")
    while text[place] != "}":
        key, place = decode(text, place)
        place = _pass(text, place, ":")
        if key not in take or text[place] != "[":
            place = _next(text, decode(text, place)[1], "}")
            continue
        seen.add(key)
        place = _pass(text, place, "[")
        while text[place] != "]":
            entry, end = decode(text, place)
            if not plain and not text[place:end].isascii():
                entry = json.loads(text[place:end].encode("latin-1"), parse_constant=_refuse)
            take[key](entry, place, end)
            place = _next(text, end, "]")
        place = _next(text, place + 1, "}")
    return seen


def _pass(text: str, place: int, token: str) -> int:
    """The place after a token and the blanks around it."""
    place = _BLANK.match(text, place).end()
    if text[place] != token:
        raise ValueError(f"expecting {token!r} at byte {place}")
    return _BLANK.match(text, place + 1).end()


def _next(text: str, place: int, closing: str) -> int:
    """The place of the next entry, or of what closes the list of them."""
    place = _BLANK.match(text, place).end()
    return place if text[place] == closing else _pass(text, place, ",")


def _refuse(constant: str) -> None:
    raise ValueError(f"it has the value {constant}")


def _check_mask(mask: Any) -> tuple[int, int] | None:
    """(height, width) that a run-length encoding says, (0, 0) for polygons, None for no mask; a ValueError if it is broken."""
    if mask is None or mask == []:
        return None
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("a polygon that is not a list of six numbers or more, x and y in turn")
            if not (min(polygon) > -FARTHEST and max(polygon) < FARTHEST):
                raise ValueError("a polygon that lies far outside any image")
        return 0, 0
    if not isinstance(mask, dict) or not {"size", "counts"} <= set(mask):
        raise ValueError("a segmentation that is neither polygons nor a size with counts")
    size, counts = mask["size"], mask["counts"]
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(x, int) and 0 < x < FARTHEST for x in size):
        raise ValueError(f"a mask of the size {str(size)[:50]}: wanted a height and a width")
    runs = decode_counts(counts) if isinstance(counts, str) else np.array(counts)
    if runs.ndim != 1 or runs.dtype.kind != "i" or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"a mask whose counts are broken: wanted {size[0] * size[1]} pixels in all")
    return size[0], size[1]


def decode_counts(text: str) -> np.ndarray:
    """Lengths of runs, int64 (n,), from their compressed form: five bits a character, differences to the last but one.

    Source: pycocotools, maskApi.c, which does not check the text that it reads.

    Raises:
      ValueError: broken.
    """
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("a mask whose compressed counts are broken")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_COUNT_BYTES:
        raise ValueError("a mask whose compressed counts are broken")
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values
