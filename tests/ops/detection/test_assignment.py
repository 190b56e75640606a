"""Anchors, assignment and sampling: recorded arrays, the published loop, counts and probabilities."""

import jax
import numpy as np
import pytest

from dat_jax.ops.detection import anchors, assignment
from dat_jax.ops.detection.assignment import BACKGROUND, IGNORED, NOT_CONSIDERED
from tests.helpers import golden_files

STRIDES = {"rpn": (4, 8, 16, 32, 64), "retina": (8, 16, 32, 64, 128)}
SCALES = {"rpn": [8.0], "retina": [4 * 2 ** (i / 3) for i in range(3)]}
RULES = {
    "retina": {"positive": 0.5, "negative": 0.4, "min_positive": 0.0, "match_low_quality": True},
    "rpn": {"positive": 0.7, "negative": 0.3, "min_positive": 0.3, "match_low_quality": True},
    "rcnn": {"positive": 0.5, "negative": 0.5, "min_positive": 0.5, "match_low_quality": True},
}


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden_files.DIRECTORY / "boxes_losses.npz") as file:
        return {key: file[key] for key in file.files}


assign_max_iou = jax.jit(
    assignment.assign_max_iou, static_argnames=("positive", "negative", "min_positive", "match_low_quality")
)
sample_assigned = jax.jit(assignment.sample_assigned, static_argnames=("count", "positive_fraction"))


def assign(boxes, truths, rule, valid_boxes=None, valid_truths=None):
    options = {"valid_boxes": valid_boxes, "valid_ground_truths": valid_truths, **rule}
    return [np.asarray(x) for x in assign_max_iou(boxes, truths, **options)]


@pytest.mark.parametrize("name", ["rpn", "retina"])
def test_recorded_anchors_and_their_validity(recorded, name):
    shapes = [tuple(int(side) for side in shape) for shape in recorded[f"anchors_{name}.sizes"]]
    options = {"scales": SCALES[name], "ratios": [0.5, 1.0, 2.0]}
    for level, stride in enumerate(STRIDES[name]):
        base = anchors.base_anchors(stride, **options)
        np.testing.assert_array_max_ulp(base, recorded[f"anchors_{name}.base"][level], 1)
    levels = jax.jit(lambda: anchors.make_anchors(shapes, strides=STRIDES[name], **options))()
    per_position = recorded[f"anchors_{name}.base"].shape[1]
    validity = jax.jit(
        lambda pad_shape: anchors.anchor_validity(
            shapes, strides=STRIDES[name], per_position=per_position, pad_shape=pad_shape
        )
    )(np.asarray([33, 47]))
    for level in range(5):
        assert levels[level].dtype == np.float32
        np.testing.assert_allclose(levels[level], recorded[f"anchors_{name}.level{level}"], rtol=1e-7, atol=1e-5)
        np.testing.assert_array_equal(validity[level], recorded[f"anchors_{name}.valid{level}"])


def test_anchors_centered_at_the_edge_of_the_padded_image_are_invalid():
    (validity,) = anchors.anchor_validity([(3, 4)], strides=[8], per_position=2, pad_shape=(16, 24))
    expected = np.zeros((3, 4, 2), bool)
    expected[:2, :3] = True
    np.testing.assert_array_equal(validity, expected.ravel())


def test_inside_image_is_strict_on_the_right_and_below():
    boxes = np.asarray([[0, 0, 9, 9], [0, 0, 10, 9], [0, 0, 9, 8], [-1, 0, 5, 5], [0, -1, 5, 5]], np.float32)
    inside = jax.jit(lambda shape: anchors.inside_image(boxes, image_shape=shape))(np.asarray([9, 10]))
    np.testing.assert_array_equal(inside, [False, False, True, False, False])
    assert anchors.inside_image(boxes, image_shape=(9, 10), border=2).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["retina", "rpn", "rcnn"])
def test_recorded_assignments(x64, recorded, name, dtype):
    """Ties of anchors for the tiny ground-truth box depend on rounding, see the README of the recorded arrays."""
    boxes, truths = recorded["assign.anchors"].astype(dtype), recorded["assign.gts"].astype(dtype)
    codes, best = assign(boxes, truths, RULES[name])
    np.testing.assert_allclose(best, recorded["assign.overlaps64"].max(axis=0), rtol=1e-5, atol=1e-7)
    expected = recorded[f"assign.{name}.assigned"]
    near = np.isin(np.arange(len(codes)), recorded["assign.tiny_near_ties"])
    np.testing.assert_array_equal(codes[~near], expected[~near])
    if name == "retina":
        assert np.isin(codes[near], [expected[near].max(), expected[near].min()]).all()
        exact = recorded["assign.overlaps64"][0]
        assert (codes[exact == exact.max()] == 0).any()
        sides = boxes[:, 2:] - boxes[:, :2]
        square = near & (sides[:, 0] == sides[:, 1])
        assert square.any()
        assert (codes[square] == 0).all()
    else:
        np.testing.assert_array_equal(codes[near], expected[near])


def assign_by_loop(boxes, truths, rule):
    """The published assigner, written with loops."""
    overlaps = np.zeros((len(truths), len(boxes)))
    for i, truth in enumerate(truths):
        for j, box in enumerate(boxes):
            sides = np.maximum(np.minimum(truth[2:], box[2:]) - np.maximum(truth[:2], box[:2]), 0)
            whole = np.prod(truth[2:] - truth[:2]) + np.prod(box[2:] - box[:2]) - np.prod(sides)
            overlaps[i, j] = np.prod(sides) / max(whole, 1e-6)
    codes = np.full(len(boxes), IGNORED)
    best = overlaps.max(axis=0)
    codes[best < rule["negative"]] = BACKGROUND
    codes[best >= rule["positive"]] = overlaps.argmax(axis=0)[best >= rule["positive"]]
    if rule["match_low_quality"]:
        for i in range(len(truths)):
            if overlaps[i].max() >= rule["min_positive"]:
                codes[overlaps[i] == overlaps[i].max()] = i
    return codes, best


@pytest.mark.parametrize("name", ["retina", "rpn", "rcnn", "cascade"])
def test_assignments_equal_the_published_loop_with_many_ties(x64, name):
    rule = RULES.get(name, {"positive": 0.6, "negative": 0.6, "min_positive": 0.6, "match_low_quality": False})
    random = np.random.default_rng(0)
    codes_seen = set()
    for _ in range(20):
        boxes, truths = (
            np.concatenate([start := random.integers(0, 6, (n, 2)), start + random.integers(1, 6, (n, 2))], axis=1)
            * 1.0
            for n in (60, 7)
        )
        valid_boxes, valid_truths = random.random(60) < 0.8, random.random(7) < 0.7
        valid_truths[0] = True
        corrupted = np.where(valid_boxes[:, None], boxes, np.nan), np.where(valid_truths[:, None], truths, np.inf)
        codes, best = assign(*corrupted, rule, valid_boxes, valid_truths)
        expected, expected_best = assign_by_loop(boxes[valid_boxes], truths[valid_truths], rule)
        original = np.flatnonzero(valid_truths)
        np.testing.assert_array_equal(codes[valid_boxes], np.where(expected >= 0, original[expected], expected))
        np.testing.assert_allclose(best[valid_boxes], expected_best, rtol=1e-12)
        assert (codes[~valid_boxes] == NOT_CONSIDERED).all()
        assert (best[~valid_boxes] == -1).all()
        codes_seen |= set(np.minimum(codes, 0))
    assert {0, BACKGROUND} <= codes_seen
    assert (IGNORED in codes_seen) == (rule["negative"] < rule["positive"])


def test_later_ground_truths_overwrite_earlier_ones():
    box = np.asarray([[0, 0, 10, 10]], np.float32)
    truths = np.asarray([[0, 0, 10, 9], [0, 0, 10, 6], [0, 0, 10, 2]], np.float32)
    assert assign(box, truths, RULES["rpn"])[0] == 1  # the third is below min_positive
    assert assign(box, truths, RULES["retina"])[0] == 2


def test_without_ground_truth_all_boxes_are_background():
    boxes, nothing = np.ones((3, 4), np.float32), np.full((2, 4), np.nan, np.float32)
    for rule in (*RULES.values(), {"positive": 0.5, "negative": 0.0, "min_positive": 0.0, "match_low_quality": True}):
        codes, best = assign(boxes, nothing, rule, np.asarray([True, False, True]), np.zeros(2, bool))
        np.testing.assert_array_equal(codes, [BACKGROUND, NOT_CONSIDERED, BACKGROUND])
        np.testing.assert_array_equal(best, [0, -1, 0])


def test_overlaps_have_no_gradient():
    boxes = np.asarray([[0, 0, 4, 4], [1, 1, 5, 6]], np.float32)
    options = {"valid_boxes": None, "valid_ground_truths": None, **RULES["rpn"]}
    gradient = jax.grad(lambda b: assignment.assign_max_iou(b, boxes, **options)[1].sum())(boxes + 1)
    np.testing.assert_array_equal(gradient, 0)


def codes_of(positives, negatives, others=5, seed=0):
    """Codes of an assignment, shuffled."""
    codes = [*range(positives), *[BACKGROUND] * negatives, *[IGNORED, NOT_CONSIDERED] * others]
    return np.random.default_rng(seed).permutation(np.asarray(codes, np.int32))


@pytest.mark.parametrize("key", [None, 0, 1])
@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (3, 50, (3, 13)),
        (4, 50, (4, 12)),
        (30, 50, (4, 12)),
        (30, 5, (4, 5)),
        (2, 0, (2, 0)),
        (0, 3, (0, 3)),
        (0, 0, (0, 0)),
    ],
)
def test_number_of_sampled_boxes(key, positives, negatives, expected):
    codes = codes_of(positives, negatives)
    key = None if key is None else jax.random.key(key)
    sample = sample_assigned(key, codes, count=16, positive_fraction=0.27)
    num_positive, num_negative = expected
    place = np.arange(16)
    np.testing.assert_array_equal(sample.is_positive, place < num_positive)
    np.testing.assert_array_equal(sample.is_valid, place < num_positive + num_negative)
    indices = np.asarray(sample.indices)
    assert (codes[indices[:num_positive]] >= 0).all()
    assert (codes[indices[num_positive : sum(expected)]] == BACKGROUND).all()
    assert len(set(indices[: sum(expected)])) == sum(expected)
    assert not indices[sum(expected) :].any()
    if key is None:
        np.testing.assert_array_equal(indices[:num_positive], np.flatnonzero(codes >= 0)[:num_positive])
        negative = np.flatnonzero(codes == BACKGROUND)[:num_negative]
        np.testing.assert_array_equal(indices[num_positive : sum(expected)], negative)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (1.0, 4), (0.5, 2)])
def test_extreme_positive_fractions(fraction, expected):
    sample = assignment.sample_assigned(jax.random.key(0), codes_of(9, 9), count=4, positive_fraction=fraction)
    assert sample.is_positive.sum() == expected
    assert sample.is_valid.all()


def test_sample_larger_than_the_number_of_boxes():
    sample = assignment.sample_assigned(None, codes_of(2, 3), count=64, positive_fraction=0.5)
    assert (int(sample.is_positive.sum()), int(sample.is_valid.sum())) == (2, 5)


def test_every_box_is_equally_likely():
    """6000 keys: each of 12 positives is expected 2000 times, each of 20 negatives 1200 times, +-6 standard deviations."""
    codes = codes_of(12, 20)
    keys = jax.random.split(jax.random.key(7), 6000)
    sample = jax.jit(jax.vmap(lambda key: assignment.sample_assigned(key, codes, count=16, positive_fraction=0.25)))(
        keys
    )
    assert sample.is_valid.all()
    counts = np.bincount(np.asarray(sample.indices).ravel(), minlength=len(codes))
    for group, chance in ((codes >= 0, 4 / 12), (codes == BACKGROUND, 12 / 20)):
        assert np.abs(counts[group] - 6000 * chance).max() < 6 * np.sqrt(6000 * chance * (1 - chance))
    assert not counts[codes < BACKGROUND].any()
    first, second = np.flatnonzero(codes >= 0)[:2]  # sampled together as often as any two of twelve when four are drawn
    both = ((sample.indices == first).any(axis=1) & (sample.indices == second).any(axis=1)).mean()
    assert abs(both - 4 * 3 / (12 * 11)) < 0.025
