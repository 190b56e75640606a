"""Random-access sources of images with boxes, classes and masks of their objects, for detection.

A source has:

- ``len``, ``class_names`` and ``category_ids``, the id in COCO files of each class;
- ``has_masks``, whether its objects have masks;
- ``size(i) -> (height, width)`` and ``image_id(i)``, which do not decode the image;
- ``objects(i)``, all annotated objects of an image, see ``Objects``;
- ``source[i]``, a record {"image": uint8 (H, W, 3) RGB, "boxes": float32 (n, 4), "labels": int32 (n,), "masks": a list of n
  masks or None, "crowd": bool (n,)}.

Boxes are x1, y1, x2, y2 in pixels within the image, where pixel i covers [i, i + 1). Labels count from 0 in ascending order of
category id. A mask is a compressed run-length encoding (RLE), {"size": [H, W], "counts": bytes}; "masks" is None if the file
has no masks at all. Objects with "crowd" are groups of objects, which are never trained on. An index always gives the same
record. Sources are pickled for data workers and read by several threads at once.
"""

import dataclasses
import json
import logging
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from dat_jax.data.coco_json import CLIPPED, decode_counts, link_annotations, read_table
from dat_jax.data.image_files import LeftOut, Member, error_text, is_image, read_member, suggest_name
from dat_jax.data.images import decode_image, explain_turned, is_turned
from dat_jax.data.sources import SPLITS, read_record, spread_indices
from dat_jax.data.synthetic import CLASS_NAMES, COUNTS, SIDE, compose
from dat_jax.errors import UserError, name_some

logger = logging.getLogger(__name__)
FILES = {
    "train": ("instances_train2017.json", "instances_train.json", "train.json"),
    "validation": ("instances_val2017.json", "instances_val.json", "val.json"),
}
IMAGE_FOLDERS = {"train": ("train2017", "train"), "validation": ("val2017", "val")}
MIN_SIDE = 32  # pixels; smaller images are not used for training
_MIN_VISIBLE = 20  # pixels of a composed digit


class Objects(NamedTuple):
    """All annotated objects of one image, including those that are not trained on.

    Attributes:
      boxes: float64 (n, 4), x, y, width, height in pixels, as in the file.
      labels: int32 (n,).
      areas: float64 (n,), area of the masks in pixels.
      crowd: bool (n,).
      used: bool (n,), the objects that ``source[i]`` contains.
      masks: n compressed RLEs, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    used: np.ndarray
    masks: list[dict] | None


@dataclasses.dataclass(frozen=True, eq=False)
class CocoSource:
    """Images in a folder with annotations in a JSON file; see ``load_coco``.

    Masks are read from the file on access, at the offsets ``spans``, so the file must not change while the source is in use. A
    process holds 62 bytes per object and about 100 per image: 65 MB for the 118,000 training images of COCO with their 860,000
    objects.

    Attributes:
      annotations, folder: paths of the JSON file and of the folder of images.
      class_names, category_ids: name and category id of each label.
      files: file names of M images, relative to the folder.
      ids: int64 (M,), image ids.
      sizes: int32 (M, 2), heights and widths in pixels.
      starts: int64 (M + 1,); image i has the objects from starts[i] up to, but not including, starts[i + 1].
      boxes, labels, areas, crowd, used: fields of ``Objects``, of N objects.
      spans: int64 (N, 2), byte offsets in the JSON file of the first byte of an annotation and of the one after its last; None
        if there are no masks.
      skip_damaged: see ``data.sources``.
      skipped: reason -> number of annotations or images that were left out or clipped when the file was read.
      apply_orientation: see ``decode_image``. Sizes, boxes and masks belong to the upright image if it is True.
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
    apply_orientation: bool = True

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return read_record(self.read, index, count=len(self), skip_damaged=self.skip_damaged)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, as in the JSON file; reading an image of another size is an error."""
        return tuple(self.sizes[index].tolist())

    def image_id(self, index: int) -> int:
        """Return the id of an image in the JSON file."""
        return int(self.ids[index])

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks."""
        return self.spans is not None

    def is_turned(self, index: int) -> bool:
        """Return whether the orientation tag of an image is applied and changes it."""
        return self.apply_orientation and is_turned(os.path.join(self.folder, self.files[index]))

    def count_objects(self) -> np.ndarray:
        """Return the number of objects of each class that can be trained on, int64 (K,): those used, without crowds."""
        return np.bincount(self.labels[self.used & ~self.crowd], minlength=len(self.class_names))

    def objects(self, index: int) -> Objects:
        """Return all objects of an image; their masks are read from the JSON file."""
        part = np.s_[self.starts[index] : self.starts[index + 1]]
        masks = None if self.spans is None else self._read_masks(self.spans[part].tolist(), self.size(index))
        boxes, labels, areas = self.boxes[part], self.labels[part], self.areas[part]
        return Objects(boxes, labels, areas, self.crowd[part], self.used[part], masks)

    def sample_boxes(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes of up to ``count`` objects that can be trained on, evenly spread, clipped to their images.

        Returns:
          Boxes, float64 (n, 4), x, y, width, height in pixels, and the heights and widths of their images, int32 (n, 2).
        """
        indices = np.flatnonzero(self.used & ~self.crowd)
        indices = indices[spread_indices(len(indices), count)]
        sizes = self.sizes[np.searchsorted(self.starts, indices, side="right") - 1]
        return _clip(self.boxes[indices], sizes), sizes

    def _read_masks(self, spans: list[list[int]], size: tuple[int, int]) -> list[dict]:
        masks = []
        try:
            with open(self.annotations, "rb") as file:
                for start, end in spans:
                    file.seek(start)
                    masks.append(_to_rle(json.loads(file.read(end - start)).get("segmentation"), size))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"The masks in {self.annotations} cannot be read again ({error_text(error)}): the file must not change during "
                "a run."
            ) from error
        return masks

    def read(self, index: int) -> dict:
        """Return a record, or raise a DamagedFile error if its image cannot be read."""
        path, size = os.path.join(self.folder, self.files[index]), self.size(index)
        data = read_member(Member(path, 0, -1, self.files[index], ""))
        image = decode_image(data, name=path, apply_orientation=self.apply_orientation)
        if image.shape[:2] != size:
            actual, expected = (f"{height} x {width}" for height, width in (image.shape[:2], size))
            advice = explain_turned(path, size, apply_orientation=self.apply_orientation)
            raise UserError(
                f"The image {path} has {actual} pixels: expected {expected} as in {self.annotations}.{advice}"
            )
        return _make_record(image, self.objects(index))


def _clip(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Clip boxes, x, y, width, height, to images of some heights and widths (n, 2)."""
    bounds = sizes[:, ::-1]
    starts = np.clip(boxes[:, :2], 0, bounds)
    return np.concatenate([starts, np.clip(boxes[:, :2] + boxes[:, 2:], 0, bounds) - starts], axis=1)


def _make_record(image: np.ndarray, objects: Objects) -> dict:
    used, masks = objects.used, objects.masks
    corners = np.concatenate([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], axis=1)[used]
    height, width = image.shape[:2]
    return {
        "image": image,
        "boxes": np.clip(corners, 0, [width, height, width, height]).astype(np.float32),
        "labels": objects.labels[used],
        "masks": None if masks is None else [mask for mask, is_used in zip(masks, used, strict=True) if is_used],
        "crowd": objects.crowd[used],
    }


def _to_rle(segmentation: dict | list | None, size: tuple[int, int]) -> dict:
    """Convert polygons, counts or compressed counts to a compressed RLE; several polygons are merged into one mask."""
    if not segmentation:  # of an object that is not used
        segmentation = {"size": list(size), "counts": [size[0] * size[1]]}
    if isinstance(segmentation, list):
        return dict(rle.merge(rle.frPyObjects(segmentation, *size)))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, *size)  # pyright: ignore[reportArgumentType, reportCallIssue, reportReturnType] (stubs lack counts)
    return {"size": list(size), "counts": segmentation["counts"].encode()}


def decode_mask(mask: dict) -> np.ndarray:
    """Decode a compressed RLE to uint8 (H, W), 1 on the object.

    Runs follow the columns of the image from the top, starting with a run of zeros.
    """
    height, width = mask["size"]
    counts = mask["counts"]
    runs = decode_counts(counts.decode() if isinstance(counts, bytes) else counts)
    # pycocotools' decoder emits a warning with numpy 2, and warnings cannot be suppressed for a single thread.
    values = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)
    return np.ascontiguousarray(values.reshape(width, height).T)


@dataclasses.dataclass(frozen=True)
class DigitsSource:
    """The examples of ``data.synthetic``, whose objects are the digits with at least 20 visible pixels.

    Attributes:
      split: "train" or "validation".
    """

    split: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ten digits."""
        return CLASS_NAMES[1:]

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The integers from 1 to 10."""
        return tuple(range(1, len(CLASS_NAMES)))

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        image, _, digits = compose(self.split, index)
        return _make_record(image, _digit_objects(digits))

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels."""
        return SIDE, SIDE

    def image_id(self, index: int) -> int:
        """Return the index plus 1."""
        return index + 1

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks, which is always True."""
        return True

    def sample_boxes(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes of digits as ``CocoSource`` does, those of ``count`` / 2 images with one or more digits each."""
        indices = spread_indices(len(self), count // 2)
        boxes = np.concatenate([self.objects(index).boxes for index in indices])[:count]
        return boxes, np.full((len(boxes), 2), SIDE, np.int32)

    def objects(self, index: int) -> Objects:
        """Return all digits of an image."""
        return _digit_objects(compose(self.split, index)[2])


def _digit_objects(digits: list[tuple[int, np.ndarray]]) -> Objects:
    visible = [(digit, mask) for digit, mask in digits if np.count_nonzero(mask) >= _MIN_VISIBLE]
    masks: list[Any] = [
        rle.encode(np.asfortranarray(mask, np.uint8)) for _, mask in visible
    ]  # has its own type of dict
    boxes = np.array([rle.toBbox(mask) for mask in masks], np.float64).reshape(-1, 4)
    areas = np.array([np.count_nonzero(mask) for _, mask in visible], np.float64)
    labels = np.array([digit for digit, _ in visible], np.int32)
    return Objects(boxes, labels, areas, np.zeros(len(visible), bool), np.ones(len(visible), bool), masks)


def to_coco_ground_truth(source: CocoSource | DigitsSource) -> dict:
    """Convert a whole source to the data set of pycocotools' ``COCO``: "images", "annotations" and "categories".

    As in the published evaluation, all objects of the source's images are included, also those that are not trained on.
    Annotations are renumbered from 1, because pycocotools treats the id 0 as no match.
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


def load_detection_source(
    name: str, *, split: str, directory: str = "", apply_orientation: bool = True
) -> CocoSource | DigitsSource:
    """Load a split of an embedded data set or of a directory in COCO's layout.

    A directory contains annotations/instances_train2017.json and train2017/, annotations/instances_val2017.json and val2017/.
    The files may also be called instances_train.json or train.json, instances_val.json or val.json, and the folders train and
    val.

    Args:
      name: name of an embedded data set, ignored if ``directory`` is given. "digits_on_photographs": see ``DigitsSource``.
      split: "train" or "validation".
      directory: "" or a path.
      apply_orientation: see ``decode_image``.

    Raises:
      UserError: the name or the split is unknown, a file or folder is missing, or the annotations are invalid, see
        ``load_coco``.
    """
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if directory:
        if not os.path.isdir(directory):
            raise UserError(f"There is no directory {directory} to read images from.")
        annotations = _choose_path(pathlib.Path(directory) / "annotations", FILES[split], "file")
        images = _choose_path(pathlib.Path(directory), IMAGE_FOLDERS[split], "folder")
        return load_coco(annotations, images, split=split, apply_orientation=apply_orientation)
    if name != "digits_on_photographs":
        raise UserError(
            f"Unknown data set {name!r} for detection; choose digits_on_photographs, or set config.data.directory to the "
            "directory of a data set."
        )
    compose(split, 0)  # raises an error now if a package is missing
    return DigitsSource(split)


def _choose_path(parent: pathlib.Path, names: tuple[str, ...], kind: str) -> str:
    """Return the only existing file or folder that has one of several names."""
    matches = [name for name in names if (parent / name).exists()]
    if not matches:
        raise UserError(f"{parent} has no {kind} named {' or '.join(names)}.")
    if len(matches) > 1:
        raise UserError(f"{parent} has the {kind}s {' and '.join(matches)}: expected only one of them.")
    return str(parent / matches[0])


def load_coco(
    annotations: str, images: str, *, split: str, min_side: int = MIN_SIDE, apply_orientation: bool = True
) -> CocoSource:
    """Load the images and objects of a JSON file of COCO instances, in the order of the file.

    As in MMDetection 2.26, the following annotations are skipped, and counted in ``skipped``:

    - annotations of images or categories that the file does not list;
    - annotations marked "ignore";
    - boxes less than a pixel wide or high, or with an area of 0 or less;
    - boxes outside the image.

    Boxes that are partly outside are clipped to the image, which is also counted. For training, crowd objects, images without an
    annotation of a listed category and images with a side below ``min_side`` are left out and counted. Anything else that is
    invalid raises an error.

    Args:
      annotations: path of the JSON file.
      images: folder that the file names are relative to.
      split: "train" leaves out images and skips damaged ones; "validation" keeps all images.
      min_side: smallest side of images to train on, in pixels.
      apply_orientation: see ``CocoSource``.

    Raises:
      UserError: see ``coco_json.read_table`` and ``coco_json.link_annotations``; image files are missing; no image is left for
        training.
    """
    table = read_table(annotations)
    _check_files(table.files, images, annotations)
    links = link_annotations(table, annotations)
    count = len(table.files)
    listed = (links.image_indices >= 0) & (links.labels >= 0)
    keep, skipped = np.ones(count, bool), links.skipped
    if split == "train":
        annotated = np.bincount(links.image_indices[listed], minlength=count) > 0
        keep = annotated & (table.sizes.min(axis=1) >= min_side)
        crowd = links.used & table.crowd & keep[links.image_indices]
        skipped = skipped | {
            "crowd objects": int(np.count_nonzero(crowd)),
            "images without an annotation": int(np.count_nonzero(~annotated)),
            f"images with a side below {min_side}": int(np.count_nonzero(annotated & ~keep)),
        }
        _check_any_left(keep, annotations, min_side, skipped)
    _log_skipped(skipped, annotations, is_defect=any(links.skipped.values()))
    indices = np.flatnonzero(listed)
    indices = indices[keep[links.image_indices[indices]]]
    indices = indices[np.argsort(links.image_indices[indices], kind="stable")]
    objects_per_image = np.bincount(links.image_indices[indices], minlength=count)[keep]
    return CocoSource(
        annotations=str(annotations),
        folder=str(images),
        class_names=tuple(table.categories[number] for number in links.category_ids),
        category_ids=links.category_ids,
        files=tuple(name for name, is_kept in zip(table.files, keep, strict=True) if is_kept),
        ids=table.image_ids[keep],
        sizes=table.sizes[keep],
        starts=np.concatenate([[0], np.cumsum(objects_per_image)]),
        boxes=table.boxes[indices],
        labels=links.labels[indices].astype(np.int32),
        areas=table.areas[indices],
        crowd=table.crowd[indices],
        used=links.used[indices],
        spans=table.spans[indices] if table.has_mask.any() else None,
        skip_damaged=split == "train",
        skipped={reason: number for reason, number in skipped.items() if number},
        apply_orientation=apply_orientation,
    )


def _check_any_left(keep: np.ndarray, annotations: str, min_side: int, skipped: dict[str, int]) -> None:
    if not keep.any():
        raise UserError(
            f"The annotations {annotations} have no image to train on: expected at least one with an annotation and sides of "
            f"{min_side} pixels or more.{format_skipped(skipped)}"
        )


def format_skipped(skipped: dict[str, int]) -> str:
    """Return a sentence with the number of annotations and images that were left out, by reason; "" if there are none."""
    parts = [f"{count:,} {reason}" for reason, count in skipped.items() if count and reason != CLIPPED]
    return f" Left out: {', '.join(parts)}." if parts else ""


def _log_skipped(skipped: dict[str, int], annotations: str, *, is_defect: bool) -> None:
    """Log the numbers of ``CocoSource.skipped``, as a warning if some show a defect of the file."""
    left_out, clipped = format_skipped(skipped), skipped.get(CLIPPED, 0)
    if left_out or clipped:
        text = f"{left_out}{f' {clipped:,} {CLIPPED}.' if clipped else ''}"
        logger.log(logging.WARNING if is_defect else logging.INFO, "Annotations %s.%s", annotations, text)


def _suggest_file(name: str, folder: str) -> str:
    path = name.replace("\\", "/")
    names = [path] if os.path.isfile(os.path.join(folder, path)) else sorted(os.listdir(folder))
    return suggest_name(name, names, place='"file_name" is the path below the folder, which has')


def _check_files(files: tuple[str, ...], folder: str, annotations: str) -> None:
    """Check that every image file exists. Each folder is listed once."""
    existing = {}
    for parent in {os.path.dirname(name) for name in files}:
        path = os.path.join(folder, parent)
        existing[parent] = set(os.listdir(path)) if os.path.isdir(path) else set()
    missing = [name for name in files if os.path.basename(name) not in existing[os.path.dirname(name)]]
    if missing:
        raise UserError(
            f"These images of {annotations} are not in {folder}: {name_some(missing)}.{_suggest_file(missing[0], folder)}"
        )
    left_out, listed = LeftOut(), set(files)
    for parent, names in existing.items():
        unlisted = [name for name in sorted(names) if is_image(name) and os.path.join(parent, name) not in listed]
        left_out.add("images that the annotations do not list", unlisted, folder=parent)
    left_out.log(folder, f"{len(files):,} images of {annotations}")
