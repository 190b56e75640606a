"""Trained classifiers, segmentors and detectors as functions of images, for programs. A module a task.

What ``load`` gives has ``class_names``, the ``model``, its ``variables``, the ``options`` that it looks with and, of an image
uint8 (H, W, 3) RGB:
__call__(image): what is found.
describe(found): {class name: words} of what is there, the most important first.
save(path, image, found): a PNG; UserError where it cannot be written.
to_entries(found, image=, number=, picture=): what a JSON file has of an image of this name and number, whose PNG is
``picture`` or None.
to_rows(found, image=): what a table has of it, tuples of ``columns``.
"""

import os

from dat_jax.checkpoints.loading import load_pretrained
from dat_jax.inference import classification, detection, segmentation
from dat_jax.inference.classification import Classifier
from dat_jax.inference.detection import ObjectDetector
from dat_jax.inference.segmentation import Segmenter
from dat_jax.models.dat import DAT
from dat_jax.models.segmentation import Segmentor

Looker = Classifier | Segmenter | ObjectDetector


def load(path: str | os.PathLike, *, classes: str | os.PathLike | None = None, **options) -> Looker:
    """A trained classifier, segmentor or detector as a function of images.

    Args:
      path: see ``load_pretrained``.
      classes: a file with the names of the classes, one a line. None takes those of the work directory or the export, else
        those that ImageNet (classifiers), ADE20K (segmentors) or COCO (detectors) has where there are as many, else numbers.
      **options: see ``from_trained`` of the task's module. One that is None or not given is what the export says or the run
        of a work directory evaluates with, else as published.

    Raises:
      UserError: as ``load_pretrained``; another number of names; unknown or impossible options.
    """
    given = {name: value for name, value in options.items() if value is not None}
    model, variables = load_pretrained(path)
    tasks = {DAT: classification, Segmentor: segmentation}
    task = tasks.get(type(model), detection)
    return task.from_trained(path, model, variables, classes=classes, **given)
