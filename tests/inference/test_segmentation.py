"""Segmentors as functions of images."""

import numpy as np
import pytest

from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.data import ade20k
from dat_jax.errors import UserError
from dat_jax.inference.segmentation import measure_shares
from tests.helpers.photographs import photographs
from tests.helpers.tiny_segmentation import random_segmentor


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "export"
    model, variables = random_segmentor()
    export_model(directory, model=model, variables=variables)
    return directory


def test_a_model_of_150_classes_has_the_names_of_ade20k(tmp_path):
    model, variables = random_segmentor(num_classes=150)
    export_model(tmp_path / "export", model=model, variables=variables)
    segmenter = inference.load(tmp_path / "export")
    assert segmenter.class_names == ade20k.CLASS_NAMES
    np.testing.assert_array_equal(segmenter.palette, ade20k.PALETTE)
    assert (segmenter.transform.scale, segmenter.transform.ratios) == ((2048, 512), (1.0,))


def test_segmentor_returns_labels_and_probabilities(export):
    segmenter = inference.load(export, long_side=64, short_side=64)
    labels, probabilities = segmenter(photographs(width=64, height=64)[3])
    assert (labels.dtype, labels.shape) == (np.uint8, (64, 64))
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (64, 64))
    assert ((probabilities >= 0.2 - 1e-6) & (probabilities <= 1)).all()
    assert segmenter.class_names == ("0", "1", "2", "3", "4")


def test_shares_of_classes_with_the_same_name_are_added_up():
    labels = np.array([[0, 1, 1, 1], [2, 2, 2, 2]], np.uint8)
    shares = measure_shares(labels, ["sky", "road", "sky", "tree"])
    assert list(shares.items()) == [("sky", 0.625), ("road", 0.375)]


def test_unknown_options_are_refused(export):
    with pytest.raises(UserError, match="Unknown option 'ratio' of a segmentor; the options are long_side"):
        inference.load(export, ratio=1.0)
