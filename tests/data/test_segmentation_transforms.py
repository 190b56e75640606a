"""Transforms for segmentation: against recorded inputs, against the recipe's arithmetic, and the statistics of the draws."""

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
    """A label map of squares."""
    cells = np.random.default_rng(seed).integers(classes, size=(side // size, side // size))
    return np.kron(cells, np.ones((size, size))).astype(np.uint8)


def test_the_views_are_those_of_the_published_test():
    golden = read("sem_fpn_mini")
    image = golden["ms.raw_bgr"][..., ::-1].copy()
    scale = tuple(golden["ms.img_scale"].tolist())
    wanted_views = [golden[f"ms.view{index}"].transpose(1, 2, 0) for index in range(3)]
    transform = make_segmentation_eval_transform(scale=scale, ratios=(0.5, 1.0, 1.5))
    label = np.zeros(image.shape[:2], np.uint8)
    views = transform({"image": image, "label": label})
    assert set(views) == {"view_0", "view_1", "view_2", "label", "size"}
    assert transform.view_shapes(*label.shape) == tuple(wanted.shape[:2] for wanted in wanted_views)
    for index, wanted in enumerate(wanted_views):
        view = views[f"view_{index}"]
        assert view.dtype == np.uint8
        np.testing.assert_array_equal(view, wanted)
    assert views["label"] is label
    assert views["size"].tolist() == [90, 120]
    assert views["size"].dtype == np.int32


@pytest.mark.parametrize(
    ("size", "scale", "wanted"),
    [
        ((512, 683), (2048, 512), (512, 683)),  # 512 / 512
        ((427, 640), (2048, 512), (512, 767)),  # 640 * 512 / 427 = 767.4
        ((100, 1000), (2048, 512), (205, 2048)),  # the long side binds
        ((1000, 100), (512, 2048), (2048, 205)),
        ((3, 2), (5, 5), (5, 3)),  # 2 * 5 / 3 = 3.33
        ((2, 4), (5, 5), (3, 5)),  # 2.5 goes up
        ((1, 10000), (2048, 512), (1, 2048)),
    ],
)
def test_an_image_fits_into_a_scale(size, scale, wanted):
    assert fit_size(*size, scale=scale) == wanted


def test_resizing_is_that_of_opencv():
    image = photographs(width=50, height=40)[0]
    label = blocks(48, classes=5, size=1)
    assert resize_image(image, height=20, width=33).shape == (20, 33, 3)
    rows, columns = (np.floor(np.arange(count) * 48 / count).astype(int) for count in (64, 30))
    np.testing.assert_array_equal(resize_label(label, height=64, width=30), label[np.ix_(rows, columns)])
    # Not antialiased: a third of the size takes the middle of every three pixels.
    third = resize_image(image[:39, :48], height=13, width=16)
    np.testing.assert_array_equal(third, image[1:39:3, 1:48:3])


def test_scales_have_one_uniform_ratio():
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


def test_crops_are_uniform_over_the_places_that_fit():
    rng = np.random.default_rng(1)
    label = np.zeros((40, 51), np.uint8)
    places = np.array([draw_crop(label, rng, crop_size=32, max_class_ratio=1.0) for _ in range(DRAWS)])
    for axis, count in ((0, 9), (1, 20)):
        counts = np.bincount(places[:, axis], minlength=count)
        assert len(counts) == count
        # Chi squared has a mean of count - 1 and a variance of twice that.
        assert ((counts - DRAWS / count) ** 2 / (DRAWS / count)).sum() < count - 1 + 4 * np.sqrt(2 * (count - 1))
    assert abs(np.corrcoef(places.T)[0, 1]) < 4 / np.sqrt(DRAWS)
    assert draw_crop(label, rng, crop_size=64, max_class_ratio=1.0) == (0, 0)
    y, x = draw_crop(label, rng, crop_size=45, max_class_ratio=1.0)
    assert y == 0
    assert 0 <= x <= 6


class Counter:
    """A generator that counts its draws."""

    def __init__(self, seed):
        self.rng, self.drawn = np.random.default_rng(seed), []

    def integers(self, *arguments):
        self.drawn.append(int(self.rng.integers(*arguments)))
        return self.drawn[-1]


def test_a_crop_has_two_classes_and_none_that_fills_it():
    label = np.zeros((128, 128), np.uint8)
    label[:, 64:] = 1
    label[:20] = 255
    tries = collections.Counter()
    for seed in range(DRAWS):
        rng = Counter(seed)
        y, x = draw_crop(label, rng, crop_size=48, max_class_ratio=0.75)
        tries[len(rng.drawn) // 2] += 1
        assert rng.drawn[-2:] == [y, x]
        accepted = len(rng.drawn) < 22
        values = [label[a : a + 48, b : b + 48] for a, b in zip(rng.drawn[::2], rng.drawn[1::2], strict=True)]
        shares = [np.bincount(value[value < 255], minlength=2) for value in values]
        kept = [share.min() > 0 and share.max() / share.sum() < 0.75 for share in shares]
        assert not any(kept[:-1][:10])
        assert kept[-1] or not accepted
    assert tries[1] > tries[2] > tries[3] > 0
    # The first of 81 columns is kept where the border lies within the inner half of the crop.
    share = np.mean([0.25 < (64 - x) / 48 < 0.75 for x in range(81)])
    assert abs(tries[1] / DRAWS - share) < 4 * np.sqrt(share * (1 - share) / DRAWS)


@pytest.mark.parametrize("value", [0, 255])
def test_a_crop_that_cannot_obey_ends_after_ten_redraws(value):
    label = np.full((128, 128), value, np.uint8)
    rng = Counter(0)
    place = draw_crop(label, rng, crop_size=48, max_class_ratio=0.75)
    assert len(rng.drawn) == 22
    assert list(place) == rng.drawn[-2:]
    rng = Counter(0)
    assert list(draw_crop(label, rng, crop_size=48, max_class_ratio=1.0)) == rng.drawn
    assert len(rng.drawn) == 2


def test_three_quarters_are_too_many():
    label = np.array([[0, 0, 0, 1]], np.uint8)
    assert not is_varied(label, 0.75)
    assert is_varied(label, 0.76)
    assert is_varied(np.array([[0, 0, 1, 255, 255]], np.uint8), 0.75)  # 2/3 of those that count
    assert not is_varied(np.array([[7, 255, 255]], np.uint8), 0.75)
    assert not is_varied(np.array([[255]], np.uint8), 0.75)


def test_every_step_of_the_distortion_has_its_chances():
    rng = np.random.default_rng(2)
    drawn = [draw_distortion(rng) for _ in range(DRAWS)]
    present = {name: np.array([getattr(d, name) is not None for d in drawn]) for name in Distortion._fields[:4]}
    present["contrast_first"] = np.array([d.contrast_first for d in drawn])
    for name, values in present.items():
        assert abs(values.mean() - 0.5) < HALF, name
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5)):
        values = np.array([getattr(d, name) for d in drawn if getattr(d, name) is not None])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert sigmas(values, mean=(low + high) / 2, std=(high - low) / np.sqrt(12)) < 4
    hues = [d.hue for d in drawn if d.hue is not None]
    assert set(hues) == set(range(-18, 18))
    assert sigmas(hues, mean=-0.5, std=np.sqrt((36**2 - 1) / 12)) < 4
    pairs = np.corrcoef(np.stack(list(present.values())).astype(float))
    assert np.abs(pairs - np.eye(5)).max() < 4 / np.sqrt(DRAWS)


def distort_as_published(image, distortion):
    """Step by step as the recipe says it, in BGR and in float32, for comparison."""

    def cut(values):
        return np.clip(values, 0, 255).astype(np.uint8)

    image = image[..., ::-1].copy()
    steps = ["brightness", "saturation", "hue"]
    steps.insert(1 if distortion.contrast_first else 3, "contrast")
    for step in steps:
        amount = getattr(distortion, step)
        if amount is None:
            continue
        if step == "brightness":
            image = cut(image.astype(np.float32) + amount)
        elif step == "contrast":
            image = cut(image.astype(np.float32) * amount)
        else:
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            if step == "saturation":
                hsv[..., 1] = cut(hsv[..., 1].astype(np.float32) * amount)
            else:
                hsv[..., 0] = (hsv[..., 0].astype(int) + amount) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    return image[..., ::-1]


def test_the_distortion_is_the_published_one():
    rng = np.random.default_rng(3)
    images = photographs(width=60, height=40)
    for index in range(200):
        image, drawn = images[index % 20], draw_distortion(rng)
        before = image.copy()
        result = apply_distortion(image, drawn)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, distort_as_published(image, drawn))
        np.testing.assert_array_equal(image, before)
    drawn = draw_distortion(np.random.default_rng(5))
    result = distort_photometrically(images[0], np.random.default_rng(5))
    np.testing.assert_array_equal(result, apply_distortion(images[0], drawn))
    assert distort_photometrically(images[0], np.random.default_rng(5)).shape == images[0].shape
    nothing = Distortion(None, None, None, None, contrast_first=True)
    np.testing.assert_array_equal(apply_distortion(images[0], nothing), images[0])


def test_values_are_truncated_between_the_steps():
    image = np.full((1, 1, 3), 101, np.uint8)
    assert apply_distortion(image, Distortion(0.9, None, None, None, True)).max() == 101
    assert apply_distortion(image, Distortion(-200.0, 1.5, None, None, True)).max() == 0
    assert apply_distortion(image, Distortion(0.9, 1.5, None, None, True)).max() == 151  # not 101.9 * 1.5 = 152.9
    assert apply_distortion(image, Distortion(200.0, 0.5, None, None, False)).max() == 127


def record(height=90, width=130, *, damaged=None):
    """An image that shows its label: class k is the grey k * 20 in blocks, so pairs can be checked after any transform."""
    label = blocks(160, classes=6)[:height, :width]
    image = np.repeat((label * 20)[..., None], 3, axis=-1)
    return {"image": image, "label": label} | ({} if damaged is None else {"damaged": np.int32(damaged)})


def test_flips_mirror_image_and_label_together():
    options = dict(scale=(130, 90), min_ratio=1.0, max_ratio=1.0, crop_size=130, max_class_ratio=1.0, distort=False)
    image = photographs(width=130, height=90)[3]
    example = record() | {"image": image}
    results = [
        make_segmentation_train_transform(**options, flip_probability=p)(example, np.random.default_rng(0))
        for p in (0, 1)
    ]
    for result, turn in zip(results, (1, -1), strict=True):
        assert result["valid"].tolist() == [90, 130]
        assert result["valid"].dtype == np.int32
        np.testing.assert_array_equal(result["image"][:90], image[:, ::turn])
        np.testing.assert_array_equal(result["label"][:90], example["label"][:, ::turn])
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


def test_image_and_label_stay_together_through_resize_crop_and_flip():
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
        # Bilinear and nearest differ next to the borders of the blocks only.
        kernel = np.ones((5, 5), np.uint8)
        flat = cv2.dilate(inside, kernel) == cv2.erode(inside, kernel)
        flat[[0, 1, -2, -1]] = flat[:, [0, 1, -2, -1]] = False  # what lies beyond the crop is not seen
        assert flat.mean() > 0.2
        np.testing.assert_array_equal(
            result["image"][:height, :width][flat], np.repeat(inside[flat][:, None] * 20, 3, 1)
        )
    assert (96, 96) in valid
    assert min(height for height, _ in valid) < 60
    assert "damaged" not in transform(record(), np.random.default_rng(0))


def test_what_is_drawn_depends_on_the_generator_only():
    transform = make_segmentation_train_transform(scale=(130, 90), crop_size=64)
    example = record() | {"image": photographs(width=130, height=90)[0]}
    first, second, other = (transform(example, np.random.default_rng(seed)) for seed in (7, 7, 8))
    for name in ("image", "label", "valid"):
        np.testing.assert_array_equal(first[name], second[name])
    assert (first["image"] != other["image"]).any()


def test_padding_is_at_the_bottom_and_at_the_right():
    padded = pad(np.ones((2, 3), np.uint8), height=4, width=3, value=9)
    assert padded.tolist() == [[1, 1, 1], [1, 1, 1], [9, 9, 9], [9, 9, 9]]
