"""Buckets of an evaluation, as tasks choose and check them."""

import pytest

from dat_jax.errors import UserError
from dat_jax.tasks.registry import make_task
from tests.helpers import tiny_config, tiny_detection, tiny_segmentation


@pytest.mark.parametrize("helper", [tiny_segmentation, tiny_detection])
def test_buckets_that_hold_no_image_are_refused_before_training(helper):
    config = helper.get_config().unlock()
    config.eval.buckets = "32x32"
    with pytest.raises(UserError, match=r"No bucket holds an image of \d+ x \d+ pixels. The buckets are 32x32"):
        make_task(config).check_data()


def test_arrays_of_an_evaluation_are_counted():
    task = make_task(tiny_segmentation.get_config())
    assert task.eval_buckets == [(64, 80)]
    assert sum(task.count_eval_arrays(task.eval_buckets).values()) == len(task.eval_source)
    assert len(task.count_eval_arrays(None)) > len(task.count_eval_arrays(task.eval_buckets)) == 1
    classifier = make_task(tiny_config.get_config())
    assert classifier.eval_buckets is None
    assert classifier.count_eval_arrays(None) == {(32, 32): 50}
