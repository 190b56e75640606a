"""The embedded digits, and batches as a function of seed and step."""

import itertools

import numpy as np
import pytest

from dat_jax.data.batching import example_indices, make_eval_batches, make_train_batches
from dat_jax.data.embedded import split_stratified
from dat_jax.data.sources import load_source
from dat_jax.data.transforms import make_eval_transform, make_train_transform
from dat_jax.errors import UserError

TRANSFORM = make_train_transform(
    image_size=32,
    min_crop_area=0.5,
    max_crop_aspect=4 / 3,
    flip_probability=0.5,
    rand_augment_count=2,
    rand_augment_magnitude=9.0,
    rand_augment_std=0.5,
)


@pytest.fixture(scope="module")
def digits():
    return {split: load_source("mnist5k", split=split) for split in ("train", "validation")}


def test_the_digits_are_split_evenly_by_class_without_overlap(digits):
    train, validation = digits["train"], digits["validation"]
    assert (len(train), len(validation)) == (4000, 1000)
    assert train.images.dtype == np.uint8
    assert train[7]["image"].shape == (28, 28, 3)
    assert (np.bincount(train.labels) == 400).all()
    assert (np.bincount(validation.labels) == 100).all()
    train_images = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in train_images for image in validation.images)
    zero = train.images[train.labels == 0].mean(axis=0)[..., 0]  # a ring: dark in the middle
    assert zero[14, 14] < 40 < 120 < zero[:, 14].max()


def test_splits_are_stratified_and_reproducible():
    labels = np.array([0] * 10 + [1] * 30)
    parts = split_stratified(labels, validation_fraction=0.2, seed=3)
    assert sorted([*parts["train"], *parts["validation"]]) == list(range(40))
    assert list(np.bincount(labels[parts["validation"]])) == [2, 6]
    again = split_stratified(labels, validation_fraction=0.2, seed=3)
    np.testing.assert_array_equal(parts["train"], again["train"])
    assert (parts["train"] != split_stratified(labels, validation_fraction=0.2, seed=4)["train"]).any()


def test_unknown_names_and_splits_are_rejected():
    with pytest.raises(UserError, match="Unknown data set 'mnist5'; choose one of mnist5k"):
        load_source("mnist5", split="train")
    with pytest.raises(UserError, match="Unknown split 'val'; choose one of train, validation"):
        load_source("mnist5k", split="val")


class Numbered:
    """Digits whose label is their index."""

    def __init__(self, source, count):
        self._source, self._count = source, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return {**self._source[index], "label": np.int32(index)}


def take(source, count, **options):
    batches = make_train_batches(source, TRANSFORM, **{**dict(batch_size=8, seed=1), **options})
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_are_reproducible_and_can_start_at_any_step(digits):
    batches = take(digits["train"], 5)
    assert batches[0]["image"].shape == (8, 32, 32, 3)
    assert batches[0]["image"].dtype == np.uint8
    assert_equal(batches, take(digits["train"], 5))
    assert_equal(batches[3:], take(digits["train"], 2, start_step=3))
    assert (batches[0]["image"] != take(digits["train"], 1, seed=2)[0]["image"]).any()


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers(digits):
    threads = take(digits["train"], 5)
    for workers in (1, 2):
        assert_equal(threads, take(digits["train"], 5, workers=workers))
    assert_equal(threads[3:], take(digits["train"], 2, workers=2, start_step=3))  # as after a resume


def test_every_epoch_contains_all_examples_in_a_new_order(digits):
    labels = [batch["label"] for batch in take(Numbered(digits["train"], 24), 6)]
    first, second = np.concatenate(labels[:3]), np.concatenate(labels[3:])
    assert sorted(first) == sorted(second) == list(range(24))
    assert (first != second).any()


@pytest.mark.parametrize("parts", [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1, 4, 5), (2, 3, 6, 7))])
def test_processes_load_their_rows_of_a_batch(digits, parts):
    whole = take(digits["train"], 3)
    for rows in parts:
        for batch, part in zip(whole, take(digits["train"], 3, rows=rows), strict=True):
            assert_equal([{key: array[list(rows)] for key, array in batch.items()}], [part])


def test_every_example_is_evaluated_once_for_any_batch_size_and_number_of_processes(digits):
    source = digits["validation"]
    transform = make_eval_transform(resize=36, image_size=32)
    for batch_size, processes in [(300, 1), (64, 3), (1000, 1), (400, 2)]:
        counts = np.zeros(10)
        lengths = set()
        for index in range(processes):
            batches = list(
                make_eval_batches(
                    source, transform, batch_size=batch_size, process_index=index, process_count=processes
                )
            )
            lengths.add(len(batches))
            for batch in batches:
                assert batch["image"].shape == (batch_size, 32, 32, 3)
                counts += np.bincount(batch["label"], weights=batch["mask"], minlength=10)
        np.testing.assert_array_equal(counts, 100)
        assert len(lengths) == 1


def test_repeated_images_are_neighbors_in_a_batch_and_each_is_augmented_by_itself(digits):
    source = Numbered(digits["train"], 24)
    batches = take(source, 9, repeats=3, batch_size=12)
    labels = np.concatenate([batch["label"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    first, second, third = labels.reshape(-1, 3).T
    assert (first == second).all()
    assert (first == third).all()
    assert sorted(first[:24]) == list(range(24))  # a pass over the data takes six batches
    differ = (images[0::3] != images[1::3]).any(axis=(1, 2, 3))
    assert differ.mean() > 0.9
    assert_equal(batches[4:], take(source, 5, repeats=3, batch_size=12, start_step=4))
    indices = [example_indices(24, seed=1, step=step, batch_size=12, repeats=3) for step in range(1, 10)]
    assert np.concatenate(indices).tolist() == labels.tolist()


def test_processes_load_their_rows_of_repeated_images(digits):
    source = Numbered(digits["train"], 24)
    whole = take(source, 2, repeats=2)
    for rows in ((0, 1, 2, 3), (4, 5, 6, 7)):
        for batch, part in zip(whole, take(source, 2, repeats=2, rows=rows), strict=True):
            assert_equal([{key: array[list(rows)] for key, array in batch.items()}], [part])


def test_a_later_transform_begins_with_its_batch(digits):
    def with_size(size):
        return lambda record, rng: {**TRANSFORM(record, rng), "image": np.zeros((size, size, 3), np.uint8)}

    options = dict(later_transforms=[(2, with_size(40)), (3, with_size(48))])
    batches = take(digits["train"], 5, **options)
    assert [batch["image"].shape[1] for batch in batches] == [32, 32, 40, 48, 48]
    plain = take(digits["train"], 5)
    assert_equal(batches[:2], plain[:2])
    for batch, other in zip(batches, plain, strict=True):
        np.testing.assert_array_equal(batch["label"], other["label"])
    assert [batch["image"].shape[1] for batch in take(digits["train"], 2, start_step=2, **options)] == [40, 48]


def test_a_later_transform_gets_the_draws_of_the_first_one(digits):
    plain = take(digits["train"], 3)
    assert_equal(plain, take(digits["train"], 3, later_transforms=[(1, TRANSFORM)]))


@pytest.mark.slow
def test_repeats_and_later_transforms_do_not_depend_on_the_number_of_workers(digits):
    options = dict(repeats=2, later_transforms=[(1, TRANSFORM)])
    assert_equal(take(digits["train"], 3, **options), take(digits["train"], 3, workers=2, **options))
