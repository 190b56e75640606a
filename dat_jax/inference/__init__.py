"""Trained classifiers, segmentors and detectors as functions of images.

``load`` returns a predictor: a ``Classifier``, ``Segmenter`` or ``ObjectDetector``. Every predictor has the attributes
``class_names``, ``model``, ``variables``, ``options`` (preprocessing and postprocessing settings), ``image_format`` (channels and
dtype of images) and ``columns`` (header of ``to_rows``), and these methods, where an image is uint8 (H, W, 3), RGB, or for a
classifier an array (H, W, C) of its ``image_format``:

- ``predictor(image)``: prediction for the image, in the form that the class documents.
- ``describe(prediction)``: {class name: text} of the classes in a prediction, the most important first.
- ``save(path, image, prediction)``: write the prediction as a PNG file; UserError if that is impossible.
- ``to_entries(prediction, image=, number=, output=)``: JSON entries for an image with this name and number, whose PNG is
  ``output`` or None.
- ``to_rows(prediction, image=)``: rows of a table, tuples with the fields of ``columns``.
"""

import os

from dat_jax.checkpoints.directory import fetch_weights
from dat_jax.checkpoints.loading import load_pretrained
from dat_jax.inference import classification, detection, segmentation
from dat_jax.inference.classification import Classifier
from dat_jax.inference.detection import ObjectDetector
from dat_jax.inference.segmentation import Segmenter
from dat_jax.models.dat import DAT
from dat_jax.models.segmentation import Segmentor

Predictor = Classifier | Segmenter | ObjectDetector


def load(
    path: str | os.PathLike, *, classes: str | os.PathLike | None = None, ema_decay: float | None = None, **options
) -> Predictor:
    """Load a trained classifier, segmentor or detector as a function of images.

    Args:
      path: see ``load_pretrained``.
      classes: text file with the class names, one per line. By default the names stored in the work directory or export;
        otherwise those of ImageNet (classifiers), ADE20K (segmentors) or COCO (detectors) if the number of classes agrees;
        otherwise numbers.
      ema_decay: see ``load_pretrained``.
      **options: see ``from_trained`` of the module of the task. An option that is None or missing has the value stored in the
        export, or that of the evaluation in the work directory's configuration, or else the published value.

    Raises:
      UserError: the model cannot be loaded (see ``load_pretrained``), the number of class names is wrong, or an option is
        unknown or impossible.
    """
    options = {name: value for name, value in options.items() if value is not None}
    path = fetch_weights(path)
    model, variables = load_pretrained(path, ema_decay=ema_decay)
    modules = {DAT: classification, Segmentor: segmentation}
    module = modules.get(type(model), detection)
    return module.from_trained(path, model, variables, classes=classes, **options)
