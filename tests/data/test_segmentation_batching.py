"""Batches for segmentation: reproducibility over workers and processes, every example evaluated once."""

import itertools

import numpy as np
import pytest
from PIL import Image

from dat_jax.data.batching import make_train_batches
from dat_jax.data.segmentation_sources import SegmentationArraySource, load_segmentation_source
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform, make_segmentation_train_transform
from dat_jax.data.sized_batching import make_sized_eval_batches
from dat_jax.errors import UserError
from tests.helpers.photographs import photographs

SIZES = [
    (40, 60),
    (60, 40),
    (40, 60),
    (80, 120),
    (41, 60),
    (60, 40),
    (70, 130),
    (40, 60),
    (80, 120),
    (30, 90),
    (60, 40),
]
TRANSFORM = make_segmentation_eval_transform(scale=(128, 64), ratios=(0.5, 1.0))


def sized_source():
    """Images of several sizes; the first pixel of a label map is the index of the example."""
    images = [photographs(width=width, height=height)[k] for k, (height, width) in enumerate(SIZES)]
    labels = [np.random.default_rng(k).integers(0, 11, size, dtype=np.uint8) for k, size in enumerate(SIZES)]
    for index, label in enumerate(labels):
        label[0, 0] = index
    return SegmentationArraySource(images, labels, tuple(map(str, range(11))))


def train_batches(rows=None, workers=0, count=3):
    source = load_segmentation_source("digits_on_photographs", split="train")
    transform = make_segmentation_train_transform(scale=(192, 96), crop_size=96, max_class_ratio=0.9)
    batches = make_train_batches(source, transform, batch_size=4, seed=5, rows=rows, workers=workers)
    result = list(itertools.islice(batches, count))
    batches.close()
    return result


@pytest.mark.slow
def test_training_batches_do_not_depend_on_workers_and_processes():
    whole = train_batches()
    assert whole[0]["image"].shape == (4, 96, 96, 3)
    assert whole[0]["label"].shape == (4, 96, 96)
    assert whole[0]["label"].dtype == np.uint8
    assert whole[0]["valid"].shape == (4, 2)
    assert whole[0]["valid"].min() < 96  # some are smaller than the crop
    assert set(whole[0]) == {"image", "label", "valid"}
    others = [
        (train_batches(workers=2), [0, 1, 2, 3]),
        (train_batches([0, 1]), [0, 1]),
        (train_batches([3, 1]), [3, 1]),
    ]
    for batches, rows in others:
        for batch, reference in zip(batches, whole, strict=True):
            for name, values in batch.items():
                np.testing.assert_array_equal(values, reference[name][rows])


def test_batches_contain_the_number_of_skipped_damaged_images(tmp_path):
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "abcd":
        Image.fromarray(photographs(width=40, height=40)[0]).save(tmp_path / "images/train" / f"{name}.jpg")
        Image.new("L", (40, 40), 1).save(tmp_path / "labels/train" / f"{name}.png")
    (tmp_path / "images/train/b.jpg").write_bytes(b"x")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    source = load_segmentation_source("", split="train", directory=str(tmp_path))
    transform = make_segmentation_train_transform(scale=(40, 40), crop_size=32)
    batch = next(make_train_batches(source, transform, batch_size=4, seed=0))
    assert sorted(batch["damaged"].tolist()) == [0, 0, 0, 1]


def join_tiles(tiles, origins):
    """Label maps (B, H, W) from their tiles (B, T, S, S) and the origins of these (B, T, 2)."""
    side = tiles.shape[2]
    height, width = origins[0].max(axis=0) + side
    labels = np.zeros((len(tiles), height, width), tiles.dtype)
    for tile, (top, left) in enumerate(origins[0]):
        labels[:, top : top + side, left : left + side] = tiles[:, tile]
    return labels


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_example_is_evaluated_once(batch_size):
    source = sized_source()
    batches = list(make_sized_eval_batches(source, TRANSFORM, batch_size=batch_size))
    evaluated = []
    for batch in batches:
        assert set(batch) == {"view_0", "view_1", "label", "origin", "size", "mask", "damaged_index"}
        assert [batch[name].dtype for name in ("view_0", "label", "origin", "size", "mask")] == [
            *(np.uint8, np.uint8, np.int32, np.int32, np.float32)
        ]
        indices = batch["label"][:, 0, 0, 0]
        assert len(indices) == batch_size
        largest = np.max([SIZES[index] for index in indices], axis=0)
        labels = join_tiles(batch["label"], batch["origin"])
        side = batch["label"].shape[2]
        assert side == 256  # the smallest power of two that holds the largest label map
        assert labels.shape[1:] == tuple(-(-largest // side) * side)
        for row, index in enumerate(indices):
            height, width = SIZES[index]
            expected = TRANSFORM(source[index])
            assert batch["size"][row].tolist() == [height, width]
            np.testing.assert_array_equal(labels[row, :height, :width], expected["label"])
            assert (labels[row, height:] == 255).all()
            assert (labels[row, :, width:] == 255).all()
            for name in ("view_0", "view_1"):
                np.testing.assert_array_equal(batch[name][row], expected[name])
        mask = batch["mask"].tolist()
        assert mask[0] == 1
        assert mask == sorted(mask, reverse=True)
        assert set(mask) <= {0, 1}
        evaluated.extend(index for index, counts in zip(indices, mask, strict=True) if counts)
    assert sorted(evaluated) == list(range(len(SIZES)))
    shapes = [TRANSFORM.view_shapes(*SIZES[index]) for index in evaluated]
    assert shapes == sorted(shapes)
    groups = [shapes.count(shape) for shape in set(shapes)]
    assert len(batches) == sum(-(-count // batch_size) for count in groups)


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (4, 0), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_processes_load_their_rows_of_evaluation_batches(batch_size, workers):
    source = sized_source()
    whole = list(make_sized_eval_batches(source, TRANSFORM, batch_size=batch_size))
    half = batch_size // 2
    parts = [
        list(make_sized_eval_batches(source, TRANSFORM, batch_size=batch_size, rows=rows, workers=workers))
        for rows in (range(half), range(half, batch_size))
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), values)
    assert sum(batch["mask"].sum() for part in parts for batch in part) == len(SIZES)


def test_sizes_with_equal_view_shapes_share_batches():
    """80 x 120 and 40 x 60 have equal view shapes; their label maps are padded to the larger size."""
    source = sized_source()
    assert TRANSFORM.view_shapes(40, 60) == TRANSFORM.view_shapes(80, 120)
    batches = list(make_sized_eval_batches(source, TRANSFORM, batch_size=5))
    mixed = next(batch for batch in batches if len(np.unique(batch["size"], axis=0)) > 1)
    assert mixed["size"].tolist() == [[40, 60]] * 3 + [[80, 120]] * 2
    assert mixed["label"].shape == (5, 1, 256, 256)
    assert mixed["mask"].tolist() == [1, 1, 1, 1, 1]


def test_small_tiles_and_buckets_hold_the_same_examples():
    source, buckets = sized_source(), [(64, 160), (128, 128)]
    batches = list(make_sized_eval_batches(source, TRANSFORM, batch_size=3, buckets=buckets, tile=64))
    seen = []
    for batch in batches:
        assert batch["label"].shape[2:] == (64, 64)
        labels = join_tiles(batch["label"], batch["origin"])
        for row, index in enumerate(labels[:, 0, 0]):
            expected, (height, width) = TRANSFORM(source[index]), SIZES[index]
            np.testing.assert_array_equal(labels[row, :height, :width], expected["label"])
            assert (labels[row, height:] == 255).all()
            assert (labels[row, :, width:] == 255).all()
            for name in ("view_0", "view_1"):
                rows, columns = batch[f"size_of_{name}"][row]
                np.testing.assert_array_equal(batch[name][row, :rows, :columns], expected[name])
                assert not batch[name][row, rows:].any()
                assert not batch[name][row, :, columns:].any()
            if batch["mask"][row]:
                seen.append(index)
    assert sorted(seen) == list(range(len(SIZES)))
    assert {batch["view_0"].shape[1:3] for batch in batches} <= set(buckets)
    assert len({batch["view_1"].shape[1:3] for batch in batches}) <= len(buckets)


def test_synthetic_examples_form_one_group():
    source = load_segmentation_source("digits_on_photographs", split="validation")
    transform = make_segmentation_eval_transform(scale=(64, 64))
    batches = list(make_sized_eval_batches(source, transform, batch_size=48))
    assert [batch["mask"].sum() for batch in batches] == [48, 48, 48, 48, 8]
    labels = np.concatenate([join_tiles(batch["label"], batch["origin"]) for batch in batches])[:200]
    assert labels.shape == (200, 64, 64)
    for index in (0, 77, 199):
        np.testing.assert_array_equal(labels[index], source[index]["label"])


def test_an_empty_source_gives_no_batches():
    empty = SegmentationArraySource([], [], ("a",))
    assert list(make_sized_eval_batches(empty, TRANSFORM, batch_size=2)) == []


def test_an_unreadable_example_is_an_error_in_evaluation():
    class Broken(SegmentationArraySource):
        def __getitem__(self, index):
            raise UserError("The image x cannot be decoded.")

    source = sized_source()
    broken = Broken(source.images, source.labels, source.class_names)
    with pytest.raises(UserError, match="The image x cannot be decoded"):
        list(make_sized_eval_batches(broken, TRANSFORM, batch_size=2))
