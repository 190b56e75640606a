"""Transforms of an image with the boxes and masks of its objects on the host, in uint8.

Operations, their order and their distributions are those of the published recipe (spec/dense_prediction.md, section 3), which
follows MMDetection 2.26: a flip, then either a resize, or a resize, a crop and another resize. Normalization runs on the device.

All random parameters except the choice of surplus objects depend only on the sizes of images, so that the shapes of all batches
are known from the sizes alone. A bucket is a shape (height, width) in pixels that a network is compiled for; images are padded
to it at the bottom and the right.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from dat_jax.data.coco import decode_mask
from dat_jax.data.segmentation_transforms import fit_size, pad, resize_image, resize_label
from dat_jax.errors import UserError

SHORT_SIDES = tuple(range(480, 801, 32))
LONG_SIDE = 1333
# Aspect ratios up to 4:3 and larger ones, landscape and portrait.
BUCKETS = ((608, 832), (832, 608), (800, 1088), (1088, 800), (800, 1344), (1344, 800))
_MULTIPLE = 32  # of the sides of buckets


@dataclasses.dataclass(frozen=True, eq=False)
class Views:
    """Parameters of the augmented views of n images, int32 except ``flip``. Those of a single image have no first axis.

    Attributes:
      original: (n, 2), height and width of the image in pixels.
      flip: bool (n,), whether the image is mirrored horizontally, as the first operation.
      resized: (n, 2), height and width before the crop; equal to ``original`` without a crop.
      crop: (n, 4), top, left, height and width of the crop in the resized image.
      size: (n, 2), height and width of the result, without padding.
    """

    original: np.ndarray
    flip: np.ndarray
    resized: np.ndarray
    crop: np.ndarray
    size: np.ndarray

    def take(self, index) -> "Views":
        """Return the parameters of one image, or of several."""
        return Views(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class DetectionTrainTransform:
    """Training transform; see ``make_detection_train_transform`` for the attributes."""

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

    def usual_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Return the heights and widths of images without a crop and with the median of ``short_sides``.

        Args:
          sizes: int (n, 2), heights and widths of the images in pixels.
        """
        short = np.full(len(sizes), sorted(self.short_sides)[len(self.short_sides) // 2])
        return _fit(np.asarray(sizes, np.int64), short=short, long=self.long_side)

    def draw(self, sizes: np.ndarray, rng: np.random.Generator) -> Views:
        """Draw the parameters of n images independently.

        Args:
          sizes: int (n, 2), heights and widths in pixels.
          rng: source of all draws, always eight uniform numbers per image.
        """
        sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
        flip, crop, first, second, *rest = rng.random((8, len(sizes)))
        resized = _fit(sizes, short=_choose(self.first_short_sides, first), long=self.first_long_side)
        low, high = (np.minimum(resized, side) for side in self.crop_sides)
        crop_size = _to_integers(np.stack(rest[:2], axis=1), low, high)
        corner = _to_integers(np.stack(rest[2:], axis=1), 0, resized - crop_size)
        is_cropped = (crop < self.crop_probability)[:, None]
        crop_size = np.where(is_cropped, crop_size, sizes)
        fields = {
            "original": sizes,
            "resized": np.where(is_cropped, resized, sizes),
            "crop": np.concatenate([np.where(is_cropped, corner, 0), crop_size], axis=1),
            "size": _fit(crop_size, short=_choose(self.short_sides, second), long=self.long_side),
        }
        fields = {name: values.astype(np.int32) for name, values in fields.items()}
        return Views(flip=flip < self.flip_probability, **fields)

    def choose_buckets(self, sizes: np.ndarray) -> np.ndarray:
        """Return the index of the smallest bucket that holds each image, int (n,); the first one of equal area.

        Args:
          sizes: int (n, 2), heights and widths in pixels.
        """
        areas = np.prod(self.buckets, axis=1)
        fits = (np.asarray(sizes)[:, None] <= np.array(self.buckets)).all(axis=-1)
        return np.where(fits, areas, areas.max() + 1).argmin(axis=1)

    def __call__(self, record: dict, view: Views, *, bucket: tuple[int, int], rng: np.random.Generator) -> dict:
        """Transform a record of ``data.coco`` and pad it to a bucket; see ``make_detection_train_transform``.

        If the image does not have the size that the view was drawn for, because it replaces a damaged one, the whole image is
        resized to the largest size within the bucket instead.
        """
        image = record["image"]
        if image.shape[:2] != tuple(view.original):
            view = _whole_view(image.shape[:2], flip=view.flip, bucket=bucket)
        indices = np.flatnonzero(~record["crowd"])
        boxes, is_visible = transform_boxes(record["boxes"][indices], view)
        indices, boxes = indices[is_visible], boxes[is_visible]
        dropped = max(len(indices) - self.max_boxes, 0)
        if dropped:
            sample = np.sort(rng.choice(len(indices), self.max_boxes, replace=False))
            indices, boxes = indices[sample], boxes[sample]
        result = {
            "image": pad(_apply(image, view, resize_image), height=bucket[0], width=bucket[1], value=0),
            "valid": view.size.astype(np.int32),
            "boxes": _fill(boxes, self.max_boxes),
            "labels": _fill(record["labels"][indices], self.max_boxes),
            "box_mask": np.arange(self.max_boxes) < len(indices),
            "dropped": np.int32(dropped),
        }
        if self.masks:
            result["masks"] = self._pack_masks(record["masks"], indices, view, bucket)
        return result | {key: record[key] for key in ("damaged",) if key in record}

    def _pack_masks(self, masks: list[dict] | None, indices: np.ndarray, view: Views, bucket) -> np.ndarray:
        """Return the transformed masks of some objects as bitmaps, uint8 (G, Hb, Wb / 8)."""
        if masks is None:
            raise UserError(
                "The annotations have no masks: expected a segmentation of every object in order to learn masks."
            )
        packed = np.zeros((self.max_boxes, bucket[0], bucket[1] // 8), np.uint8)
        for row, index in enumerate(indices):
            bits = np.packbits(transform_mask(decode_mask(masks[index]), view), axis=1)
            packed[row, : bits.shape[0], : bits.shape[1]] = bits
        return packed


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
    """Make a transform: random flip; with some probability, a random resize and crop; a random resize.

    Args:
      short_sides: bounds of the short side of the result in pixels, one of which is drawn.
      long_side: bound of the long side of the result.
      flip_probability: probability of a horizontal flip.
      crop_probability: probability of the first resize and the crop.
      first_short_sides, first_long_side: the same bounds for the resize before the crop.
      crop_sides: smallest and largest side of the crop, inclusive; each side is uniform between them, or up to the side of the
        image if that is smaller.
      buckets: shapes to pad to, multiples of 32.
      max_boxes: maximum number G of objects; surplus ones are dropped at random.
      masks: whether to return masks.

    Returns:
      A transform with ``draw`` and ``choose_buckets``, to be called with a record of ``data.coco``, the ``Views`` of one image, a
      bucket (Hb, Wb) and a generator. It returns:

      - "image": uint8 (Hb, Wb, 3);
      - "valid": int32 (2,), height and width of the region that is not padding;
      - "boxes": float32 (G, 4); "labels": int32 (G,); "box_mask": bool (G,), True for objects, which come first; other entries
        are zero;
      - "dropped": int32, number of surplus objects;
      - "masks", if ``masks``: uint8 (G, Hb, Wb / 8), bitmaps of the padded image with eight pixels per byte, the first one in the
        highest bit (``numpy.packbits``). For 100 objects in 800 x 1344 they take 13.4 MB, the image 3.2 MB;
      - "damaged", if the record has it.

      Groups ("crowd") and objects outside the crop are left out.

    Raises:
      UserError: a side of a bucket is not a multiple of 32, no bucket holds the largest images, or the crop sides are invalid.
    """
    _check_buckets(buckets, *sorted((max(short_sides), long_side)))
    if not 0 < crop_sides[0] <= crop_sides[1]:
        raise UserError(
            f"The crop has sides from {crop_sides[0]} to {crop_sides[1]}: expected positive sides, the smaller one first."
        )
    return DetectionTrainTransform(
        short_sides=tuple(short_sides),
        long_side=long_side,
        flip_probability=flip_probability,
        crop_probability=crop_probability,
        first_short_sides=tuple(first_short_sides),
        first_long_side=first_long_side,
        crop_sides=(crop_sides[0], crop_sides[1]),
        buckets=tuple((height, width) for height, width in buckets),
        max_boxes=max_boxes,
        masks=masks,
    )


def _check_buckets(buckets: Sequence[tuple[int, int]], short: int, long: int) -> None:
    """Check that buckets are valid shapes, and that they hold the largest landscape and portrait images."""
    for bucket in buckets:
        if len(bucket) != 2 or any(side <= 0 or side % _MULTIPLE for side in bucket):
            raise UserError(
                f"The bucket {tuple(bucket)} is invalid: expected a height and a width that are multiples of {_MULTIPLE}."
            )
    for size in ((short, long), (long, short)):
        if not any(all(side >= needed for side, needed in zip(bucket, size, strict=True)) for bucket in buckets):
            raise UserError(
                f"No bucket holds an image of {size[0]} x {size[1]}, which is possible with sides up to {short} and {long}."
            )


def transform_boxes(boxes: np.ndarray, view: Views) -> tuple[np.ndarray, np.ndarray]:
    """Transform boxes with the parameters of one image, and clip them.

    Args:
      boxes: float32 (n, 4), x1, y1, x2, y2 in pixels of the original image.
      view: the parameters.

    Returns:
      Boxes float32 (n, 4) in pixels of the result, and bool (n,), whether their area is positive.
    """
    (height, width), (top, left, *crop_size) = view.original.tolist(), view.crop.tolist()
    if view.flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    boxes = _scale_boxes(boxes, (height, width), view.resized.tolist())
    boxes = _clip_boxes(boxes - np.array([left, top, left, top], np.float32), crop_size)
    is_visible = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    boxes = _scale_boxes(boxes, crop_size, view.size.tolist())
    return boxes, is_visible & np.all(boxes[:, 2:] > boxes[:, :2], axis=1)  # rounding may make a thin box empty


def transform_mask(mask: np.ndarray, view: Views) -> np.ndarray:
    """Transform a mask, uint8 (H, W), with the parameters of one image.

    Every resize takes the nearest pixel, as for the published bitmaps.
    """
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


def _whole_view(size: tuple[int, int], *, flip: np.ndarray, bucket: tuple[int, int]) -> Views:
    """Return the parameters that resize a whole image to the largest size within a bucket."""
    factor = min(limit / side for limit, side in zip(bucket, size, strict=True))
    fitted = np.array([max(int(side * factor), 1) for side in size], np.int32)
    original = np.array(size, np.int32)
    crop = np.array([0, 0, *size], np.int32)
    return Views(original=original, flip=flip, resized=original, crop=crop, size=fitted)


def _fill(values: np.ndarray, count: int) -> np.ndarray:
    """Append zeros up to ``count`` rows."""
    return np.concatenate([values, np.zeros((count - len(values), *values.shape[1:]), values.dtype)])


def _choose(values: Sequence[int], uniform: np.ndarray) -> np.ndarray:
    """Choose one of some values for each uniform number in [0, 1)."""
    return np.array(values)[_to_integers(uniform, 0, len(values) - 1)]


def _to_integers(uniform: np.ndarray, low, high) -> np.ndarray:
    """Map uniform numbers in [0, 1) to uniform integers from ``low`` to ``high``, inclusive."""
    return low + np.floor(uniform * (high - low + 1)).astype(np.int64)


def _fit(sizes: np.ndarray, *, short: np.ndarray, long: int) -> np.ndarray:
    """Vectorized ``fit_size`` of (n, 2) heights and widths, with one bound ``short`` per image."""
    larger, smaller = np.maximum(short, long), np.minimum(short, long)
    factors = np.minimum(larger / sizes.max(axis=1), smaller / sizes.min(axis=1))
    return np.maximum((sizes * factors[:, None] + 0.5).astype(np.int64), 1)


@dataclasses.dataclass(frozen=True)
class DetectionEvalTransform:
    """Evaluation transform; see ``make_detection_eval_transform`` for the attributes."""

    scale: tuple[int, int]
    multiple: int

    def view_shapes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Return ((height, width),) in pixels of the padded result for an image of the given size."""
        size = fit_size(height, width, scale=self.scale)
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return ((height, width),)

    def __call__(self, record: dict) -> dict:
        """Resize and pad the image of a record."""
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
    """Make a transform that resizes the whole image, keeping its aspect ratio, and pads it at the bottom and the right.

    Args:
      scale: see ``segmentation_transforms.fit_size``.
      multiple: padded sides are multiples of this. A value above the published 32 gives fewer shapes, but different results.

    Returns:
      A transform with ``view_shapes(height, width)``, to be called with {"image": uint8 (H, W, 3)}. It returns {"image": uint8
      (Hp, Wp, 3), "valid": int32 (2,), height and width of the region that is not padding, "scale": float32 (4,), the factors
      of x, y, x and y relative to the original image, "original": int32 (2,), which is (H, W)}.
    """
    return DetectionEvalTransform((scale[0], scale[1]), multiple)
