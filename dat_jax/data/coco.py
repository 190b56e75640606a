"""Random-access sources of images with boxes, classes and masks of their objects, as COCO writes them down.

A source has ``len``, ``class_names``, ``category_ids`` (the number that COCO's files have for each class), ``has_masks``,
``size(i) -> (height, width)`` and ``image_id(i)``, which do not decode, ``objects(i)``, see there, and ``source[i] ->
{"image": uint8 (H, W, 3) RGB, "boxes": float32 (n, 4), "labels": int32 (n,), "masks": n masks or None, "crowd": bool (n,)}``.
Boxes are x1, y1, x2, y2 in pixels, pixel i covering [i, i + 1), within the image. Labels count from 0 in the order of
category ids. A mask is a compressed RLE, {"size": [H, W], "counts": bytes}; None where the file has no masks at all. Objects
with "crowd" are groups: never trained on. The same index gives the same record, always. Sources are pickled for workers and
read by several threads at once.
"""

import dataclasses
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from dat_jax.data.coco_json import decode_counts, join, read_table
from dat_jax.data.image_files import Member, plain_reason, read_member
from dat_jax.data.images import decode_image
from dat_jax.data.sources import SPLITS, read_readable
from dat_jax.data.synthetic import CLASS_NAMES, COUNTS, SIDE, compose
from dat_jax.errors import UserError, name_some

FILES = {
    "train": ("instances_train2017.json", "instances_train.json", "train.json"),
    "validation": ("instances_val2017.json", "instances_val.json", "val.json"),
}
IMAGE_FOLDERS = {"train": ("train2017", "train"), "validation": ("val2017", "val")}
MIN_SIDE = 32  # pixels; smaller images are not trained on
_MIN_VISIBLE = 20  # pixels of a composed digit


class Objects(NamedTuple):
    """What a file says about n objects of one image, all of them, also those that are not trained on.

    Attributes:
      boxes: float64 (n, 4), x, y, width, height in pixels as in the file.
      labels: int32 (n,).
      areas: float64 (n,), pixels of the masks.
      crowd: bool (n,).
      used: bool (n,), those that ``source[i]`` has.
      masks: n compressed RLEs, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    used: np.ndarray
    masks: list[dict] | None


class _DamagedFile(UserError):
    """An image file that cannot be read, as against one that holds what it must not."""


@dataclasses.dataclass(frozen=True, eq=False)
class CocoSource:
    """Images in a folder with the annotations of a JSON file; see ``load_coco``.

    Masks stay in the file, which must not change meanwhile: ``spans`` says where. A process keeps 62 bytes an object and
    about 100 an image: 65 MB for COCO's 118,000 training images with their 860,000 objects.

    Attributes:
      annotations, folder: paths of the JSON and of the images.
      class_names, category_ids: of the labels, in order.
      files: names in the folder, of M images.
      ids: int64 (M,).
      sizes: int32 (M, 2), heights and widths.
      starts: int64 (M + 1,); objects starts[i] to starts[i + 1] are those of image i.
      boxes, labels, areas, crowd, used: of all objects, see ``Objects``.
      spans: int64 (N, 2), first byte of an object's annotation in the JSON, and the one after its last; None without masks.
      skip_damaged: as in ``data.sources``.
      skipped: what was left out or mended while the file was read, and how often.
    """

    annotations: str
    folder: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    files: tuple[str, ...]
    ids: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    used: np.ndarray
    spans: np.ndarray | None
    skip_damaged: bool
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        options = dict(count=len(self), skip_damaged=self.skip_damaged, damage=_DamagedFile)
        return read_readable(self._read, index, **options)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, as in the JSON; reading the image refuses other ones."""
        return tuple(self.sizes[index].tolist())

    def image_id(self, index: int) -> int:
        """The image's number in the JSON."""
        return int(self.ids[index])

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks."""
        return self.spans is not None

    def objects(self, index: int) -> Objects:
        """All objects of an image; their masks are read from the JSON."""
        part = np.s_[self.starts[index] : self.starts[index + 1]]
        masks = None if self.spans is None else self._read_masks(self.spans[part].tolist(), self.size(index))
        return Objects(*(x[part] for x in (self.boxes, self.labels, self.areas, self.crowd, self.used)), masks)

    def _read_masks(self, spans: list[list[int]], size: tuple[int, int]) -> list[dict]:
        masks = []
        try:
            with open(self.annotations, "rb") as file:
                for start, end in spans:
                    file.seek(start)
                    masks.append(_to_rle(json.loads(file.read(end - start)).get("segmentation"), size))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"The masks in {self.annotations} cannot be read again ({plain_reason(error)}): it must stay as it was when "
                "the run began."
            ) from error
        return masks

    def _read(self, index: int) -> dict:
        path, size = os.path.join(self.folder, self.files[index]), self.size(index)
        try:
            image = decode_image(read_member(Member(path, 0, -1, self.files[index], "")), name=path)
        except UserError as error:
            raise _DamagedFile(str(error)) from error
        if image.shape[:2] != size:
            sizes = [f"{height} x {width}" for height, width in (image.shape[:2], size)]
            raise UserError(f"The image {path} has {sizes[0]} pixels: wanted {sizes[1]} as in {self.annotations}.")
        return _make_record(image, self.objects(index))


def _make_record(image: np.ndarray, objects: Objects) -> dict:
    used, masks = objects.used, objects.masks
    corners = np.concatenate([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], axis=1)[used]
    height, width = image.shape[:2]
    return {
        "image": image,
        "boxes": np.clip(corners, 0, [width, height, width, height]).astype(np.float32),
        "labels": objects.labels[used],
        "masks": None if masks is None else [mask for mask, kept in zip(masks, used, strict=True) if kept],
        "crowd": objects.crowd[used],
    }


def _to_rle(segmentation: dict | list | None, size: tuple[int, int]) -> dict:
    """Polygons, counts or compressed counts -> compressed RLE; the pixels of several polygons are united."""
    if not segmentation:  # of an object that is not used
        segmentation = {"size": list(size), "counts": [size[0] * size[1]]}
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, *size)
    return {"size": list(size), "counts": segmentation["counts"].encode()}


def decode_mask(mask: dict) -> np.ndarray:
    """A compressed RLE -> uint8 (H, W), 1 where the object is. Runs go down the columns, the first one is of zeros."""
    height, width = mask["size"]
    counts = mask["counts"]
    runs = decode_counts(counts.decode() if isinstance(counts, bytes) else counts)
    # Not pycocotools' decoder: numpy 2 warns of it, and warnings cannot be turned off for one thread.
    values = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)
    return np.ascontiguousarray(values.reshape(width, height).T)


@dataclasses.dataclass(frozen=True)
class DigitsSource:
    """The examples of ``data.synthetic`` with the digits as objects; a digit with fewer than 20 pixels to be seen is none."""

    split: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return CLASS_NAMES[1:]

    @property
    def category_ids(self) -> tuple[int, ...]:
        """1 to 10."""
        return tuple(range(1, len(CLASS_NAMES)))

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image, _, digits = compose(self.split, index)
        return _make_record(image, _digit_objects(digits))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return SIDE, SIDE

    def image_id(self, index: int) -> int:
        """The index from 1 on."""
        return index + 1

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks: they do."""
        return True

    def objects(self, index: int) -> Objects:
        """All digits of an image."""
        return _digit_objects(compose(self.split, index)[2])


def _digit_objects(digits: list[tuple[int, np.ndarray]]) -> Objects:
    seen = [(digit, mask) for digit, mask in digits if np.count_nonzero(mask) >= _MIN_VISIBLE]
    masks = [rle.encode(np.asfortranarray(mask, np.uint8)) for _, mask in seen]
    boxes = np.array([rle.toBbox(mask) for mask in masks], np.float64).reshape(-1, 4)
    areas = np.array([np.count_nonzero(mask) for _, mask in seen], np.float64)
    labels = np.array([digit for digit, _ in seen], np.int32)
    return Objects(boxes, labels, areas, np.zeros(len(seen), bool), np.ones(len(seen), bool), masks)


def to_coco_ground_truth(source: CocoSource | DigitsSource) -> dict:
    """What pycocotools' ``COCO`` wants of a whole source: "images", "annotations" and "categories".

    All objects of the source's images are in it, also those that are not trained on, as in the published evaluation. They are
    numbered anew from 1: pycocotools takes one with number 0 for none.
    """
    annotations = []
    for index in range(len(source)):
        objects = source.objects(index)
        for k, (box, label, area, crowd) in enumerate(zip(*(x.tolist() for x in objects[:4]), strict=True)):
            annotation = {"id": len(annotations) + 1, "image_id": source.image_id(index), "bbox": box, "area": area}
            annotation |= {"category_id": source.category_ids[label], "iscrowd": int(crowd)}
            annotations.append(annotation | ({"segmentation": objects.masks[k]} if objects.masks is not None else {}))
    sizes = [source.size(index) for index in range(len(source))]
    return {
        "images": [{"id": source.image_id(k), "height": h, "width": w} for k, (h, w) in enumerate(sizes)],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name} for number, name in zip(source.category_ids, source.class_names, strict=True)
        ],
    }


def load_detection_source(name: str, *, split: str, directory: str = "") -> CocoSource | DigitsSource:
    """A source by its name, or of a directory as COCO is unpacked.

    Args:
      name: of an embedded data set; not used where a directory is given. "digits_on_photographs": see ``DigitsSource``.
      split: "train" or "validation".
      directory: "", or a path with annotations/instances_train2017.json and train2017/, instances_val2017.json and val2017/.
        The files may also be called instances_train.json or train.json, instances_val.json or val.json, the folders train and
        val.

    Raises:
      UserError: unknown name or split, what is not there, or what ``load_coco`` refuses.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if directory:
        if not os.path.isdir(directory):
            raise UserError(f"There is no directory {directory} to read images from.")
        annotations = _choose(pathlib.Path(directory) / "annotations", FILES[split], "file")
        return load_coco(annotations, _choose(pathlib.Path(directory), IMAGE_FOLDERS[split], "folder"), split=split)
    if name != "digits_on_photographs":
        raise UserError(
            f"Unknown data set {name!r} for detection; choose digits_on_photographs, or give the directory of a data set "
            "(config.data.directory)."
        )
    compose(split, 0)  # a package that is missing is said now
    return DigitsSource(split)


def _choose(parent: pathlib.Path, names: tuple[str, ...], kind: str) -> str:
    """The one file or folder of these names."""
    found = [name for name in names if (parent / name).exists()]
    if not found:
        raise UserError(f"{parent} has no {kind} {' or '.join(names)}.")
    if len(found) > 1:
        raise UserError(f"{parent} has the {kind}s {' and '.join(found)}: wanted one of them.")
    return str(parent / found[0])


def load_coco(annotations: str, images: str, *, split: str, min_side: int = MIN_SIDE) -> CocoSource:
    """The images and objects of a JSON file of COCO's instances, in the order of the file.

    What MMDetection 2.26 passes over is passed over here and counted in ``skipped``: annotations of images or of categories
    that the file does not list; boxes less than a pixel wide or high, or with an area of 0 or less, or outside the image;
    those marked "ignore". Boxes that are partly outside are cut to the image, which is counted too. In training, images
    without an annotation of a listed category, and images with a short side, are left out. Everything else is an error. An
    image is read as its bytes are: orientation tags are not applied.

    Args:
      annotations: path of the JSON.
      images: the folder that its file names start from.
      split: "train" leaves images out and passes over damaged ones; "validation" keeps every image.
      min_side: in pixels, of images to train on.

    Raises:
      UserError: see ``coco_json.read_table`` and ``coco_json.join``; image files that are not there, nothing to train on.
    """
    table = read_table(annotations)
    _check_files(table.files, images, annotations)
    joined = join(table, annotations)
    count = len(table.files)
    listed = (joined.owners >= 0) & (joined.labels >= 0)
    keep, skipped = np.ones(count, bool), joined.skipped
    if split == "train":
        with_objects = np.bincount(joined.owners[listed], minlength=count) > 0
        keep = with_objects & (table.sizes.min(axis=1) >= min_side)
        skipped = skipped | {
            "images without an annotation": int(np.count_nonzero(~with_objects)),
            f"images with a side below {min_side}": int(np.count_nonzero(with_objects & ~keep)),
        }
        if not keep.any():
            raise UserError(
                f"The annotations {annotations} have no image to train on: wanted one with an annotation and sides of "
                f"{min_side} pixels or more."
            )
    chosen = np.flatnonzero(listed)
    chosen = chosen[keep[joined.owners[chosen]]]
    chosen = chosen[np.argsort(joined.owners[chosen], kind="stable")]
    per_image = np.bincount(joined.owners[chosen], minlength=count)[keep]
    return CocoSource(
        annotations=str(annotations),
        folder=str(images),
        class_names=tuple(table.categories[number] for number in joined.category_ids),
        category_ids=joined.category_ids,
        files=tuple(name for name, kept in zip(table.files, keep, strict=True) if kept),
        ids=table.image_ids[keep],
        sizes=table.sizes[keep],
        starts=np.concatenate([[0], np.cumsum(per_image)]),
        boxes=table.boxes[chosen],
        labels=joined.labels[chosen].astype(np.int32),
        areas=table.areas[chosen],
        crowd=table.crowd[chosen],
        used=joined.used[chosen],
        spans=table.spans[chosen] if table.masked.any() else None,
        skip_damaged=split == "train",
        skipped={name: number for name, number in skipped.items() if number},
    )


def _check_files(files: tuple[str, ...], folder: str, annotations: str) -> None:
    """Every image file is there; each folder is listed once."""
    listed = {}
    for parent in {os.path.dirname(name) for name in files}:
        path = os.path.join(folder, parent)
        listed[parent] = set(os.listdir(path)) if os.path.isdir(path) else set()
    missing = [name for name in files if os.path.basename(name) not in listed[os.path.dirname(name)]]
    if missing:
        raise UserError(f"These images of {annotations} are not in {folder}: {name_some(missing)}.")
