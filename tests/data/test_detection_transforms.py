"""Transforms for detection: distributions of the draws, and images, boxes and masks against the published steps."""

import numpy as np
import pytest

from dat_jax.data.coco import decode_mask, load_coco
from dat_jax.data.detection_transforms import (
    BUCKETS,
    Views,
    make_detection_eval_transform,
    make_detection_train_transform,
    transform_boxes,
    transform_mask,
)
from dat_jax.data.segmentation_transforms import fit_size
from dat_jax.errors import UserError
from tests.helpers.coco_files import bounds, write_real
from tests.helpers.photographs import photographs

DRAWS = 2000
HALF = 4 * 0.5 / np.sqrt(DRAWS)  # four standard deviations of a share of one half
SHORT = list(range(480, 801, 32))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = tmp_path_factory.mktemp("coco")
    write_real(directory)
    source = load_coco(str(directory / "annotations/train.json"), str(directory / "train"), split="train")
    return [{key: value for key, value in source[k].items() if key != "damaged"} for k in range(2)]


def draw(size, count=DRAWS, seed=0, **options):
    transform = make_detection_train_transform(**options)
    return transform.draw(np.array([size] * count), np.random.default_rng(seed))


def chi_squared(values, choices):
    """Return by how many standard deviations the counts of values deviate from a uniform distribution."""
    counts = np.array([np.count_nonzero(values == value) for value in choices])
    assert counts.sum() == len(values)
    expected, freedom = len(values) / len(choices), len(choices) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def is_cropped(views):
    """Return which images were resized before the crop; 400, 500 and 600 are not sizes of the photographs."""
    return (views.resized != views.original).any(axis=1)


def test_crop_and_flip_are_independent_with_probability_one_half():
    views = draw((480, 640))
    cropped = is_cropped(views)
    assert abs(cropped.mean() - 0.5) < HALF
    assert abs(views.flip.mean() - 0.5) < HALF
    assert abs(np.corrcoef(cropped, views.flip)[0, 1]) < 4 / np.sqrt(DRAWS)
    assert views.flip.dtype == bool
    assert {getattr(views, name).dtype for name in ("original", "resized", "crop", "size")} == {np.dtype(np.int32)}
    for probability in (0, 1):
        views = draw((480, 640), crop_probability=probability, flip_probability=probability)
        assert is_cropped(views).mean() == views.flip.mean() == probability


def test_without_a_crop_only_the_short_side_is_drawn():
    views = draw((480, 640), crop_probability=0)
    np.testing.assert_array_equal(views.resized, views.original)
    assert np.unique(views.crop, axis=0).tolist() == [[0, 0, 480, 640]]
    assert chi_squared(views.size[:, 0], SHORT) < 4
    for height, width in views.size.tolist():
        assert width == int(640 * (height / 480) + 0.5)
    long = draw((300, 640), crop_probability=0)
    assert long.size[:, 1].max() == 1333
    assert long.size[:, 0].max() == int(300 * 1333 / 640 + 0.5) == 625


def test_with_a_crop_sizes_and_positions_are_uniform():
    views = draw((480, 640), crop_probability=1)
    assert chi_squared(views.resized[:, 0], [400, 500, 600]) < 4
    assert {tuple(size) for size in views.resized.tolist()} == {(400, 533), (500, 667), (600, 800)}
    for axis in range(2):
        crop_side, corner, side = views.crop[:, 2 + axis], views.crop[:, axis], views.resized[:, axis]
        assert crop_side.min() >= 384
        assert (crop_side <= np.minimum(side, 600)).all()
        assert (corner >= 0).all()
        assert (corner + crop_side <= side).all()
        large = side >= 600
        shares = (crop_side[large] - 384 + 0.5) / 217  # uniform on 384..600
        assert abs(shares.mean() - 0.5) < 4 / np.sqrt(12 * large.sum())
        assert abs(shares.std() - np.sqrt(1 / 12)) < 0.03
        positions = (corner + 0.5) / (side - crop_side + 1)
        assert abs(positions.mean() - 0.5) < 4 / np.sqrt(12 * DRAWS)
    assert abs(np.corrcoef(views.crop[:, 2], views.crop[:, 3])[0, 1]) < 0.3  # both depend on the first size
    # The bounds of the final resize apply to the crop.
    short, longest = views.size.min(axis=1), views.size.max(axis=1)
    assert chi_squared(short, SHORT) < 4
    assert longest.max() <= 1333
    np.testing.assert_array_equal(short == views.size[:, 0], views.crop[:, 2] <= views.crop[:, 3])


def test_crop_sides_include_both_bounds():
    views = draw((640, 640), 20000, crop_probability=1, first_short_sides=(640,), crop_sides=(30, 33))
    for axis in range(2):
        assert chi_squared(views.crop[:, 2 + axis], [30, 31, 32, 33]) < 4
        assert views.crop[:, axis].min() == 0
        assert (views.crop[:, axis] + views.crop[:, 2 + axis]).max() == 640


def test_crops_are_limited_to_the_size_of_small_images():
    """The first resize of a long image is limited by its long side, and MMDetection's crop by the size of the image."""
    views = draw((100, 1400), crop_probability=1)
    assert {tuple(size) for size in views.resized.tolist()} == {(95, 1333)}
    assert set(views.crop[:, 2].tolist()) == {95}
    assert views.crop[:, 3].min() >= 384


def test_vectorized_sizes_equal_the_scalar_function_of_mmcv():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 3000, (500, 2))
    views = make_detection_train_transform(crop_probability=0, short_sides=(480,)).draw(sizes, rng)
    assert views.size.tolist() == [list(fit_size(h, w, scale=(1333, 480))) for h, w in sizes.tolist()]


def test_draws_depend_only_on_the_generator():
    transform = make_detection_train_transform()
    sizes = np.random.default_rng(0).integers(100, 900, (50, 2))
    first, second = (transform.draw(sizes, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first.size, second.size)
    one = first.take(7)
    assert isinstance(one, Views)
    assert one.crop.tolist() == first.crop[7].tolist()


def transform_as_published(image, boxes, labels, masks, view):
    """Apply MMDetection's RandomFlip, Resize, RandomCrop and Resize; the nearest pixel is floor(i * old / new)."""

    def nearest(mask, size):
        rows, columns = (
            np.minimum(np.floor(np.arange(new) * (1 / (new / old))), old - 1).astype(int)
            for new, old in zip(size, mask.shape, strict=True)
        )
        return mask[rows][:, columns]

    def resize(size):
        nonlocal boxes, masks, shape
        ratios = np.array([size[1] / shape[1], size[0] / shape[0]] * 2, np.float32)
        boxes = boxes * ratios
        boxes[:, 0::2] = np.clip(boxes[:, 0::2], 0, size[1])
        boxes[:, 1::2] = np.clip(boxes[:, 1::2], 0, size[0])
        masks, shape = [nearest(mask, size) for mask in masks], size

    shape = image.shape[:2]
    if view.flip:
        flipped = boxes.copy()
        flipped[:, 0], flipped[:, 2] = shape[1] - boxes[:, 2], shape[1] - boxes[:, 0]
        boxes, masks = flipped, [mask[:, ::-1] for mask in masks]
    top, left, height, width = view.crop.tolist()
    if tuple(view.resized) != shape or (height, width) != shape:
        resize(tuple(view.resized))
        boxes = boxes - np.array([left, top, left, top], np.float32)
        boxes[:, 0::2] = np.clip(boxes[:, 0::2], 0, width)
        boxes[:, 1::2] = np.clip(boxes[:, 1::2], 0, height)
        is_visible = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, labels = boxes[is_visible], labels[is_visible]
        masks = [mask[top : top + height, left : left + width] for mask, k in zip(masks, is_visible, strict=True) if k]
        shape = (height, width)
    resize(tuple(view.size))
    return boxes, labels, masks


@pytest.mark.parametrize("which", [0, 1])
def test_boxes_and_masks_equal_the_published_steps(records, which):
    record = records[which]
    transform = make_detection_train_transform()
    rng = np.random.default_rng(which)
    removed = 0
    masks = [decode_mask(mask) for mask in record["masks"]]
    for _ in range(12):
        view = transform.draw(np.array([record["image"].shape[:2]]), rng).take(0)
        bucket = transform.buckets[transform.choose_buckets(view.size[None])[0]]
        result = transform(record, view, bucket=bucket, rng=rng)
        boxes, labels, expected_masks = transform_as_published(
            record["image"], record["boxes"], record["labels"], masks, view
        )
        count = int(result["box_mask"].sum())
        removed += len(masks) - count
        assert result["box_mask"].tolist() == [True] * count + [False] * (100 - count)
        np.testing.assert_allclose(result["boxes"][:count], boxes, rtol=1e-6, atol=1e-4)
        np.testing.assert_array_equal(result["labels"][:count], labels)
        height, width = result["valid"].tolist()
        assert [height, width] == view.size.tolist()
        assert not result["boxes"][count:].any()
        assert not result["labels"][count:].any()
        bitmaps = np.unpackbits(result["masks"], axis=-1)
        assert bitmaps.shape == (100, *bucket)
        for bitmap, mask in zip(bitmaps, expected_masks, strict=False):
            np.testing.assert_array_equal(bitmap[:height, :width], mask)
        assert not bitmaps[count:].any()
        assert not bitmaps[:, height:].any()
        assert not bitmaps[:, :, width:].any()
        assert not result["image"][height:].any()
        assert not result["image"][:, width:].any()
        assert result["image"].shape == (*bucket, 3)
    assert removed > 0 or which == 0  # some crops remove objects


def test_boxes_stay_tight_around_their_masks(records):
    """The tolerance is one pixel of the coarsest intermediate image."""
    transform = make_detection_train_transform(crop_probability=0.5)
    checked = 0
    for record in records:
        for seed in range(8):
            view = transform.draw(np.array([record["image"].shape[:2]]), np.random.default_rng(seed)).take(0)
            boxes, is_visible = transform_boxes(record["boxes"], view)
            scale = max(view.size[0] / view.crop[2], 1) * max(view.resized[0] / view.original[0], 1)
            for box, is_box, mask in zip(boxes, is_visible, record["masks"], strict=True):
                visible = transform_mask(decode_mask(mask), view)
                assert visible.shape == tuple(view.size)
                if not is_box:
                    assert not visible.any()
                elif visible.any():
                    mask_box = bounds(visible)
                    # A crop may remove more of a mask than of its box, so the box is only tight without a crop.
                    assert (np.array(mask_box[:2]) >= box[:2] - scale - 1).all()
                    assert (np.array(mask_box[2:]) <= box[2:] + scale + 1).all()
                    if view.crop[2:].tolist() == view.resized.tolist():
                        np.testing.assert_allclose(mask_box, box, atol=scale + 1)
                        checked += 1
    assert checked > 60


def test_masks_are_exact_for_flips_crops_and_integer_factors(records):
    mask = decode_mask(records[1]["masks"][0])
    height, width = mask.shape
    size = np.array([height, width], np.int32)
    whole = Views(size, np.bool_(True), size, np.array([0, 0, height, width]), size)
    np.testing.assert_array_equal(transform_mask(mask, whole), mask[:, ::-1])
    view = Views(size, np.bool_(False), 2 * size, np.array([11, 21, 300, 200]), np.array([900, 600]))
    doubled = mask.repeat(2, axis=0).repeat(2, axis=1)[11:311, 21:221]
    np.testing.assert_array_equal(transform_mask(mask, view), doubled.repeat(3, axis=0).repeat(3, axis=1))
    box, is_visible = transform_boxes(np.array([[10, 20, 90.5, 100]], np.float32), view)
    assert box.tolist() == [[0, (40 - 11) * 3, (181 - 21) * 3, (200 - 11) * 3]]
    assert is_visible.all()


def simple_record(size, boxes, **changes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    crowd = np.zeros(len(boxes), bool)
    record = {"image": photographs(width=size[1], height=size[0])[0], "boxes": boxes, "crowd": crowd, "masks": None}
    return record | {"labels": np.arange(len(boxes), dtype=np.int32)} | changes


SMALL = dict(
    short_sides=(96,), long_side=128, buckets=((96, 128), (128, 96)), first_short_sides=(80,), crop_sides=(40, 60)
)


def apply(record, transform, *, seed=0, view=None):
    rng = np.random.default_rng(seed)
    view = transform.draw(np.array([record["image"].shape[:2]]), rng).take(0) if view is None else view
    bucket = transform.buckets[transform.choose_buckets(view.size[None])[0]]
    return transform(record, view, bucket=bucket, rng=rng)


def test_an_image_may_lose_all_its_boxes():
    transform = make_detection_train_transform(**SMALL, masks=False, crop_probability=1, max_boxes=3)
    record = simple_record((64, 80), [[0, 0, 20, 20]])
    results = [apply(record, transform, seed=seed) for seed in range(40)]
    counts = {int(result["box_mask"].sum()) for result in results}
    assert counts == {0, 1}
    empty = next(result for result in results if not result["box_mask"].any())
    assert set(empty) == {"image", "valid", "boxes", "labels", "box_mask", "dropped"}
    assert empty["boxes"].tolist() == [[0.0] * 4] * 3
    assert [empty[key].dtype for key in ("image", "valid", "boxes", "labels", "box_mask", "dropped")] == [
        *(np.uint8, np.int32, np.float32, np.int32, bool, np.int32)
    ]
    without_objects = apply(simple_record((64, 80), []), transform)
    assert not without_objects["box_mask"].any()


def test_groups_are_left_out():
    transform = make_detection_train_transform(**SMALL, masks=False, crop_probability=0, flip_probability=0)
    record = simple_record(
        (64, 64), [[0, 0, 9, 9], [5, 5, 50, 50], [1, 2, 30, 40]], crowd=np.array([False, True, False])
    )
    result = apply(record, transform)
    assert result["labels"][:3].tolist() == [0, 2, 0]
    assert result["box_mask"].sum() == 2
    np.testing.assert_allclose(result["boxes"][1], [1.5, 3, 45, 60])


def test_surplus_objects_are_dropped_at_random_and_counted():
    transform = make_detection_train_transform(**SMALL, masks=False, crop_probability=0, max_boxes=4)
    record = simple_record((64, 64), [[k, 0, k + 2, 9] for k in range(10)])
    results = [apply(record, transform, seed=seed) for seed in range(300)]
    assert {int(result["dropped"]) for result in results} == {6}
    labels = np.stack([result["labels"] for result in results])
    assert (np.diff(labels, axis=1) > 0).all()  # the order is kept
    assert chi_squared(labels.ravel(), range(10)) < 4
    assert apply(simple_record((64, 64), [[1, 1, 5, 5]]), transform)["dropped"] == 0


def test_thin_boxes_never_become_empty_objects():
    transform = make_detection_train_transform(**SMALL, masks=False, crop_probability=0.5)
    record = simple_record(
        (64, 64), [[63.999996, 0, 64, 9], [5, 5, 5.0000005, 9], [3, 3, 3, 9], [9, 2, 8, 4], [1, 1, 9, 9]]
    )
    for seed in range(50):
        result = apply(record, transform, seed=seed)
        boxes = result["boxes"][result["box_mask"]]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert np.isfinite(result["boxes"]).all()
        assert not {2, 3} & set(result["labels"][result["box_mask"]].tolist())


def test_boxes_that_rounding_makes_empty_are_removed():
    size = np.array([35, 35], np.int32)
    view = Views(size, np.bool_(False), size, np.array([0, 0, 35, 35]), np.array([36, 36]))
    boxes, is_visible = transform_boxes(np.array([[34.999996, 0, 35, 9], [34, 0, 35, 9]], np.float32), view)
    assert boxes[0, 0] == boxes[0, 2] == 36
    assert is_visible.tolist() == [False, True]


def test_an_image_that_replaces_a_damaged_one_is_resized_to_the_bucket():
    transform = make_detection_train_transform(**SMALL, masks=False)
    view = transform.draw(np.array([[64, 80]]), np.random.default_rng(0)).take(0)
    for size in ((200, 50), (30, 400), (10, 10)):
        record = simple_record(size, [[0, 0, size[1], size[0]]], damaged=np.int32(1))
        result = transform(record, view, bucket=(96, 128), rng=np.random.default_rng(0))
        height, width = result["valid"].tolist()
        assert height == 96 or width == 128
        assert height <= 96
        assert width <= 128
        assert result["boxes"][0].tolist() == [0, 0, width, height]
        assert result["damaged"] == 1
        assert result["image"].shape == (96, 128, 3)


def test_missing_masks_are_an_error():
    transform = make_detection_train_transform(**SMALL)
    with pytest.raises(UserError, match=r"^The annotations have no masks: expected a segmentation of every object"):
        apply(simple_record((64, 64), [[1, 1, 9, 9]]), transform)


def test_every_image_gets_the_smallest_bucket_that_holds_it():
    transform = make_detection_train_transform()
    rng = np.random.default_rng(0)
    views = transform.draw(rng.integers(60, 1500, (DRAWS, 2)), rng)
    buckets = np.array(BUCKETS)[transform.choose_buckets(views.size)]
    assert (views.size <= buckets).all()
    for size, bucket in zip(views.size, buckets, strict=True):
        areas = [h * w for h, w in BUCKETS if (size <= [h, w]).all()]
        assert bucket.prod() == min(areas)
    assert len(np.unique(buckets, axis=0)) == len(BUCKETS)
    assert transform.choose_buckets(np.array([[800, 800]])) == BUCKETS.index((800, 1088))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": [(800, 1344)]}, "No bucket holds an image of 1333 x 800"),
        ({"buckets": [(1344, 800), (768, 1344)]}, "No bucket holds an image of 800 x 1333"),
        (
            {"buckets": [(1344, 1344), (800, 1350)]},
            r"The bucket \(800, 1350\) is invalid: expected a height and a width",
        ),
        ({"buckets": []}, "No bucket holds"),
        ({"crop_sides": (600, 384)}, "The crop has sides from 600 to 384"),
        ({"crop_sides": (0, 384)}, "The crop has sides from 0 to 384"),
    ],
)
def test_invalid_settings_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        make_detection_train_transform(**options)


def test_a_single_square_bucket_is_enough():
    transform = make_detection_train_transform(buckets=[(1344, 1344)])
    assert transform.choose_buckets(np.array([[1333, 800], [480, 480]])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("size", "valid", "padded"),
    [
        ((480, 640), (800, 1067), (800, 1088)),
        ((640, 427), (1199, 800), (1216, 800)),
        ((200, 640), (417, 1333), (448, 1344)),
    ],
)
def test_evaluation_resizes_and_pads_the_image(size, valid, padded):
    transform = make_detection_eval_transform()
    record = simple_record(size, [])
    result = transform(record)
    assert set(result) == {"image", "valid", "scale", "original"}
    assert transform.view_shapes(*size) == (padded,)
    assert result["image"].shape == (*padded, 3)
    assert result["valid"].tolist() == list(valid)
    assert result["original"].tolist() == list(size)
    scale = [valid[1] / size[1], valid[0] / size[0]] * 2
    np.testing.assert_allclose(result["scale"], scale, rtol=1e-7)
    assert [result[key].dtype for key in ("image", "valid", "scale", "original")] == [
        *(np.uint8, np.int32, np.float32, np.int32)
    ]
    assert not result["image"][valid[0] :].any()
    assert not result["image"][:, valid[1] :].any()
    assert result["image"][: valid[0], : valid[1]].std() > 10


def test_a_larger_multiple_gives_fewer_shapes():
    transforms = [make_detection_eval_transform(multiple=multiple) for multiple in (32, 128)]
    sizes = [(480, width) for width in range(480, 800)]
    fine, coarse = (len({transform.view_shapes(*size) for size in sizes}) for transform in transforms)
    assert (fine, coarse) == (18, 5)
