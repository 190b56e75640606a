"""Transforms of an image with the boxes and masks of its objects, on the host, in uint8.

The order and the distributions are those of the published recipe (spec/dense_prediction.md, section 3), which are those of
MMDetection 2.26: flip, then one of two ways to resize, the second with a crop. Normalising follows on the device. What is
drawn depends on the sizes of images only: who knows these knows the shapes of all batches. A bucket is a shape, (height,
width) in pixels, that a network is compiled for; images are padded to it at the bottom and at the right.
"""

import dataclasses
import re
from collections.abc import Sequence

import cv2
import numpy as np

from dat_jax.data.coco import decode_mask
from dat_jax.data.segmentation_transforms import fit_size, pad, resize_image, resize_label
from dat_jax.errors import UserError

SHORT_SIDES = tuple(range(480, 801, 32))
LONG_SIDE = 1333
# Up to 4:3 and longer, landscape and portrait.
BUCKETS = ((608, 832), (832, 608), (800, 1088), (1088, 800), (800, 1344), (1344, 800))
_MULTIPLE = 32  # of a bucket's sides


@dataclasses.dataclass(frozen=True, eq=False)
class Views:
    """What is done to n images, int32 but for ``flip``; one image's has no first axis.

    Attributes:
      original: (n, 2), height and width of the image.
      flip: bool (n,), left and right, first of all.
      resized: (n, 2), height and width before the crop; the original ones where nothing is cut off.
      crop: (n, 4), top, left, height and width of what is kept of that.
      size: (n, 2), height and width at last.
    """

    original: np.ndarray
    flip: np.ndarray
    resized: np.ndarray
    crop: np.ndarray
    size: np.ndarray

    def take(self, index) -> "Views":
        """One image's, or those of several."""
        return Views(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class DetectionTrainTransform:
    """See ``make_detection_train_transform``."""

    short_sides: tuple[int, ...]
    long_side: int
    flip_probability: float
    crop_probability: float
    first_short_sides: tuple[int, ...]
    first_long_side: int
    crop_sides: tuple[int, int]
    buckets: tuple[tuple[int, int], ...]
    max_boxes: int
    masks: bool

    def draw(self, sizes: np.ndarray, rng: np.random.Generator) -> Views:
        """Views of n images, each drawn by itself: eight uniform numbers an image, whatever comes of them.

        Args:
          sizes: int (n, 2), heights and widths.
          rng: all draws come from it.
        """
        sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
        flip, cut, first, second, *rest = rng.random((8, len(sizes)))
        resized = _fit(sizes, short=_choose(self.first_short_sides, first), long=self.first_long_side)
        low, high = (np.minimum(resized, side) for side in self.crop_sides)
        kept = _integers(np.stack(rest[:2], axis=1), low, high)
        corner = _integers(np.stack(rest[2:], axis=1), 0, resized - kept)
        cut = (cut < self.crop_probability)[:, None]
        kept = np.where(cut, kept, sizes)
        fields = {
            "original": sizes,
            "resized": np.where(cut, resized, sizes),
            "crop": np.concatenate([np.where(cut, corner, 0), kept], axis=1),
            "size": _fit(kept, short=_choose(self.short_sides, second), long=self.long_side),
        }
        fields = {name: values.astype(np.int32) for name, values in fields.items()}
        return Views(flip=flip < self.flip_probability, **fields)

    def choose_buckets(self, sizes: np.ndarray) -> np.ndarray:
        """The smallest bucket that holds each image, int (n,), for sizes int (n, 2); of equal ones the first."""
        areas = np.prod(self.buckets, axis=1)
        fits = (np.asarray(sizes)[:, None] <= np.array(self.buckets)).all(axis=-1)
        return np.where(fits, areas, areas.max() + 1).argmin(axis=1)

    def __call__(self, record: dict, view: Views, *, bucket: tuple[int, int], rng: np.random.Generator) -> dict:
        """One image's view of a record of ``data.coco``, padded to a bucket; see ``make_detection_train_transform``.

        An image that is not of the size that the view was drawn for, as one that stands in for a damaged one, is made as large
        as fits into the bucket, whole.
        """
        image = record["image"]
        if image.shape[:2] != tuple(view.original):
            view = _whole_view(image.shape[:2], flip=view.flip, bucket=bucket)
        usable = np.flatnonzero(~record["crowd"])
        boxes, inside = transform_boxes(record["boxes"][usable], view)
        usable, boxes = usable[inside], boxes[inside]
        dropped = max(len(usable) - self.max_boxes, 0)
        if dropped:
            chosen = np.sort(rng.choice(len(usable), self.max_boxes, replace=False))
            usable, boxes = usable[chosen], boxes[chosen]
        count = len(usable)
        result = {
            "image": pad(_apply(image, view, resize_image), height=bucket[0], width=bucket[1], value=0),
            "valid": view.size.astype(np.int32),
            "boxes": _fill(boxes, self.max_boxes),
            "labels": _fill(record["labels"][usable], self.max_boxes),
            "box_mask": np.arange(self.max_boxes) < count,
            "dropped": np.int32(dropped),
        }
        if self.masks:
            if record["masks"] is None:
                raise UserError(
                    "The annotations have no masks: wanted a segmentation of every object to learn masks from."
                )
            packed = np.zeros((self.max_boxes, bucket[0], bucket[1] // 8), np.uint8)
            for place, index in enumerate(usable):
                bits = np.packbits(transform_mask(decode_mask(record["masks"][index]), view), axis=1)
                packed[place, : bits.shape[0], : bits.shape[1]] = bits
            result["masks"] = packed
        return result | {key: record[key] for key in ("damaged",) if key in record}


def make_detection_train_transform(
    *,
    short_sides: Sequence[int] = SHORT_SIDES,
    long_side: int = LONG_SIDE,
    flip_probability: float = 0.5,
    crop_probability: float = 0.5,
    first_short_sides: Sequence[int] = (400, 500, 600),
    first_long_side: int = LONG_SIDE,
    crop_sides: tuple[int, int] = (384, 600),
    buckets: Sequence[tuple[int, int]] = BUCKETS,
    max_boxes: int = 100,
    masks: bool = True,
) -> DetectionTrainTransform:
    """Flip; then, if a coin says so, resize and crop; then resize.

    Args:
      short_sides: one of them bounds the short side at last.
      long_side: bounds the long side at last.
      flip_probability: of mirroring left and right.
      crop_probability: of the first resizing and the crop.
      first_short_sides, first_long_side: the same bounds, before the crop.
      crop_sides: least and largest side of the crop, both within; each side is uniform between them, or between what the image
        has of them.
      buckets: shapes to pad to, multiples of 32.
      max_boxes: G; more objects are left out at random.
      masks: whether to give masks.

    Returns:
      ``draw`` and ``choose_buckets``, and a function of a record of ``data.coco``, one image's ``Views``, a bucket (Hb, Wb) and
      a generator. It gives {"image": uint8 (Hb, Wb, 3), "valid": int32 (2,), height and width of the part that is image,
      "boxes": float32 (G, 4), "labels": int32 (G,), "box_mask": bool (G,), True for an object, first, then False, with zeros,
      "dropped": int32, how many objects were left out}, and "damaged" if the record has it. Groups are no objects here, nor is
      what the crop leaves nothing of. "masks", uint8 (G, Hb, Wb / 8), are bitmaps of the padded image, eight pixels a byte,
      the first in the highest bit (``numpy.packbits``): 13.4 MB for 100 objects in 800 x 1344, where the image has 3.2 MB.

    Raises:
      UserError: a bucket that is no multiple of 32, images that no bucket holds, a crop without a size.
    """
    low, high = sorted((max(short_sides), long_side))
    for bucket in buckets:
        if len(bucket) != 2 or any(side <= 0 or side % _MULTIPLE for side in bucket):
            raise UserError(f"The bucket {tuple(bucket)} is no height and width that are multiples of {_MULTIPLE}.")
    for wanted in ((low, high), (high, low)):
        if not any(all(side >= least for side, least in zip(bucket, wanted, strict=True)) for bucket in buckets):
            raise UserError(
                f"No bucket holds an image of {wanted[0]} x {wanted[1]}, which sides of {low} and {high} allow."
            )
    if not 0 < crop_sides[0] <= crop_sides[1]:
        raise UserError(
            f"The crop has sides from {crop_sides[0]} to {crop_sides[1]}: wanted the smaller one first, above 0."
        )
    return DetectionTrainTransform(
        short_sides=tuple(short_sides),
        long_side=long_side,
        flip_probability=flip_probability,
        crop_probability=crop_probability,
        first_short_sides=tuple(first_short_sides),
        first_long_side=first_long_side,
        crop_sides=tuple(crop_sides),
        buckets=tuple(map(tuple, buckets)),
        max_boxes=max_boxes,
        masks=masks,
    )


def parse_buckets(text: str) -> tuple[tuple[int, int], ...]:
    """Heights and widths from text such as "608x832,832x608"; of "" ``BUCKETS``.

    Raises:
      UserError: other text.
    """
    if not text:
        return BUCKETS
    parts = [re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", part) for part in text.split(",")]
    if not all(parts):
        raise UserError(
            f'config.data.buckets wants heights and widths such as "608x832,832x608", or "" for the default ones, got {text!r}.'
        )
    return tuple((int(part[1]), int(part[2])) for part in parts)


def transform_boxes(boxes: np.ndarray, view: Views) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 (n, 4) in the pixels of a view, cut to it, and bool (n,), whether anything is left of each."""
    (height, width), (top, left, *kept) = view.original.tolist(), view.crop.tolist()
    if view.flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    boxes = _scale_boxes(boxes, (height, width), view.resized.tolist())
    boxes = _clip_boxes(boxes - np.array([left, top, left, top], np.float32), kept)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes = _scale_boxes(boxes, kept, view.size.tolist())
    return boxes, inside & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # rounding may leave nothing of a sliver


def transform_mask(mask: np.ndarray, view: Views) -> np.ndarray:
    """A mask uint8 (H, W) as ``view`` makes it, resized to the nearest pixel each time as the published bitmaps are."""
    return _apply(mask, view, resize_label)


def _apply(pixels: np.ndarray, view: Views, resize) -> np.ndarray:
    top, left, height, width = view.crop.tolist()
    pixels = cv2.flip(pixels, 1) if view.flip else pixels
    pixels = _resize_to(pixels, view.resized.tolist(), resize)[top : top + height, left : left + width]
    return _resize_to(pixels, view.size.tolist(), resize)


def _resize_to(pixels: np.ndarray, size: Sequence[int], resize) -> np.ndarray:
    return pixels if pixels.shape[:2] == tuple(size) else resize(pixels, height=size[0], width=size[1])


def _scale_boxes(boxes: np.ndarray, before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    ratios = [new / old for new, old in zip(after, before, strict=True)]
    return _clip_boxes(boxes * np.array([ratios[1], ratios[0]] * 2, np.float32), after)


def _clip_boxes(boxes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))


def _whole_view(size: tuple[int, int], *, flip: bool, bucket: tuple[int, int]) -> Views:
    factor = min(most / side for most, side in zip(bucket, size, strict=True))
    fitted = np.array([max(int(side * factor), 1) for side in size], np.int32)
    own = np.array(size, np.int32)
    return Views(original=own, flip=flip, resized=own, crop=np.array([0, 0, *size], np.int32), size=fitted)


def _fill(values: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([values, np.zeros((count - len(values), *values.shape[1:]), values.dtype)])


def _choose(values: Sequence[int], uniform: np.ndarray) -> np.ndarray:
    return np.array(values)[_integers(uniform, 0, len(values) - 1)]


def _integers(uniform: np.ndarray, low, high) -> np.ndarray:
    """Uniform on [0, 1) -> uniform on the integers from ``low`` to ``high``, both within."""
    return low + np.floor(uniform * (high - low + 1)).astype(np.int64)


def _fit(sizes: np.ndarray, *, short: np.ndarray, long: int) -> np.ndarray:
    """``fit_size`` of (n, 2) heights and widths, each with a bound of its own."""
    most, least = np.maximum(short, long), np.minimum(short, long)
    factors = np.minimum(most / sizes.max(axis=1), least / sizes.min(axis=1))
    return np.maximum((sizes * factors[:, None] + 0.5).astype(np.int64), 1)


@dataclasses.dataclass(frozen=True)
class DetectionEvalTransform:
    """See ``make_detection_eval_transform``."""

    scale: tuple[int, int]
    multiple: int

    def view_shapes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """((height, width),) in pixels of an image of this size, with its padding."""
        size = fit_size(height, width, scale=self.scale)
        return (tuple(-(-side // self.multiple) * self.multiple for side in size),)

    def __call__(self, record: dict) -> dict:
        """A record, resized and padded."""
        original = record["image"].shape[:2]
        size = fit_size(*original, scale=self.scale)
        (shape,) = self.view_shapes(*original)
        ratios = [new / old for new, old in zip(size, original, strict=True)]
        image = resize_image(record["image"], height=size[0], width=size[1])
        return {
            "image": pad(image, height=shape[0], width=shape[1], value=0),
            "valid": np.array(size, np.int32),
            "scale": np.array([ratios[1], ratios[0]] * 2, np.float32),
            "original": np.array(original, np.int32),
        }


def make_detection_eval_transform(
    *, scale: tuple[int, int] = (LONG_SIDE, 800), multiple: int = _MULTIPLE
) -> DetectionEvalTransform:
    """The whole image at one size, ratio kept, padded at the bottom and at the right.

    Args:
      scale: see ``segmentation_transforms.fit_size``.
      multiple: of which the padded sides are. A larger one than the published 32 makes fewer shapes, and other results.

    Returns:
      ``view_shapes(height, width)``, and a function of {"image": uint8 (H, W, 3)} that gives {"image": uint8 (Hp, Wp, 3),
      "valid": int32 (2,), height and width of the part that is image, "scale": float32 (4,), by which x, y, x and y of the
      original were multiplied, "original": int32 (2,), (H, W)}.
    """
    return DetectionEvalTransform(tuple(scale), multiple)
