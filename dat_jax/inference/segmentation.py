"""A trained segmentor as a function of images; see ``inference``."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from dat_jax.cli.flags import replacing
from dat_jax.data import ade20k
from dat_jax.data.segmentation_transforms import SegmentationEvalTransform, make_segmentation_eval_transform
from dat_jax.errors import UserError
from dat_jax.evaluation.segmentation import make_segmenter, segment_record
from dat_jax.inference.settings import check_sides, choose_options, find_names
from dat_jax.models.dat import MIN_IMAGE_SIDE
from dat_jax.models.segmentation import Segmentor
from dat_jax.tasks.segmentation.objective import make_segmentation_objective

OPTIONS = {  # see ``choose_options``
    "long_side": ("data.long_side", 2048),
    "short_side": ("data.short_side", 512),
    "ratios": ("eval.ratios", (1.0,)),
    "flip": ("eval.flip", False),
    "window": ("eval.window", 0),
    "stride": ("eval.stride", 0),
}
_MOST_CLASSES = 255  # 255 itself is no class


@dataclasses.dataclass(frozen=True, eq=False)
class Segmenter:
    """A trained segmentor and how it looks at images; it compiles once for each size of an image.

    Attributes:
      class_names: of the K classes.
      palette: their colours, uint8 (K, 3) RGB.
      transform: from an image to the views that the network sees.
      segment: of ``make_segmenter``.
      model, variables: what it is made of.
      options: every option's value.
      columns: of ``to_rows``.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "class", "share")

    class_names: tuple[str, ...]
    palette: np.ndarray
    transform: SegmentationEvalTransform
    segment: Callable
    model: Segmentor
    variables: Mapping[str, Any]
    options: Mapping[str, Any]

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (H, W, 3) RGB -> the likeliest classes uint8 (H, W), and their probabilities float32 (H, W).

        Raises:
          UserError: a view of it has a side below 32 pixels.
        """
        (height, width), smallest = image.shape[:2], min(self.transform.view_shapes(*image.shape[:2]), key=min)
        if min(smallest) < MIN_IMAGE_SIDE:
            seen = "{} x {}".format(*smallest)
            raise UserError(
                f"{height} x {width} pixels become {seen}: wanted sides of at least {MIN_IMAGE_SIDE} there."
            )
        record = self.transform({"image": image, "label": np.zeros((height, width), np.uint8)})
        labels, probabilities = segment_record(self.segment, self.variables, record)
        return labels.astype(np.uint8), probabilities.astype(np.float32)

    def describe(self, found: tuple[np.ndarray, np.ndarray]) -> dict[str, str]:
        """Class name -> percentage of the pixels."""
        shares = measure_shares(found[0], self.class_names)
        return {name: f"{share:.1%}" if share >= 0.001 else "<0.1%" for name, share in shares.items()}

    def save(self, path: pathlib.Path, image: np.ndarray, found: tuple[np.ndarray, np.ndarray]) -> None:
        """A palette PNG with the class index of every pixel."""
        del image
        save_labels(path, found[0], palette=self.palette)

    def to_entries(self, found: tuple[np.ndarray, np.ndarray], *, image: str, number: int, picture: str | None) -> list:
        """[{"image", "classes": {name: share}, "labels": the PNG or None}]."""
        del number
        return [{"image": image, "classes": measure_shares(found[0], self.class_names), "labels": picture}]

    def to_rows(self, found: tuple[np.ndarray, np.ndarray], *, image: str) -> list[tuple]:
        """Of ``columns``: a row a class, as ``measure_shares``."""
        return [(image, *item) for item in measure_shares(found[0], self.class_names).items()]


def from_trained(
    path: str | os.PathLike,
    model: Segmentor,
    variables: Mapping[str, Any],
    *,
    classes: str | os.PathLike | None = None,
    **options,
) -> Segmenter:
    """See ``inference.load``.

    Args:
      path: where the model was loaded from.
      model: the segmentor, of 255 classes at most.
      variables: of it.
      classes: a file with their names.
      **options: long_side, short_side and ratios of the views (``make_segmentation_eval_transform``; published 2048, 512 and
        (1.0,)); flip, window and stride (``make_segmenter``; published False, 0 and 0).
    """
    path = pathlib.Path(path)
    options = choose_options(path, options, known=OPTIONS, kind="segmentor")
    check_sides(options)
    if not options["ratios"] or not all(0 < ratio < math.inf for ratio in options["ratios"]):
        raise UserError(f"ratios wants at least one number, all above 0, got {tuple(options['ratios'])}.")
    if model.num_classes > _MOST_CLASSES:
        raise UserError(
            f"{path} has {model.num_classes} classes: {_MOST_CLASSES} at most fit into label maps of 8 bits."
        )
    return Segmenter(
        class_names=find_names(path, classes, count=model.num_classes, published=ade20k.CLASS_NAMES),
        palette=ade20k.make_palette_for(model.num_classes),
        transform=make_segmentation_eval_transform(
            scale=(options["long_side"], options["short_side"]), ratios=options["ratios"]
        ),
        segment=make_segmenter(
            make_segmentation_objective(model, auxiliary_weight=0.0).predict,
            **{name: options[name] for name in ("flip", "window", "stride")},
        ),
        model=model,
        variables=variables,
        options=options,
    )


def save_labels(path: pathlib.Path, labels: np.ndarray, *, palette: np.ndarray) -> None:
    """A palette PNG: uint8 (H, W) as its indices, uint8 (K, 3) as their colours. UserError where it cannot be written."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.tobytes())
    with replacing(path) as unfinished:
        picture.save(unfinished)


def measure_shares(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Class name -> part of the pixels, from 0 to 1, of those that are in a label map uint8 (H, W), the largest first."""
    shares = dict.fromkeys(class_names, 0.0)
    for name, count in zip(class_names, np.bincount(labels.ravel(), minlength=len(class_names)), strict=True):
        shares[name] += float(count / labels.size)  # of classes of one name together
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share}
