"""Checkpoints: what is kept, what is found again, and damage that is noticed."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.errors import UserError
from dat_jax.training.checkpoint import Checkpoints, compute_digests
from dat_jax.training.state import TrainState

POSITION = {"examples": 8, "batch_size": 4, "seed": 0}


def make_state(step: int, *, width: int = 5) -> TrainState:
    params = {"kernel": jnp.full((3, width), step, jnp.float32), "bias": jnp.arange(width, dtype=jnp.bfloat16)}
    return TrainState(step=jnp.int32(step), params=params, model_state={}, opt_state=(), ema_params=None)


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def save(directory, scores: dict[int, float]):
    with Checkpoints(directory, metric="score") as checkpoints:
        for step, score in scores.items():
            checkpoints.save(make_state(step), data_position=POSITION, metrics={"score": score})


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.4})
    (tmp_path / "7").mkdir()  # a stray empty folder is no checkpoint
    with Checkpoints(tmp_path, metric="score", read_only=True) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 4)
        for step in (2, 4):
            state, position = checkpoints.restore(step, abstract(make_state(0)))
            assert position == POSITION
            for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True):
                np.testing.assert_array_equal(got, wanted)
                assert got.dtype == wanted.dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "7"]


def test_a_folder_that_would_hide_what_is_saved_is_refused_before_anything_is_lost(tmp_path):
    save(tmp_path, {1: 0.2})
    (tmp_path / "7").mkdir()
    with pytest.raises(UserError, match="7 is not a complete checkpoint and would hide others"):
        save(tmp_path, {2: 0.3})
    with Checkpoints(tmp_path, metric="score", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_a_step_before_the_latest_is_not_dropped_silently(tmp_path):
    with pytest.raises(UserError, match="Step 2 was not saved: .* holds a later step"):
        save(tmp_path, {3: 0.2, 2: 0.3})


def test_a_reader_leaves_what_is_being_written_alone(tmp_path):
    save(tmp_path, {1: 0.2})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, metric="score", read_only=True) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (1, 1)
        assert int(checkpoints.restore(1, abstract(make_state(0)))[0].step) == 1
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, metric="score") as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (None, None)


def test_arrays_that_are_not_the_saved_ones_are_named(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.0})
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    with (
        Checkpoints(tmp_path, metric="score") as checkpoints,
        pytest.raises(UserError, match=r"2 is damaged: .*params/kernel differ from what was saved"),
    ):
        checkpoints.restore(2, abstract(make_state(0)))


def test_files_that_cannot_be_read_are_said(tmp_path):
    save(tmp_path, {1: 0.1})
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[:-20])
    with (
        Checkpoints(tmp_path, metric="score") as checkpoints,
        pytest.raises(UserError, match=r"1 cannot be read: .+"),
    ):
        checkpoints.restore(1, abstract(make_state(0)))


def test_another_shape_is_refused(tmp_path):
    save(tmp_path, {1: 0.1})
    with (
        Checkpoints(tmp_path, metric="score") as checkpoints,
        pytest.raises(UserError, match=r"params/kernel is \(3, 5\), wanted \(3, 6\)"),
    ):
        checkpoints.restore(1, abstract(make_state(0, width=6)))


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
def test_a_digest_changes_with_any_bit_and_with_order(dtype):
    array = np.asarray(jnp.arange(1, 7).astype(dtype)).reshape(2, 3)
    wanted = int(compute_digests(jnp.asarray(array)))
    unsigned = {2: np.uint16, 4: np.uint32}[array.itemsize]
    for element in range(6):
        for bit in range(8 * array.itemsize):
            flipped = array.copy()
            flipped.view(unsigned).reshape(-1)[element] ^= unsigned(1 << bit)
            assert int(compute_digests(jnp.asarray(flipped))) != wanted
    assert int(compute_digests(jnp.asarray(array[::-1].copy()))) != wanted
