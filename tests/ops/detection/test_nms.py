"""Suppression: comparison with the sequential loop, recorded results of several classes, invalid boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops.detection import nms
from tests.helpers import golden_files


def overlap(a, b):
    """IoU of two boxes; NaN, which is not greater than anything, if neither has an area."""
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1)]
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    union = area_a + area_b - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union else float("nan")


def keep_sequentially(boxes, scores, threshold, valid=None):
    """The published loop: take the best remaining box, remove the boxes that overlap it."""
    keep = np.zeros(len(boxes), bool)
    remaining = [i for i in np.argsort(-scores, kind="stable") if valid is None or valid[i]]
    while remaining:
        best, *rest = remaining
        keep[best] = True
        remaining = [i for i in rest if not overlap(boxes[best], boxes[i]) > threshold]
    return keep


def random_sets(seed, sets, count):
    """Boxes with corners on a coarse grid, so that many are identical or have no area; scores with many ties.

    Overlaps are fractions of small integers; thresholds such as 0.35001 are never equal to one.
    """
    random = np.random.default_rng(seed)
    corners = np.sort(random.integers(0, 7, (sets, count, 2, 2)), axis=2).reshape(sets, count, 4)
    fine = np.sort(random.uniform(0, 6, (sets, count, 2, 2)), axis=2).reshape(sets, count, 4)
    boxes = np.where(random.random((sets, 1, 1)) < 0.6, corners, fine)
    scores = np.where(
        random.random((sets, 1)) < 0.6, random.integers(0, 5, (sets, count)) / 4, random.random((sets, count))
    )
    valid = random.random((sets, count)) < np.where(random.random((sets, 1)) < 0.5, 1, 0.7)
    return boxes, scores, valid


def test_ten_thousand_random_sets_equal_the_sequential_loop(x64):
    boxes, scores, valid = random_sets(0, 10_000, 12)
    thresholds = np.random.default_rng(1).integers(1, 10, 10_000) / 10 + 1.234e-5
    keep = jax.jit(jax.vmap(lambda b, s, t, v: nms.nms(b, s, threshold=t, valid=v)))(boxes, scores, thresholds, valid)
    expected = [keep_sequentially(*arguments) for arguments in zip(boxes, scores, thresholds, valid, strict=True)]
    np.testing.assert_array_equal(keep, expected)
    assert 0.2 < np.mean(expected) < 0.8


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_large_sets_equal_the_sequential_loop(x64, threshold):
    random = np.random.default_rng(2)
    centers = random.uniform(0, 300, (40, 2))[random.integers(0, 40, 700)] + random.normal(scale=6, size=(700, 2))
    sides = random.uniform(20, 60, (700, 2))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
    boxes[600:650] = boxes[:50]
    scores = np.round(random.random(700), 2)
    keep = jax.jit(lambda b, s: nms.nms(b, s, threshold=threshold))(boxes, scores)
    np.testing.assert_array_equal(keep, keep_sequentially(boxes, scores, threshold))


def test_long_chain_of_suppressions():
    index = np.arange(100, dtype=np.float32)  # each box overlaps only its neighbors by more than 0.55
    boxes = np.stack([index * 25, 0 * index, index * 25 + 100, 0 * index + 10], axis=1)
    np.testing.assert_array_equal(nms.nms(boxes, -index, threshold=0.55), index % 2 == 0)


def test_overlap_equal_to_the_threshold_is_kept():
    boxes = np.asarray([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)
    np.testing.assert_array_equal(nms.nms(boxes, boxes[:, 3], threshold=0.5), [True, True])
    np.testing.assert_array_equal(nms.nms(boxes, boxes[:, 3], threshold=0.499), [True, False])


def test_boxes_without_area_do_not_suppress_each_other():
    boxes = np.asarray([[1, 1, 1, 5], [1, 1, 1, 5], [2, 2, 2, 2], [0, 0, 9, 9]], np.float32)
    np.testing.assert_array_equal(nms.nms(boxes, np.ones(4, np.float32), threshold=0.1), [True] * 4)


def test_groups_are_independent():
    boxes = np.tile(np.asarray([[0, 0, 4, 4]], np.float32), (5, 1))
    scores, groups = np.asarray([0.1, 0.2, 0.3, 0.4, 0.4], np.float32), np.asarray([0, 1, 0, 1, 2])
    np.testing.assert_array_equal(
        nms.nms(boxes, scores, threshold=0.5, groups=groups), [False, False, True, True, True]
    )


def test_no_valid_boxes_and_no_boxes():
    boxes, scores = np.ones((3, 4), np.float32), np.ones(3, np.float32)
    assert not nms.nms(boxes, scores, threshold=0.5, valid=np.zeros(3, bool)).any()
    assert nms.nms(boxes[:0], scores[:0], threshold=0.5).shape == (0,)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_invalid_boxes_change_nothing(garbage):
    boxes, scores, valid = (x[:50] for x in random_sets(3, 100, 12))
    boxes, scores = boxes.astype(np.float32), scores.astype(np.float32)
    suppress = jax.jit(jax.vmap(lambda b, s, v: nms.nms(b, s, threshold=0.5001, valid=v)))
    corrupted = np.where(valid[..., None], boxes, np.float32(garbage)), np.where(valid, scores, np.float32(garbage))
    np.testing.assert_array_equal(suppress(*corrupted, valid), suppress(boxes, scores, valid))


def test_detections_have_no_gradient():
    boxes = np.asarray([[0, 0, 4, 4], [0, 0, 4, 3]], np.float32)

    def loss(boxes, scores):
        return sum(x.sum() for x in nms.multiclass_nms(boxes, scores, **OPTIONS)[:2])

    for gradient in jax.grad(loss, argnums=(0, 1))(boxes, np.full((2, 3), 0.5, np.float32)):
        np.testing.assert_array_equal(gradient, 0)


OPTIONS = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_detections": 4}


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden_files.DIRECTORY / "multiclass_nms.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("mode", ["max-1", "max100", "shared"])
def test_recorded_detections(recorded, threshold, mode):
    boxes, scores = recorded["boxes"], recorded["scores"][:, :-1]
    actual = jax.jit(
        lambda boxes, scores: nms.multiclass_nms(
            boxes,
            scores,
            score_threshold=float(recorded["score_thr"]),
            iou_threshold=threshold,
            max_detections=100 if mode == "max100" else 1000,
            candidates=200,
            chunk=2,
        )
    )(boxes[:, 0] if mode == "shared" else boxes, scores)
    expected = {key: recorded[f"thr{threshold}.{mode}.{key}"] for key in ("dets", "labels", "inds")}
    count = len(expected["labels"])
    np.testing.assert_array_equal(actual.valid, np.arange(len(actual.valid)) < count)
    np.testing.assert_array_equal(actual.labels[:count], expected["labels"])
    np.testing.assert_array_equal(actual.indices[:count] * 5 + actual.labels[:count], expected["inds"])
    np.testing.assert_allclose(actual.boxes[:count], expected["dets"][:, :4], rtol=1e-6)
    np.testing.assert_allclose(actual.scores[:count], expected["dets"][:, 4], rtol=1e-6)
    assert actual.complete
    assert not any(np.asarray(field[count:]).any() for field in actual[:5])


def crowded_boxes(count=60):
    """Many boxes of two classes with large overlaps, all above the score threshold."""
    boxes, _, _ = random_sets(4, 1, count)
    return boxes[0].astype(np.float32), np.random.default_rng(5).uniform(0.1, 1, (count, 2)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 7, 10, 60, 100])
def test_result_is_exact_if_complete_whatever_the_limit_of_candidates(limit):
    boxes, scores = crowded_boxes()
    options = OPTIONS | {"max_detections": 12}
    expected = nms.multiclass_nms(boxes, scores, candidates=60, **options)
    actual = nms.multiclass_nms(boxes, scores, candidates=limit, **options)
    assert expected.complete
    if actual.complete:
        for actual_array, expected_array in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(actual_array, expected_array)
    assert bool(actual.complete) == (limit >= 10)  # determined by experiment, so that both cases are tested
    unaffected = int(np.argmin(np.append(np.asarray(actual.scores) == expected.scores, False)))
    assert unaffected >= min(limit, 12)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_boxes_without_a_score_change_nothing(garbage):
    boxes, scores = crowded_boxes()
    masked = np.arange(60) % 3 == 0
    expected = nms.multiclass_nms(boxes[~masked], scores[~masked], **OPTIONS)
    for score in (0.0, np.nan, -np.inf):
        corrupted = np.where(masked[:, None], np.float32(garbage), boxes), np.where(masked[:, None], score, scores)
        actual = nms.multiclass_nms(corrupted[0], corrupted[1].astype(np.float32), **OPTIONS)
        np.testing.assert_array_equal(actual.boxes, expected.boxes)
        np.testing.assert_array_equal(actual.scores, expected.scores)
        np.testing.assert_array_equal(actual.indices, np.flatnonzero(~masked)[np.asarray(expected.indices)])


def test_ties_are_ordered_by_class_and_row_and_missing_detections_are_zero():
    boxes = np.asarray([[0, 0, 1, 1], [5, 5, 6, 6]], np.float32)
    scores = np.asarray([[0.5, 0.0], [0.5, 0.5]], np.float32)
    actual = nms.multiclass_nms(boxes, scores, **OPTIONS)
    np.testing.assert_array_equal(actual.labels, [0, 0, 1, 0])
    np.testing.assert_array_equal(actual.indices, [0, 1, 1, 0])
    np.testing.assert_array_equal(actual.valid, [True, True, True, False])
    assert not actual.boxes[3].any()


@pytest.mark.slow
def test_vmap_over_images():
    boxes, scores = crowded_boxes()
    batch = np.stack([boxes, boxes + 1]), np.stack([scores, scores[::-1]])
    actual = jax.vmap(lambda b, s: nms.multiclass_nms(b, s, **OPTIONS))(*batch)
    for image in (0, 1):
        expected = nms.multiclass_nms(batch[0][image], batch[1][image], **OPTIONS)
        for actual_array, expected_array in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(actual_array[image], expected_array)


def test_wrong_shapes_raise():
    with pytest.raises(ValueError, match="nms expected boxes"):
        nms.nms(jnp.zeros((3, 5)), jnp.zeros(3), threshold=0.5)
    with pytest.raises(ValueError, match="multiclass_nms expected boxes"):
        nms.multiclass_nms(jnp.zeros((3, 4)), jnp.zeros((2, 5)), **OPTIONS)
