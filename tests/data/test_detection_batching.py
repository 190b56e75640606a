"""Batches for detection: buckets, reproducibility over workers and processes, and sampling frequency of images."""

import collections
import itertools

import numpy as np
import pytest

from dat_jax.data.batching import (
    _DetectionPlan,
    detection_example_indices,
    make_detection_train_batches,
    plan_batches,
)
from dat_jax.data.coco import load_coco, load_detection_source
from dat_jax.data.detection_transforms import make_detection_eval_transform, make_detection_train_transform
from dat_jax.data.sized_batching import make_detection_eval_batches
from dat_jax.errors import UserError
from tests.helpers.coco_files import annotation, write
from tests.helpers.photographs import photographs

SIZES = [(40, 60), (60, 40), (50, 50), (40, 60), (60, 41), (36, 90), (90, 36), (40, 60), (60, 40), (44, 60), (40, 60)]
SMALL = dict(
    short_sides=(48, 56, 64),
    long_side=96,
    first_short_sides=(40, 48),
    crop_sides=(32, 48),
    buckets=((64, 64), (64, 96), (96, 64)),
    max_boxes=4,
)
TRANSFORM = make_detection_train_transform(**SMALL)
EVAL_TRANSFORM = make_detection_eval_transform(scale=(96, 64))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Eleven photographs of several sizes, each with one object that fills the image and has its own class."""
    directory = tmp_path_factory.mktemp("coco")
    images = {k + 1: photographs(width=width, height=height)[k] for k, (height, width) in enumerate(SIZES)}
    annotations = [annotation(k, k, k, np.ones(images[k].shape[:2], bool)) for k in images]
    categories = [{"id": k, "name": f"image {k}"} for k in images]
    write(directory, images=images, annotations=annotations, categories=categories)
    return directory


def load(directory, split="train"):
    return load_coco(str(directory / "annotations/train.json"), str(directory / "train"), split=split)


def take(source, count, transform=TRANSFORM, **options):
    batches = make_detection_train_batches(source, transform, **({"batch_size": 4, "seed": 5} | options))
    result = list(itertools.islice(batches, count))
    batches.close()
    return result


def assert_equal(batches, others, rows=slice(None)):
    for batch, reference in zip(batches, others, strict=True):
        assert set(batch) == set(reference)
        for name, values in batch.items():
            np.testing.assert_array_equal(values, reference[name][rows])


def test_training_batches_do_not_depend_on_workers_and_processes(directory):
    source = load(directory)
    whole = take(source, 6)
    assert len({batch["image"].shape for batch in whole}) > 1
    for batch in whole:
        _, height, width, _ = batch["image"].shape
        assert (height, width) in SMALL["buckets"]
        assert batch["masks"].shape == (4, 4, height, width // 8)
        assert {
            name: (values.shape[1:], values.dtype) for name, values in batch.items() if name not in ("image", "masks")
        } == {
            "valid": ((2,), np.int32),
            "boxes": ((4, 4), np.float32),
            "labels": ((4,), np.int32),
            "box_mask": ((4,), bool),
            "dropped": ((), np.int32),
            "damaged": ((), np.int32),
        }
    assert_equal(take(source, 6, workers=2), whole)
    assert_equal(take(source, 6, rows=[0, 1]), whole, [0, 1])
    assert_equal(take(source, 6, rows=[3, 1]), whole, [3, 1])
    assert_equal(take(source, 2, start_step=4), whole[4:])
    other = take(source, 6, seed=6)
    assert any(
        a["image"].shape != b["image"].shape or (a["image"] != b["image"]).any()
        for a, b in zip(whole, other, strict=True)
    )


def test_example_indices_are_the_images_of_a_batch(directory):
    source = load(directory)
    for step, batch in enumerate(take(source, 8), start=1):
        indices = detection_example_indices(source, TRANSFORM, seed=5, step=step, batch_size=4)
        for row, index in enumerate(indices):
            labels = batch["labels"][row][batch["box_mask"][row]].tolist()
            assert labels == [index]


def test_every_batch_has_the_smallest_bucket_of_its_images(directory):
    for batch in take(load(directory), 12):
        shape = batch["image"].shape[1:3]
        buckets = TRANSFORM.choose_buckets(batch["valid"])
        assert {TRANSFORM.buckets[k] for k in buckets} == {shape}


def test_images_of_all_buckets_occur_equally_often():
    """Averages over many epochs, with two long images that fill buckets with few others."""
    plan = _DetectionPlan(np.array(SIZES, np.int32), TRANSFORM, seed=5, batch_size=4)
    epochs, steps = 400, len(SIZES) // 4
    indices = [plan.example(step, row)[0] for step in range(steps * epochs) for row in range(4)]
    shares = np.bincount(indices, minlength=len(SIZES)) * len(SIZES) / len(indices)
    # An image occurs once per epoch on average, with a standard deviation of about one because of filled and omitted batches.
    assert np.abs(shares - 1).max() < 4 * 1.5 / np.sqrt(epochs)


def test_every_pass_has_a_new_order_and_new_draws():
    plan = _DetectionPlan(np.array([(60, 60)] * 64, np.int32), TRANSFORM, seed=5, batch_size=8)
    (first, views, *_), (second, other_views, *_) = plan._plan(0), plan._plan(1)
    assert sorted(first) == sorted(second) == list(range(64))
    assert (first != second).any()
    assert 0.2 < (views.flip == other_views.flip).mean() < 0.8
    assert 0.2 < (views.flip == other_views.flip[np.argsort(second)][first]).mean() < 0.8


def test_images_are_augmented_independently():
    source = load_detection_source("digits_on_photographs", split="train")
    transform = make_detection_train_transform(**SMALL | {"masks": False})
    batches = take(source, 8, transform, batch_size=16)
    assert {tuple(valid) for batch in batches for valid in batch["valid"].tolist()} > {(48, 48), (56, 56), (64, 64)}
    assert "masks" not in batches[0]
    assert max(len(np.unique(batch["valid"], axis=0)) for batch in batches) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_plans_contain_full_batches_and_some_of_the_remainders(batch_size):
    rng = np.random.default_rng(0)
    counts, tries = collections.Counter(), 300
    groups = rng.choice(4, 48, p=[0.6, 0.3, 0.08, 0.02])
    for _ in range(tries):
        plan = plan_batches(groups, batch_size=batch_size, rng=rng)
        assert plan.shape == (48 // batch_size, batch_size)
        assert (groups[plan] == groups[plan[:, :1]]).all()
        for row in plan:
            members = np.count_nonzero(groups == groups[row[0]])
            assert len(set(row.tolist())) == min(
                batch_size, members
            )  # repeated only if the group is smaller than a batch
        counts.update(groups[plan].ravel().tolist())
    for group, size in collections.Counter(groups.tolist()).items():
        # In each plan, the count of a group differs from its size by less than a batch; on average it is equal.
        assert abs(counts[group] / tries - size) < 4 * 0.5 * batch_size / np.sqrt(tries) + 1e-9


def test_a_source_may_be_smaller_than_a_batch(directory):
    source = load(directory)
    batches = take(source, 3, batch_size=16)
    assert [len(batch["image"]) for batch in batches] == [16] * 3
    indices = {
        index
        for step in range(1, 30)
        for index in detection_example_indices(source, TRANSFORM, seed=5, step=step, batch_size=16)
    }
    assert indices == set(range(len(source)))


def test_a_damaged_image_is_replaced_within_its_bucket(tmp_path):
    images = {k + 1: photographs(width=width, height=height)[k] for k, (height, width) in enumerate(SIZES)}
    annotations = [annotation(k, k, 1, np.ones(images[k].shape[:2], bool)) for k in images]
    write(tmp_path, images=images, annotations=annotations, categories=[{"id": 1, "name": "a"}])
    for number in (1, 6, 7):
        (tmp_path / f"train/img_{number}.png").write_bytes(b"x")
    source = load(tmp_path)
    batches = take(source, 10)
    assert sum(batch["damaged"].sum() for batch in batches) > 0
    for batch in batches:
        assert (batch["valid"] <= batch["image"].shape[1:3]).all()


def test_an_image_of_another_size_is_an_error(directory):
    source = load(directory)
    sizes = source.sizes.copy()
    source.sizes[:] = 50
    with pytest.raises(UserError, match="expected 50 x 50 as in"):
        take(source, 3)
    source.sizes[:] = sizes


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_image_is_evaluated_once(directory, batch_size):
    source = load(directory, "validation")
    indices, shapes = [], []
    for batch in make_detection_eval_batches(source, EVAL_TRANSFORM, batch_size=batch_size):
        assert {name: values.dtype for name, values in batch.items()} == {
            "image": np.uint8,
            "valid": np.int32,
            "scale": np.float32,
            "original": np.int32,
            "index": np.int32,
            "mask": np.float32,
            "damaged_index": np.int32,
        }
        assert len(batch["image"]) == batch_size
        shapes.append(batch["image"].shape[1:3])
        mask = batch["mask"].tolist()
        assert mask[0] == 1
        assert mask == sorted(mask, reverse=True)
        for row, index in enumerate(batch["index"].tolist()):
            expected = EVAL_TRANSFORM(source[index])
            assert batch["original"][row].tolist() == list(SIZES[index])
            for name, values in expected.items():
                np.testing.assert_array_equal(batch[name][row], values)
        indices.extend(index for index, counts in zip(batch["index"].tolist(), mask, strict=True) if counts)
    assert sorted(indices) == list(range(len(SIZES)))
    assert shapes == sorted(shapes)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_load_their_rows_of_evaluation_batches(directory, workers):
    source = load(directory, "validation")
    whole = list(make_detection_eval_batches(source, EVAL_TRANSFORM, batch_size=4))
    for rows in ([0, 1], [2, 3]):
        part = list(make_detection_eval_batches(source, EVAL_TRANSFORM, batch_size=4, rows=rows, workers=workers))
        assert_equal(part, whole, rows)
