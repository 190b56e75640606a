"""The embedded data, its transforms, and batches that are a function of seed and step."""

import itertools

import numpy as np
import pytest

from dat_jax.data.batching import make_eval_batches, make_train_batches
from dat_jax.data.sources import load_source, split_stratified
from dat_jax.data.transforms import make_eval_transform, make_train_transform
from dat_jax.errors import UserError

TRANSFORM = make_train_transform(image_size=32, max_rotation=10.0, max_shift=0.1, max_scale=0.1)


@pytest.fixture(scope="module")
def digits():
    return {split: load_source("mnist5k", split=split) for split in ("train", "validation")}


def test_the_digits_are_split_by_class_without_overlap(digits):
    train, validation = digits["train"], digits["validation"]
    assert (len(train), len(validation)) == (4000, 1000)
    assert train.images.dtype == np.uint8
    assert train[7]["image"].shape == (28, 28, 3)
    assert (np.bincount(train.labels) == 400).all()
    assert (np.bincount(validation.labels) == 100).all()
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in validation.images)
    zero = train.images[train.labels == 0].mean(axis=0)[..., 0]  # a ring: dark in the middle
    assert zero[14, 14] < 40 < 120 < zero[:, 14].max()


def test_splits_are_stratified_and_repeat_with_the_seed():
    labels = np.array([0] * 10 + [1] * 30)
    parts = split_stratified(labels, validation_fraction=0.2, seed=3)
    assert sorted([*parts["train"], *parts["validation"]]) == list(range(40))
    assert list(np.bincount(labels[parts["validation"]])) == [2, 6]
    again = split_stratified(labels, validation_fraction=0.2, seed=3)
    np.testing.assert_array_equal(parts["train"], again["train"])
    assert (parts["train"] != split_stratified(labels, validation_fraction=0.2, seed=4)["train"]).any()


def test_unknown_sources_are_refused():
    with pytest.raises(UserError, match="Unknown data set 'mnist5'; choose one of mnist5k"):
        load_source("mnist5", split="train")
    with pytest.raises(UserError, match="Unknown split 'val'; choose one of train, validation"):
        load_source("mnist5k", split="val")


def test_without_random_changes_training_resizes_as_evaluation(digits):
    plain = make_train_transform(image_size=56, max_rotation=0.0, max_shift=0.0, max_scale=0.0)
    record = digits["train"][0]
    got = plain(record, np.random.default_rng(0))["image"].astype(int)
    wanted = make_eval_transform(image_size=56)(record)["image"].astype(int)
    assert np.abs(got - wanted)[2:-2, 2:-2].max() <= 2  # the two resamplers round differently, and treat borders so


def center_of_mass(image):
    weights = image[..., 0].astype(float)
    grid = np.indices(weights.shape)
    return (grid * weights).sum(axis=(1, 2)) / weights.sum()


def test_a_shift_moves_the_image_by_what_was_drawn():
    square = np.zeros((28, 28, 3), np.uint8)
    square[10:18, 10:18] = 255
    shift = make_train_transform(image_size=28, max_rotation=0.0, max_shift=0.2, max_scale=0.0)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        _, _, (shift_x, shift_y) = rng.uniform(), rng.uniform(), rng.uniform(-0.2, 0.2, size=2)
        moved = shift({"image": square}, np.random.default_rng(seed))["image"]
        offset = center_of_mass(moved) - center_of_mass(square)
        np.testing.assert_allclose(offset, [28 * shift_y, 28 * shift_x], atol=0.1)


def test_a_scale_and_a_rotation_keep_the_centre_and_change_the_area():
    square = np.zeros((29, 29, 3), np.uint8)
    square[10:19, 10:19] = 255
    change = make_train_transform(image_size=29, max_rotation=30.0, max_shift=0.0, max_scale=0.5)
    areas = []
    for seed in range(8):
        image = change({"image": square}, np.random.default_rng(seed))["image"]
        np.testing.assert_allclose(center_of_mass(image), [14, 14], atol=0.2)
        areas.append(image[..., 0].sum() / 255)
    assert min(areas) < 81 < max(areas)
    assert min(areas) > 81 / 1.6**2
    assert max(areas) < 81 * 1.6**2


def take(source, count, **options):
    batches = make_train_batches(source, TRANSFORM, **{**dict(batch_size=8, seed=1), **options})
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_repeat_with_the_seed_and_start_at_any_step(digits):
    batches = take(digits["train"], 5)
    assert batches[0]["image"].shape == (8, 32, 32, 3)
    assert batches[0]["image"].dtype == np.uint8
    assert_equal(batches, take(digits["train"], 5))
    assert_equal(batches[3:], take(digits["train"], 2, start_step=3))
    assert (batches[0]["image"] != take(digits["train"], 1, seed=2)[0]["image"]).any()


def test_workers_change_nothing(digits):
    assert_equal(take(digits["train"], 3), take(digits["train"], 3, workers=1))


def test_an_epoch_has_every_example_once_and_the_next_is_shuffled_anew(digits):
    class Numbered:
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return {**digits["train"][index], "label": np.int32(index)}

    labels = [batch["label"] for batch in take(Numbered(), 6)]
    first, second = np.concatenate(labels[:3]), np.concatenate(labels[3:])
    assert sorted(first) == sorted(second) == list(range(24))
    assert (first != second).any()


def test_processes_share_the_examples_of_a_step(digits):
    whole = take(digits["train"], 3)
    parts = [take(digits["train"], 3, batch_size=4, process_index=i, process_count=2) for i in range(2)]
    for step in range(3):
        np.testing.assert_array_equal(whole[step]["image"][0::2], parts[0][step]["image"])
        np.testing.assert_array_equal(whole[step]["label"][1::2], parts[1][step]["label"])


def test_every_example_is_evaluated_once_whatever_the_batch_and_processes(digits):
    source = digits["validation"]
    transform = make_eval_transform(image_size=32)
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
