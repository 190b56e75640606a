"""What is reported about the data of a classifier before training."""

import numpy as np
import pytest

from dat_jax.data.sources import ArraySource, load_source
from dat_jax.errors import UserError
from dat_jax.tasks.classification.task import ClassificationTask
from tests.helpers import tiny_config
from tests.helpers.logs import collect_logs


def check(train_labels, eval_labels, names):
    sources = tuple(
        ArraySource(np.zeros((len(labels), 8, 8, 3), np.uint8), np.array(labels, np.int32), names)
        for labels in (train_labels, eval_labels)
    )
    with collect_logs() as messages:
        ClassificationTask(tiny_config.get_config(), sources=sources).check_data()
    return messages


def test_classes_without_images_are_named():
    assert check([0, 1, 2], [2, 1, 0], "abc") == []
    assert check([0, 2, 2], [0, 0], "abc") == [
        "1 of 3 classes have no training images: b.",
        "2 of 3 classes have no validation images: b, c.",
    ]


def test_a_single_class_is_reported():
    (message,) = check([0, 0], [0], ("a",))
    assert message.startswith("There is only one class, a: ")


def test_a_directory_with_an_impossible_name_is_one_sentence():
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        load_source("", split="train", directory="/" + "x" * 300)
