"""A trained classifier as a function of images; see ``inference``."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.data import imagenet_names
from dat_jax.data.transforms import make_eval_transform
from dat_jax.errors import UserError
from dat_jax.inference.settings import choose_options, find_names
from dat_jax.models.dat import DAT, MIN_IMAGE_SIDE
from dat_jax.tasks.classification.objective import make_classification_objective

OPTIONS = {  # see ``choose_options``; where nothing says a size, it is the model's
    "image_size": ("data.image_size", None),
    "resize": ("data.eval_resize", None),
    "top": ("", 5),
    "batch_size": ("", 8),
}
_RESIZE = 256 / 224  # of the image size, as published; only the DAT++ at 384 is evaluated without a crop


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier and how it looks at images.

    Attributes:
      class_names: of the K classes.
      transform: from {"image": uint8 (H, W, 3)} to one of image_size x image_size.
      predict: jitted, of ``make_classification_objective``.
      model, variables: what it is made of.
      options: every option's value.
      columns: of ``to_rows``.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "rank", "class", "probability")

    class_names: tuple[str, ...]
    transform: Callable[[dict], dict]
    predict: Callable
    model: DAT
    variables: Mapping[str, Any]
    options: Mapping[str, Any]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) RGB -> probabilities float32 (K,)."""
        return self.classify([image])[0]

    def classify(self, images: Sequence[np.ndarray], *, pad_to: int = 1) -> np.ndarray:
        """At once; it compiles once for each number of images.

        Args:
          images: N of any sizes, uint8 (H, W, 3) RGB.
          pad_to: black images are computed beside fewer than these.

        Returns:
          Probabilities float32 (N, K).
        """
        batch = [self.transform({"image": image})["image"] for image in images]
        batch += [np.zeros_like(batch[0])] * (pad_to - len(batch))
        logits = self.predict(self.variables, {"image": np.stack(batch)})["logits"]
        return np.asarray(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))[: len(images)]

    def rank(self, found: np.ndarray) -> dict[str, float]:
        """Class name -> probability of the ``top`` likeliest classes, the likeliest first; equal names get their number."""
        order = np.argsort(-found, kind="stable")[: self.options["top"]]
        names = [self.class_names[label] for label in order]
        return {
            name if names.count(name) == 1 else f"{name} ({label})": float(found[label])
            for name, label in zip(names, order, strict=True)
        }

    def describe(self, found: np.ndarray) -> dict[str, str]:
        """Class name -> percentage, as ``rank``."""
        return {name: f"{value:.1%}" for name, value in self.rank(found).items()}

    def save(self, path: pathlib.Path, image: np.ndarray, found: np.ndarray) -> None:
        """UserError: a classifier finds nothing to draw."""
        del path, image, found
        raise UserError("A classifier draws nothing: it has probabilities alone.")

    def to_entries(self, found: np.ndarray, *, image: str, number: int, picture: str | None) -> list[dict[str, Any]]:
        """[{"image", "classes": {name: probability}}], as ``rank``."""
        del number, picture
        return [{"image": image, "classes": self.rank(found)}]

    def to_rows(self, found: np.ndarray, *, image: str) -> list[tuple]:
        """Of ``columns``, as ``rank``; the likeliest class has rank 1."""
        return [(image, rank, *item) for rank, item in enumerate(self.rank(found).items(), start=1)]


def from_trained(
    path: str | os.PathLike,
    model: DAT,
    variables: Mapping[str, Any],
    *,
    classes: str | os.PathLike | None = None,
    **options,
) -> Classifier:
    """See ``inference.load``.

    Args:
      path: where the model was loaded from.
      model: the classifier.
      variables: of it.
      classes: a file with names of its classes. Those of ImageNet are known where there are 1,000.
      **options: image_size and resize, see ``make_eval_transform``; top, the number of classes to report (5); and batch_size,
        the number of images to compute at once (8). The published sizes are 224 and 256, at 384 for DAT++ 384 and for DAT v1
        438. image_size alone changes resize in proportion.
    """
    path, given = pathlib.Path(path), options
    options = choose_options(path, given, known=OPTIONS, kind="classifier")
    _choose_sizes(options, choose_options(path, {}, known=OPTIONS, kind="classifier"), given, model)
    size = options["image_size"]
    if size < MIN_IMAGE_SIDE or options["resize"] < size:
        raise UserError(
            f"image_size wants at least {MIN_IMAGE_SIDE} and resize at least image_size, got {size} and "
            f"{options['resize']}."
        )
    for name in ("top", "batch_size"):
        if options[name] < 1:
            raise UserError(f"{name} wants a number of at least 1, got {options[name]}.")
    return Classifier(
        class_names=find_names(path, classes, count=model.num_classes, published=imagenet_names.CLASS_NAMES),
        transform=make_eval_transform(resize=options["resize"], image_size=size),
        predict=jax.jit(make_classification_objective(model, label_smoothing=0.0).predict),
        model=model,
        variables=variables,
        options=options,
    )


def _choose_sizes(options, saved, given, model):
    """Fills in image_size and resize where neither was asked for or the first alone was."""
    if options["image_size"] is None:
        options["image_size"] = int(np.max(model.image_size))
    size = options["image_size"]
    if "image_size" in given and "resize" not in given and saved["image_size"] and saved["resize"]:
        options["resize"] = round(size * saved["resize"] / saved["image_size"])
    if options["resize"] is None:
        whole = size >= 384 and model.deformable_form == "dat_pp"
        options["resize"] = size if whole else int(size * _RESIZE)
