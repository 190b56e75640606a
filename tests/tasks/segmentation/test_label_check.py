"""Label maps are checked before training."""

import numpy as np
import pytest

from dat_jax.errors import UserError
from dat_jax.tasks.segmentation.label_check import check_labels, count_pixels
from tests.helpers.logs import collect_logs

NAMES = ("ground", "object", "other")


class Labels:
    """A source with label maps in memory."""

    def __init__(self, maps, names=NAMES):
        self.maps, self.class_names = maps, names

    def __len__(self):
        return len(self.maps)

    def read_label(self, index):
        return self.maps[index]

    def is_turned(self, index):
        return False


def make_map(*values):
    return np.array([values], np.uint8)


def test_maps_with_every_class_say_nothing():
    with collect_logs() as messages:
        check_labels(Labels([make_map(0, 1), make_map(2, 255)]), split="training")
    assert messages == []


def test_one_class_and_255_is_refused_with_the_setting_that_helps():
    source = Labels([make_map(0, 0, 0, 255)] * 4, names=("ground", "object"))
    with pytest.raises(UserError, match=r"Only the class ground .* object never.* 25.0 % .*label_values=0,255"):
        check_labels(source, split="training")
    with collect_logs() as messages:
        check_labels(source, split="validation")
    assert "1 of 2 classes do not occur in the 4 validation label maps: object" in messages[0]


def test_maps_without_any_class_are_refused():
    with pytest.raises(UserError, match="No pixel of the 2 training label maps has a class"):
        check_labels(Labels([make_map(255, 255)] * 2), split="training")


def test_few_labeled_pixels_are_a_warning():
    source = Labels([make_map(*([255] * 997), 0, 1, 2)])
    with collect_logs() as messages:
        check_labels(source, split="training")
    assert "Only 0.3 % of the pixels" in messages[0]


def test_large_sources_are_sampled():
    """A class that is missing among the maps that were read may occur in others."""
    source = Labels([make_map(0, 1)] * 2000)
    with collect_logs() as messages:
        check_labels(source, split="training")
    assert messages == []
    assert count_pixels(source, [0, 1])[:3].tolist() == [2, 2, 0]
