"""A trained classifier as a function of images; ``inference`` documents the interface."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.data import imagenet_names
from dat_jax.data.image_format import DTYPES, ImageFormat
from dat_jax.data.transforms import make_eval_transform
from dat_jax.errors import UserError
from dat_jax.inference.image_files import check_image
from dat_jax.inference.settings import check_at_least_1, choose_options, find_names
from dat_jax.models.dat import DAT, MIN_IMAGE_SIDE
from dat_jax.tasks.classification.objective import make_classification_objective
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, repeat_for_channels

OPTIONS = {  # default values; ``_choose_sizes`` replaces None
    "image_size": None,
    "resize": None,
    "top": 5,
    "batch_size": 8,
    "image_dtype": "uint8",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
}
_RESIZE = 256 / 224  # resize / image_size as published; only DAT++ at 384 is evaluated without a crop


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier with its preprocessing. Predictions are probabilities, float32 (K,).

    Attributes:
      class_names: names of the K classes.
      image_format: channels and dtype of images.
      transform: preprocessing of a record {"image": (H, W, C)} to image_size x image_size pixels.
      predict: jitted ``predict`` of ``make_classification_objective``.
      model: the network.
      variables: weights of the network.
      options: value of every option.
      columns: column names of ``to_rows``.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "rank", "class", "probability")

    class_names: tuple[str, ...]
    image_format: ImageFormat
    transform: Callable[[dict], dict]
    predict: Callable
    model: DAT
    variables: Mapping[str, Any]
    options: Mapping[str, Any]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Probabilities, float32 (K,), of an image (H, W, C) of ``image_format``, by default uint8 RGB."""
        return self.classify([image])[0]

    def classify(self, images: Sequence[np.ndarray], *, pad_to: int = 1) -> np.ndarray:
        """Classify a batch of images. Every batch size is compiled once.

        Args:
          images: N images (H, W, C) of ``image_format`` and any sizes.
          pad_to: batch size to which fewer images are padded with black ones.

        Returns:
          Probabilities, float32 (N, K).
        """
        if not len(images):
            raise UserError("Expected at least one image, got none.")
        batch = [self.transform({"image": check_image(image, self.image_format)})["image"] for image in images]
        batch += [np.zeros_like(batch[0])] * (pad_to - len(batch))
        logits = self.predict(self.variables, {"image": np.stack(batch)})["logits"]
        return np.asarray(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))[: len(images)]

    def rank(self, prediction: np.ndarray) -> dict[str, float]:
        """{class name: probability} of the ``top`` most likely classes, most likely first.

        If several of them have the same name, their labels are appended to it.
        """
        order = np.argsort(-prediction, kind="stable")[: self.options["top"]]
        names = [self.class_names[label] for label in order]
        return {
            name if names.count(name) == 1 else f"{name} ({label})": float(prediction[label])
            for name, label in zip(names, order, strict=True)
        }

    def describe(self, prediction: np.ndarray) -> dict[str, str]:
        """{class name: percentage} of the classes of ``rank``."""
        return {name: f"{value:.1%}" for name, value in self.rank(prediction).items()}

    def save(self, path: pathlib.Path, image: np.ndarray, prediction: np.ndarray) -> None:
        """Raise a UserError: the prediction of a classifier is not an image."""
        del path, image, prediction
        raise UserError("A classifier predicts only probabilities, which cannot be drawn.")

    def to_entries(
        self, prediction: np.ndarray, *, image: str, number: int, output: str | None
    ) -> list[dict[str, Any]]:
        """One entry, {"image", "classes": {name: probability}}, with the classes of ``rank``."""
        del number, output
        return [{"image": image, "classes": self.rank(prediction)}]

    def to_rows(self, prediction: np.ndarray, *, image: str) -> list[tuple]:
        """One row for each class of ``rank``; the most likely class has rank 1."""
        return [(image, rank, *item) for rank, item in enumerate(self.rank(prediction).items(), start=1)]


def from_trained(
    path: str | os.PathLike,
    model: DAT,
    variables: Mapping[str, Any],
    *,
    classes: str | os.PathLike | None = None,
    **options,
) -> Classifier:
    """Make a classifier from a loaded model; ``inference.load`` documents the rest.

    Args:
      path: export or work directory that the model was loaded from.
      model: the network.
      variables: weights of the network.
      classes: text file with the class names. A model of 1,000 classes has the names of ImageNet by default.
      **options:
        image_size, resize: see ``make_eval_transform``. Published are 224 with 256, and 384 with 384 (DAT++) or 438 (DAT
          v1). If only image_size is passed, resize changes in proportion.
        top: number of classes to report, by default 5.
        batch_size: number of images per batch, by default 8.
        image_dtype: dtype of images, "uint8", "uint16" or "float32".
        mean, std: see ``normalize``, a number for each channel or one for all; those of ImageNet if none are stored.

    Raises:
      UserError: an option is unknown or impossible, or the class names cannot be read.
    """
    path, passed = pathlib.Path(path), options
    options = choose_options(path, passed, known=OPTIONS, kind="classifier")
    _choose_sizes(options, choose_options(path, {}, known=OPTIONS, kind="classifier"), passed, model)
    size = options["image_size"]
    if size < MIN_IMAGE_SIDE or options["resize"] < size:
        raise UserError(
            f"image_size must be at least {MIN_IMAGE_SIDE} and resize at least image_size, got {size} and "
            f"{options['resize']}."
        )
    check_at_least_1(options, "top", "batch_size")
    _check_input(options, model.in_channels)
    statistics = {name: options[name] for name in ("mean", "std")}
    return Classifier(
        class_names=find_names(path, classes, count=model.num_classes, published=imagenet_names.CLASS_NAMES),
        image_format=ImageFormat(model.in_channels, options["image_dtype"]),
        transform=make_eval_transform(resize=options["resize"], image_size=size),
        predict=jax.jit(make_classification_objective(model, label_smoothing=0.0, **statistics).predict),
        model=model,
        variables=variables,
        options=options,
    )


def _choose_sizes(options, stored, passed, model):
    """Set image_size and resize in ``options`` if the caller passed neither of them, or only image_size."""
    if options["image_size"] is None:
        options["image_size"] = int(np.max(model.image_size))
    size = options["image_size"]
    if "image_size" in passed and "resize" not in passed and stored["image_size"] and stored["resize"]:
        options["resize"] = round(size * stored["resize"] / stored["image_size"])
    if options["resize"] is None:
        without_crop = size >= 384 and model.deformable_form == "dat_pp"
        options["resize"] = size if without_crop else int(size * _RESIZE)


def _check_input(options, channels):
    """Check image_dtype, mean and std in ``options``, and repeat a single mean or standard deviation for every channel."""
    if options["image_dtype"] not in DTYPES:
        raise UserError(f"image_dtype must be one of {', '.join(DTYPES)}, got {options['image_dtype']!r}.")
    for name in ("mean", "std"):
        values = options[name] if isinstance(options[name], tuple) else (options[name],)
        options[name] = repeat_for_channels(values, channels=channels, name=name)
    if min(options["std"]) <= 0:
        raise UserError(f"std must be above 0, got {options['std']}.")
