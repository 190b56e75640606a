"""Segmentors and detectors predict images of any size with few programs, and with the results of each image alone."""

import numpy as np
import pytest

from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform
from dat_jax.errors import UserError
from dat_jax.inference.shapes import ArrayShapes
from tests.helpers import tiny_detection, tiny_segmentation
from tests.helpers.photographs import photographs
from tests.helpers.tiers import slow

SIZES = [(60, 80), (61, 85), (80, 60), (64, 70)]


def compiled_programs(function):
    """Number of programs that a jitted function has compiled."""
    return function._cache_size()


def test_arrays_are_planned_for_known_sizes_and_have_the_sides_of_a_ladder_for_others():
    transform = make_segmentation_eval_transform(scale=(256, 64), ratios=(1.0, 0.5))
    shapes = ArrayShapes().plan(transform, [(64, 80), (64, 82), (82, 64)])
    assert shapes.choose(transform, (64, 80)) == ((64, 82), (32, 41))
    assert shapes.choose(transform, (64, 82)) is None  # it fills its array
    assert shapes.choose(transform, (82, 64)) is None
    assert shapes.choose(transform, (64, 200)) == ((64, 224), (32, 128))
    assert ArrayShapes("exact").plan(transform, [(64, 80)]).choose(transform, (64, 80)) is None
    given = ArrayShapes("96x96,32x64").plan(transform, [(64, 80)])
    assert given.choose(transform, (64, 80)) == ((96, 96), (32, 64))
    with pytest.raises(UserError, match="No bucket holds an image of 64 x 128 pixels"):
        given.choose(transform, (64, 128))


@pytest.mark.parametrize(
    "sizes", [[(0, 64)], [(64,)], [(64, 64, 3)], [(64.5, 64)], [(True, 64)], ["64x64"], (64, 64), "64x64", 5, None]
)
def test_sizes_that_are_none_are_refused(sizes):
    transform = make_segmentation_eval_transform(scale=(256, 64))
    with pytest.raises(UserError, match=r"Expected \(height, width\) of each image, whole numbers of at least 1, got"):
        ArrayShapes().plan(transform, sizes)


def test_sizes_may_be_arrays_or_lists():
    transform = make_segmentation_eval_transform(scale=(256, 64))
    expected = ArrayShapes().plan(transform, [(64, 80), (64, 82)])
    for sizes in (np.array([[64, 80], [64, 82]]), [[64, 80], [64, 82]], iter([(64, 80), (64, 82)])):
        assert ArrayShapes().plan(transform, sizes) == expected


@pytest.mark.slow
@pytest.mark.parametrize("image_sizes", [SIZES[:2], slow(SIZES)])
def test_a_segmentor_gives_the_labels_of_each_image_alone(tmp_path, image_sizes):
    model, variables = tiny_segmentation.random_segmentor()
    export_model(tmp_path / "export", model=model, variables=variables)
    options = dict(long_side=128, short_side=48)
    alone = inference.load(tmp_path / "export", buckets="exact", **options)
    planned = inference.load(tmp_path / "export", **options).plan(image_sizes)
    chosen = {planned.arrays.choose(planned.transform, size) for size in image_sizes}
    assert len(chosen - {None}) < len(image_sizes)
    for height, width in image_sizes:
        image = photographs(width=width, height=height)[0]
        labels, probabilities = alone(image)
        actual_labels, actual = planned(image)
        np.testing.assert_allclose(actual, probabilities, atol=5e-4)
        assert (actual_labels == labels).mean() > 0.999
    with pytest.raises(UserError, match=r"buckets: expected heights and widths such as .*, got '64'"):
        inference.load(tmp_path / "export", buckets="64", **options)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_a_detector_gives_the_objects_of_each_image_alone(tmp_path, head):
    model, variables = tiny_detection.random_detector(head)
    export_model(tmp_path / "export", model=model, variables=variables)
    options = dict(long_side=128, short_side=48, max_detections=5, score_threshold=0.001)
    alone = inference.load(tmp_path / "export", buckets="exact", **options)
    planned = inference.load(tmp_path / "export", **options).plan(SIZES)
    larger = inference.load(tmp_path / "export", buckets="128x160", **options)  # than any padded image
    for height, width in SIZES:
        image = photographs(width=width, height=height)[0]
        expected = alone(image)
        assert len(expected["scores"]) == 5
        for actual in (planned(image), larger(image)):
            np.testing.assert_array_equal(actual["labels"], expected["labels"])
            np.testing.assert_allclose(actual["scores"], expected["scores"], atol=1e-5)
            np.testing.assert_allclose(actual["boxes"], expected["boxes"], atol=1e-2)
    assert compiled_programs(larger.predict) == 1
    shapes = {planned.transform.view_shapes(*size) for size in SIZES}
    assert compiled_programs(planned.predict) <= compiled_programs(alone.predict) == len(shapes)
