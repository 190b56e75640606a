"""Transforms for segmentation: recorded inputs, the arithmetic of the recipe, and distributions of the draws."""

import collections

import cv2
import numpy as np
import pytest

from dat_jax.data.segmentation_transforms import (
    Distortion,
    apply_distortion,
    distort_photometrically,
    draw_crop,
    draw_distortion,
    draw_scale,
    fit_size,
    is_varied,
    make_segmentation_eval_transform,
    make_segmentation_train_transform,
    pad,
    resize_image,
    resize_label,
)
from tests.helpers.golden_files import read
from tests.helpers.photographs import photographs

DRAWS = 2000
HALF = 4 * np.sqrt(0.25 / DRAWS)  # four standard errors of a probability of 1/2


def sigmas(values, *, mean, std):
    return abs(np.mean(values) - mean) / (std / np.sqrt(len(values)))


def blocks(side, *, classes, size=16, seed=0):
    """Return a label map of random squares."""
    cells = np.random.default_rng(seed).integers(classes, size=(side // size, side // size))
    return np.kron(cells, np.ones((size, size))).astype(np.uint8)


def test_views_equal_those_of_the_published_evaluation():
    golden = read("sem_fpn_mini")
    image = golden["ms.raw_bgr"][..., ::-1].copy()
    scale = tuple(golden["ms.img_scale"].tolist())
    expected_views = [golden[f"ms.view{index}"].transpose(1, 2, 0) for index in range(3)]
    transform = make_segmentation_eval_transform(scale=scale, ratios=(0.5, 1.0, 1.5))
    label = np.zeros(image.shape[:2], np.uint8)
    views = transform({"image": image, "label": label})
    assert set(views) == {"view_0", "view_1", "view_2", "label", "size"}
    assert transform.view_shapes(*label.shape) == tuple(expected.shape[:2] for expected in expected_views)
    for index, expected in enumerate(expected_views):
        view = views[f"view_{index}"]
        assert view.dtype == np.uint8
        np.testing.assert_array_equal(view, expected)
    assert views["label"] is label
    assert views["size"].tolist() == [90, 120]
    assert views["size"].dtype == np.int32


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),  # 512 / 512
        ((427, 640), (2048, 512), (512, 767)),  # 640 * 512 / 427 = 767.4
        ((100, 1000), (2048, 512), (205, 2048)),  # limited by the long side
        ((1000, 100), (512, 2048), (2048, 205)),
        ((3, 2), (5, 5), (5, 3)),  # 2 * 5 / 3 = 3.33
        ((2, 4), (5, 5), (3, 5)),  # 2.5 is rounded up
        ((1, 10000), (2048, 512), (1, 2048)),
    ],
)
def test_sizes_fit_into_a_scale(size, scale, expected):
    assert fit_size(*size, scale=scale) == expected


def test_resizing_equals_opencv_without_antialiasing():
    image = photographs(width=50, height=40)[0]
    label = blocks(48, classes=5, size=1)
    assert resize_image(image, height=20, width=33).shape == (20, 33, 3)
    rows, columns = (np.floor(np.arange(count) * 48 / count).astype(int) for count in (64, 30))
    np.testing.assert_array_equal(resize_label(label, height=64, width=30), label[np.ix_(rows, columns)])
    # Without antialiasing, a third of the size takes the middle one of every three pixels.
    third = resize_image(image[:39, :48], height=13, width=16)
    np.testing.assert_array_equal(third, image[1:39:3, 1:48:3])


def test_scales_are_multiplied_by_a_uniform_ratio():
    rng = np.random.default_rng(0)
    scales = np.array([draw_scale(rng, scale=(2048, 512), min_ratio=0.5, max_ratio=2.0) for _ in range(DRAWS)])
    ratios = (scales[:, 0] + 0.5) / 2048
    assert (scales[:, 1] == scales[:, 0] // 4).all()
    assert scales[:, 0].min() >= 1024
    assert scales[:, 0].max() < 4096
    assert sigmas(ratios, mean=1.25, std=1.5 / np.sqrt(12)) < 4
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        error = 4 * 1.5 * np.sqrt(level * (1 - level) / DRAWS)
        assert abs(np.quantile(ratios, level) - (0.5 + 1.5 * level)) < error


def test_crops_are_uniform_over_all_positions():
    rng = np.random.default_rng(1)
    label = np.zeros((40, 51), np.uint8)
    positions = np.array([draw_crop(label, rng, crop_size=32, max_class_ratio=1.0) for _ in range(DRAWS)])
    for axis, count in ((0, 9), (1, 20)):
        counts = np.bincount(positions[:, axis], minlength=count)
        assert len(counts) == count
        # Chi squared has a mean of count - 1 and a variance of twice that.
        assert ((counts - DRAWS / count) ** 2 / (DRAWS / count)).sum() < count - 1 + 4 * np.sqrt(2 * (count - 1))
    assert abs(np.corrcoef(positions.T)[0, 1]) < 4 / np.sqrt(DRAWS)
    assert draw_crop(label, rng, crop_size=64, max_class_ratio=1.0) == (0, 0)
    y, x = draw_crop(label, rng, crop_size=45, max_class_ratio=1.0)
    assert y == 0
    assert 0 <= x <= 6


class RecordingGenerator:
    """A generator that records its draws."""

    def __init__(self, seed):
        self.rng, self.drawn = np.random.default_rng(seed), []

    def integers(self, *arguments):
        self.drawn.append(int(self.rng.integers(*arguments)))
        return self.drawn[-1]


def test_accepted_crops_have_two_classes_and_none_dominates():
    label = np.zeros((128, 128), np.uint8)
    label[:, 64:] = 1
    label[:20] = 255
    tries = collections.Counter()
    for seed in range(DRAWS):
        rng = RecordingGenerator(seed)
        y, x = draw_crop(label, rng, crop_size=48, max_class_ratio=0.75)
        tries[len(rng.drawn) // 2] += 1
        assert rng.drawn[-2:] == [y, x]
        accepted = len(rng.drawn) < 22
        values = [label[a : a + 48, b : b + 48] for a, b in zip(rng.drawn[::2], rng.drawn[1::2], strict=True)]
        shares = [np.bincount(value[value < 255], minlength=2) for value in values]
        accepted_crops = [share.min() > 0 and share.max() / share.sum() < 0.75 for share in shares]
        assert not any(accepted_crops[:-1][:10])
        assert accepted_crops[-1] or not accepted
    assert tries[1] > tries[2] > tries[3] > 0
    # The first crop is accepted if the border between the classes is in its inner half; there are 81 columns.
    share = np.mean([0.25 < (64 - x) / 48 < 0.75 for x in range(81)])
    assert abs(tries[1] / DRAWS - share) < 4 * np.sqrt(share * (1 - share) / DRAWS)


@pytest.mark.parametrize("value", [0, 255])
def test_a_crop_is_accepted_after_ten_rejected_ones(value):
    label = np.full((128, 128), value, np.uint8)
    rng = RecordingGenerator(0)
    position = draw_crop(label, rng, crop_size=48, max_class_ratio=0.75)
    assert len(rng.drawn) == 22
    assert list(position) == rng.drawn[-2:]
    rng = RecordingGenerator(0)
    assert list(draw_crop(label, rng, crop_size=48, max_class_ratio=1.0)) == rng.drawn
    assert len(rng.drawn) == 2


def test_the_largest_class_must_be_below_the_maximum_ratio():
    label = np.array([[0, 0, 0, 1]], np.uint8)
    assert not is_varied(label, 0.75)
    assert is_varied(label, 0.76)
    assert is_varied(np.array([[0, 0, 1, 255, 255]], np.uint8), 0.75)  # 2/3 of the counted pixels
    assert not is_varied(np.array([[7, 255, 255]], np.uint8), 0.75)
    assert not is_varied(np.array([[255]], np.uint8), 0.75)


def test_distortion_steps_have_the_published_distributions():
    rng = np.random.default_rng(2)
    distortions = [draw_distortion(rng) for _ in range(DRAWS)]
    present = {name: np.array([getattr(d, name) is not None for d in distortions]) for name in Distortion._fields[:4]}
    present["contrast_first"] = np.array([d.contrast_first for d in distortions])
    for name, values in present.items():
        assert abs(values.mean() - 0.5) < HALF, name
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5)):
        values = np.array([getattr(d, name) for d in distortions if getattr(d, name) is not None])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert sigmas(values, mean=(low + high) / 2, std=(high - low) / np.sqrt(12)) < 4
    hues = [d.hue for d in distortions if d.hue is not None]
    assert set(hues) == set(range(-18, 18))
    assert sigmas(hues, mean=-0.5, std=np.sqrt((36**2 - 1) / 12)) < 4
    pairs = np.corrcoef(np.stack(list(present.values())).astype(float))
    assert np.abs(pairs - np.eye(5)).max() < 4 / np.sqrt(DRAWS)


def distort_as_published(image, distortion):
    """Reference that applies each step in BGR and float32, as published."""

    def to_uint8(values):
        return np.clip(values, 0, 255).astype(np.uint8)

    image = image[..., ::-1].copy()
    steps = ["brightness", "saturation", "hue"]
    steps.insert(1 if distortion.contrast_first else 3, "contrast")
    for step in steps:
        amount = getattr(distortion, step)
        if amount is None:
            continue
        if step == "brightness":
            image = to_uint8(image.astype(np.float32) + amount)
        elif step == "contrast":
            image = to_uint8(image.astype(np.float32) * amount)
        else:
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            if step == "saturation":
                hsv[..., 1] = to_uint8(hsv[..., 1].astype(np.float32) * amount)
            else:
                hsv[..., 0] = (hsv[..., 0].astype(int) + amount) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    return image[..., ::-1]


def test_distortions_equal_the_published_steps():
    rng = np.random.default_rng(3)
    images = photographs(width=60, height=40)
    for index in range(200):
        image, distortion = images[index % 20], draw_distortion(rng)
        before = image.copy()
        result = apply_distortion(image, distortion)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, distort_as_published(image, distortion))
        np.testing.assert_array_equal(image, before)
    distortion = draw_distortion(np.random.default_rng(5))
    result = distort_photometrically(images[0], np.random.default_rng(5))
    np.testing.assert_array_equal(result, apply_distortion(images[0], distortion))
    assert distort_photometrically(images[0], np.random.default_rng(5)).shape == images[0].shape
    identity = Distortion(None, None, None, None, contrast_first=True)
    np.testing.assert_array_equal(apply_distortion(images[0], identity), images[0])


def test_values_are_truncated_after_every_step():
    image = np.full((1, 1, 3), 101, np.uint8)
    assert apply_distortion(image, Distortion(0.9, None, None, None, True)).max() == 101
    assert apply_distortion(image, Distortion(-200.0, 1.5, None, None, True)).max() == 0
    assert apply_distortion(image, Distortion(0.9, 1.5, None, None, True)).max() == 151  # not 101.9 * 1.5 = 152.9
    assert apply_distortion(image, Distortion(200.0, 0.5, None, None, False)).max() == 127


def record(height=90, width=130, *, damaged=None):
    """An example whose image has the gray value 20 k for class k, so that image and label can be compared."""
    label = blocks(160, classes=6)[:height, :width]
    image = np.repeat((label * 20)[..., None], 3, axis=-1)
    return {"image": image, "label": label} | ({} if damaged is None else {"damaged": np.int32(damaged)})


def test_image_and_label_are_flipped_together():
    options = dict(scale=(130, 90), min_ratio=1.0, max_ratio=1.0, crop_size=130, max_class_ratio=1.0, distort=False)
    image = photographs(width=130, height=90)[3]
    example = record() | {"image": image}
    results = [
        make_segmentation_train_transform(**options, flip_probability=p)(example, np.random.default_rng(0))
        for p in (0, 1)
    ]
    for result, direction in zip(results, (1, -1), strict=True):
        assert result["valid"].tolist() == [90, 130]
        assert result["valid"].dtype == np.int32
        np.testing.assert_array_equal(result["image"][:90], image[:, ::direction])
        np.testing.assert_array_equal(result["label"][:90], example["label"][:, ::direction])
        assert (result["image"][90:] == 0).all()
        assert (result["label"][90:] == 255).all()


def test_half_of_the_examples_are_flipped():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 0] = 255
    example = {"image": image, "label": np.zeros((8, 8), np.uint8)}
    transform = make_segmentation_train_transform(
        scale=(8, 8), min_ratio=1, max_ratio=1, crop_size=8, max_class_ratio=1, distort=False
    )
    rng = np.random.default_rng(4)
    flipped = [transform(example, rng)["image"][0, -1, 0] == 255 for _ in range(DRAWS)]
    assert abs(np.mean(flipped) - 0.5) < HALF


def test_image_and_label_are_resized_cropped_and_flipped_together():
    transform = make_segmentation_train_transform(scale=(130, 90), crop_size=96, distort=False)
    example = record(damaged=2)
    valid = set()
    for seed in range(60):
        result = transform(example, np.random.default_rng(seed))
        assert set(result) == {"image", "label", "valid", "damaged"}
        assert result["damaged"] == 2
        assert result["image"].shape == (96, 96, 3)
        assert result["label"].shape == (96, 96)
        assert result["image"].dtype == result["label"].dtype == np.uint8
        height, width = result["valid"].tolist()
        valid.add((height, width))
        outside = np.ones((96, 96), bool)
        outside[:height, :width] = False
        assert (result["label"][outside] == 255).all()
        assert (result["image"][outside] == 0).all()
        inside = result["label"][:height, :width]
        assert inside.max() < 6
        # Bilinear and nearest interpolation differ only near the borders of the blocks.
        kernel = np.ones((5, 5), np.uint8)
        flat = cv2.dilate(inside, kernel) == cv2.erode(inside, kernel)
        flat[[0, 1, -2, -1]] = flat[:, [0, 1, -2, -1]] = False  # borders just outside the crop are unknown
        assert flat.mean() > 0.2
        np.testing.assert_array_equal(
            result["image"][:height, :width][flat], np.repeat(inside[flat][:, None] * 20, 3, 1)
        )
    assert (96, 96) in valid
    assert min(height for height, _ in valid) < 60
    assert "damaged" not in transform(record(), np.random.default_rng(0))


def test_results_depend_only_on_the_generator():
    transform = make_segmentation_train_transform(scale=(130, 90), crop_size=64)
    example = record() | {"image": photographs(width=130, height=90)[0]}
    first, second, other = (transform(example, np.random.default_rng(seed)) for seed in (7, 7, 8))
    for name in ("image", "label", "valid"):
        np.testing.assert_array_equal(first[name], second[name])
    assert (first["image"] != other["image"]).any()


def test_padding_is_at_the_bottom_and_the_right():
    padded = pad(np.ones((2, 3), np.uint8), height=4, width=3, value=9)
    assert padded.tolist() == [[1, 1, 1], [1, 1, 1], [9, 9, 9], [9, 9, 9]]
