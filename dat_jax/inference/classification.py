"""A trained classifier as a function of images; see ``inference``."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.data import imagenet_names
from dat_jax.data.transforms import make_eval_transform
from dat_jax.errors import UserError
from dat_jax.inference.settings import choose_options, find_names
from dat_jax.models.dat import DAT, MIN_IMAGE_SIDE
from dat_jax.tasks.classification import make_classification_task

OPTIONS = {  # see ``choose_options``; where nothing says a size, it is the model's
    "image_size": ("data.image_size", None),
    "resize": ("data.eval_resize", None),
    "top": ("", 5),
}
_RESIZE = 256 / 224  # published, of the image size below 384, where images are resized to it


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier and how it looks at images.

    Attributes:
      class_names: of the K classes.
      transform: from {"image": uint8 (H, W, 3)} to one of image_size x image_size.
      predict: jitted, of ``make_classification_task``.
      model, variables: what it is made of.
      options: every option's value.
    """

    class_names: tuple[str, ...]
    transform: Callable[[dict], dict]
    predict: Callable
    model: DAT
    variables: Mapping[str, Any]
    options: Mapping[str, Any]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) RGB -> probabilities float32 (K,)."""
        return self.classify([image])[0]

    def classify(self, images: list[np.ndarray]) -> np.ndarray:
        """N images of any sizes, uint8 (H, W, 3) RGB, at once -> probabilities float32 (N, K)."""
        batch = np.stack([self.transform({"image": image})["image"] for image in images])
        logits = self.predict(self.variables, {"image": batch})["logits"]
        return np.asarray(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))

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
        raise UserError("A classifier draws nothing: leave --output out; --json and --csv take what it finds.")

    def to_entries(self, found: np.ndarray, *, image: str, number: int, picture: str | None) -> list[dict[str, Any]]:
        """[{"image", "classes": {name: probability}}], as ``rank``."""
        del number, picture
        return [{"image": image, "classes": self.rank(found)}]


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
      **options: image_size and resize (``make_eval_transform``; published 224 and 256, 384 and 384), and top, how many
        classes are said (5).
    """
    path = pathlib.Path(path)
    options = choose_options(path, options, known=OPTIONS, kind="classifier")
    size = options["image_size"] = options["image_size"] or int(np.max(model.image_size))
    options["resize"] = options["resize"] or (size if size >= 384 else round(size * _RESIZE))
    if size < MIN_IMAGE_SIDE or options["resize"] < size:
        raise UserError(
            f"image_size wants at least {MIN_IMAGE_SIDE} and resize at least image_size, got {size} and "
            f"{options['resize']}."
        )
    if options["top"] < 1:
        raise UserError(f"top wants a number of at least 1, got {options['top']}.")
    return Classifier(
        class_names=find_names(path, classes, count=model.num_classes, published=imagenet_names.CLASS_NAMES),
        transform=make_eval_transform(resize=options["resize"], image_size=size),
        predict=jax.jit(make_classification_task(model, label_smoothing=0.0).predict),
        model=model,
        variables=variables,
        options=options,
    )
