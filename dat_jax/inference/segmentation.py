"""A trained segmentor as a function of images; ``inference`` documents the interface."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from dat_jax.data import ade20k
from dat_jax.data.buckets import check_sizes
from dat_jax.data.image_format import RGB, ImageFormat
from dat_jax.data.segmentation_transforms import SegmentationEvalTransform, make_segmentation_eval_transform
from dat_jax.errors import UserError
from dat_jax.evaluation.segmentation import make_segmenter, segment_record
from dat_jax.inference.image_files import check_image
from dat_jax.inference.settings import check_at_least_1, choose_options, find_names
from dat_jax.inference.shapes import ArrayShapes
from dat_jax.models.dat import MIN_IMAGE_SIDE
from dat_jax.models.segmentation import Segmentor
from dat_jax.storage import atomic_path
from dat_jax.tasks.segmentation.objective import make_segmentation_objective

OPTIONS = {  # default values
    "long_side": 2048,
    "short_side": 512,
    "ratios": (1.0,),
    "flip": False,
    "window": 0,
    "stride": 0,
    "buckets": "auto",
}
_MAX_CLASSES = 255  # label maps are uint8, and 255 means no class


@dataclasses.dataclass(frozen=True, eq=False)
class Segmenter:
    """A trained segmentor with its preprocessing. Every shape of arrays is compiled once, see ``arrays``.

    A prediction is a pair: the most likely class of every pixel, uint8 (H, W), and its probability, float32 (H, W).

    Attributes:
      class_names: names of the K classes.
      palette: colors of the classes, uint8 (K, 3), RGB.
      transform: preprocessing of an image to the augmented views of test time.
      segment: function from ``make_segmenter``.
      model: the network.
      variables: weights of the network.
      options: value of every option.
      arrays: shapes of the arrays of images.
      columns: column names of ``to_rows``.
      image_format: channels and dtype of images.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "class", "share")
    image_format: ClassVar[ImageFormat] = RGB

    class_names: tuple[str, ...]
    palette: np.ndarray
    transform: SegmentationEvalTransform
    segment: Callable
    model: Segmentor
    variables: Mapping[str, Any]
    options: Mapping[str, Any]
    arrays: ArrayShapes = dataclasses.field(default_factory=ArrayShapes)

    def plan(self, sizes: Iterable[tuple[int, int]]) -> "Segmenter":
        """Return this segmentor prepared for images of these (height, width): it compiles few programs for them.

        Raises:
          UserError: see ``buckets.check_sizes``.
        """
        possible = [
            size for size in check_sizes(sizes) if min(map(min, self.transform.view_shapes(*size))) >= MIN_IMAGE_SIDE
        ]
        return dataclasses.replace(self, arrays=self.arrays.plan(self.transform, possible))

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segment an image, uint8 (H, W, 3), RGB.

        Returns:
          The most likely classes, uint8 (H, W), and their probabilities, float32 (H, W).

        Raises:
          UserError: it is not such an array, or an augmented view of the image has a side below 32 pixels.
        """
        image = check_image(image)
        height, width = image.shape[:2]
        smallest = min(self.transform.view_shapes(height, width), key=min)
        if min(smallest) < MIN_IMAGE_SIDE:
            resized = "{} x {}".format(*smallest)
            raise UserError(
                f"An image of {height} x {width} pixels is resized to {resized}, but sides must be at least "
                f"{MIN_IMAGE_SIDE} pixels."
            )
        record = self.transform({"image": image, "label": np.zeros((height, width), np.uint8)})
        record = self.arrays.pad(record, self.transform, (height, width))
        labels, probabilities = segment_record(self.segment, self.variables, record)
        return labels.astype(np.uint8), probabilities.astype(np.float32)

    def describe(self, prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, str]:
        """{class name: percentage of the pixels}."""
        shares = measure_shares(prediction[0], self.class_names)
        return {name: f"{share:.1%}" if share >= 0.001 else "<0.1%" for name, share in shares.items()}

    def save(self, path: pathlib.Path, image: np.ndarray, prediction: tuple[np.ndarray, np.ndarray]) -> None:
        """Write the class index of every pixel as a palette PNG."""
        del image
        save_labels(path, prediction[0], palette=self.palette)

    def to_entries(
        self, prediction: tuple[np.ndarray, np.ndarray], *, image: str, number: int, output: str | None
    ) -> list[dict[str, Any]]:
        """One entry, {"image", "classes": {name: share of the pixels}, "labels": the PNG file or None}."""
        del number
        return [{"image": image, "classes": measure_shares(prediction[0], self.class_names), "labels": output}]

    def to_rows(self, prediction: tuple[np.ndarray, np.ndarray], *, image: str) -> list[tuple]:
        """One row for each class of ``measure_shares``."""
        return [(image, *item) for item in measure_shares(prediction[0], self.class_names).items()]


def from_trained(
    path: str | os.PathLike,
    model: Segmentor,
    variables: Mapping[str, Any],
    *,
    classes: str | os.PathLike | None = None,
    **options,
) -> Segmenter:
    """Make a segmentor from a loaded model; ``inference.load`` documents the rest.

    Args:
      path: export or work directory that the model was loaded from.
      model: the network, with at most 255 classes.
      variables: weights of the network.
      classes: text file with the class names. A model of 150 classes has the names of ADE20K by default.
      **options:
        long_side, short_side, ratios: see ``make_segmentation_eval_transform``; published are 2048, 512 and (1.0,).
        flip, window, stride: see ``make_segmenter``; published are False, 0 and 0.
        buckets: see ``ArrayShapes``, "auto" by default.

    Raises:
      UserError: an option is unknown or impossible, the class names cannot be read, or there are too many classes.
    """
    path = pathlib.Path(path)
    options = choose_options(path, options, known=OPTIONS, kind="segmentor")
    check_at_least_1(options, "long_side", "short_side")
    if not options["ratios"] or not all(0 < ratio < math.inf for ratio in options["ratios"]):
        raise UserError(f"ratios must be one or more numbers above 0, got {tuple(options['ratios'])}.")
    if model.num_classes > _MAX_CLASSES:
        raise UserError(
            f"{path} has {model.num_classes} classes, but label maps of 8 bits hold at most {_MAX_CLASSES}."
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
        arrays=ArrayShapes(options["buckets"]),
    )


def save_labels(path: pathlib.Path, labels: np.ndarray, *, palette: np.ndarray) -> None:
    """Write a label map as a palette PNG.

    Args:
      path: file to write.
      labels: class indices, uint8 (H, W).
      palette: colors of the classes, uint8 (K, 3), RGB.

    Raises:
      UserError: the file cannot be written.
    """
    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())
    with atomic_path(path, overwrite=True) as temporary:
        image.save(temporary)


def measure_shares(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Share of the pixels, from 0 to 1, of each class that occurs in a label map.

    Args:
      labels: class indices, uint8 (H, W).
      class_names: names of the K classes. Classes with the same name are added up.

    Returns:
      {class name: share}, the largest share first.
    """
    shares = dict.fromkeys(class_names, 0.0)
    for name, count in zip(class_names, np.bincount(labels.ravel(), minlength=len(class_names)), strict=True):
        shares[name] += float(count / labels.size)
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share}
