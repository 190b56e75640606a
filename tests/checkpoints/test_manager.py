"""Checkpoints: what is kept, what is found again, damage that is noticed and set aside, disks that take nothing."""

import asyncio
import errno
import itertools
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.checkpoints import integrity as manifest
from dat_jax.checkpoints import manager as checkpoint
from dat_jax.checkpoints.manager import Checkpoints, DamagedError, compute_digests
from dat_jax.errors import UserError
from dat_jax.training.state import TrainState
from tests.helpers.logs import collect_logs

METADATA = {"examples": 8, "config": {"batch_size": 4, "model": {"dims": [1, 2]}}}


def make_state(step: int, *, width: int = 5) -> TrainState:
    """Arrays that are different at every step."""
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(30, width)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=width), jnp.bfloat16),
    }
    return TrainState(step=jnp.int32(step), params=params, model_state={}, opt_state=(), ema_params=None)


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def save(directory, scores: dict[int, float | None], **options) -> list[str]:
    with collect_logs() as messages, Checkpoints(directory, metric="score", **options) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(make_state(step), metadata=METADATA, metrics=None if score is None else {"score": score})
    return messages


def assert_is_of_step(state, step):
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype


def restore_newest(directory) -> tuple[int | None, list[str]]:
    """The step that is gone on from, its numbers compared, and what was said."""
    with collect_logs() as notes, Checkpoints(directory, metric="score") as checkpoints:
        found = checkpoints.restore_newest(abstract(make_state(0)))
    if found is None:
        return None, notes
    assert found[1] == METADATA
    assert_is_of_step(found[0], int(found[0].step))
    return int(found[0].step), notes


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.2, 2: 0.9, 3: 0.5, 4: None, 5: 0.4, 6: None})
    (tmp_path / "7").mkdir()  # a stray empty folder is no checkpoint
    with Checkpoints(tmp_path, metric="score", read_only=True) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 6)
        for step in (2, 5, 6):
            state, metadata = checkpoints.restore(step, abstract(make_state(0)))
            assert metadata == METADATA
            assert_is_of_step(state, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6", "7"]


def test_of_equals_the_newest_is_the_best_and_without_evaluations_the_newest(tmp_path):
    save(tmp_path / "a", {1: 0.5, 2: 0.5, 3: 0.1})
    save(tmp_path / "b", {1: None, 2: None})
    for name, best in (("a", 2), ("b", 2)):
        with Checkpoints(tmp_path / name, metric="score", read_only=True) as checkpoints:
            assert checkpoints.best_step() == best


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


def test_what_a_killed_run_left_is_set_aside_and_said(tmp_path):
    save(tmp_path, {1: 0.2})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "state").write_text("something")
    step, notes = restore_newest(tmp_path)
    assert step == 1
    assert len(notes) == 2
    assert re.search(r"2\.orbax-checkpoint-tmp is an unfinished save and was moved to .*set_aside/2\.orbax", notes[0])
    assert re.search(r"/7 is not a complete checkpoint and was moved to .*set_aside/7", notes[1])
    assert (tmp_path / checkpoint.SET_ASIDE / "7" / "state").read_text() == "something"
    assert save(tmp_path, {2: 0.3}) == []  # no step hides it


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert restore_newest(tmp_path) == (None, [])
    with Checkpoints(tmp_path, metric="score") as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (None, None)


def test_arrays_that_are_not_the_saved_ones_are_named(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.0})
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    manifest.write_manifest(tmp_path / "2")
    with (
        Checkpoints(tmp_path, metric="score") as checkpoints,
        pytest.raises(DamagedError, match=r"2 is damaged: .*params/kernel.* differ from what was saved"),
    ):
        checkpoints.restore(2, abstract(make_state(0)))


def test_another_shape_is_refused_and_nothing_is_set_aside(tmp_path):
    save(tmp_path, {1: 0.1})
    with (
        Checkpoints(tmp_path, metric="score") as checkpoints,
        pytest.raises(UserError, match=r"params/kernel is \(30, 5\), wanted \(30, 6\)"),
    ):
        checkpoints.restore_newest(abstract(make_state(0, width=6)))
    assert restore_newest(tmp_path) == (1, [])


def _flip(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    start = max(0, len(data) // 2 - 8)
    for place in range(start, min(start + 16, len(data))):
        data[place] ^= 0xFF
    path.write_bytes(data)


def _truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {"flipped": _flip, "truncated": _truncate, "deleted": pathlib.Path.unlink}


def test_every_damage_is_detected_and_the_one_before_is_used(tmp_path):
    """Every file of the newest checkpoint, flipped by 16 bytes, truncated, deleted; and whole parts of it gone."""
    original = tmp_path / "original"
    save(original, {1: 0.1, 2: 0.2})
    files = sorted(path.relative_to(original) for path in (original / "2").rglob("*") if path.is_file())
    cases = [(str(file), *damage) for file, damage in itertools.product(files, DAMAGE.items())]
    cases += [(name, "removed", lambda path: shutil.rmtree(path)) for name in ("2/state", "2/meta", "2/metrics")]
    assert len(cases) >= 50
    assert any("manifest.ocdbt" in name for name, *_ in cases)
    for number, (name, what, damage) in enumerate(cases):
        directory = shutil.copytree(original, tmp_path / str(number))
        damage(directory / name)
        step, notes = restore_newest(directory)  # compares every number
        assert (step, len(notes)) == (1, 1), (name, what, notes)
        assert "2 is" in notes[0]
        assert "\n" not in notes[0]
        assert (directory / checkpoint.SET_ASIDE / "2").is_dir()
        shutil.rmtree(directory)


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path, monkeypatch):
    original = checkpoint.ocp.StandardCheckpointHandler.async_save

    async def full(*_, **__):
        # The thread that writes the rest is done by then: one that is overtaken by the tidying up ends in an error of its own.
        await asyncio.sleep(0.5)
        raise OSError(errno.ENOSPC, "No space left on device")

    with collect_logs() as notes, Checkpoints(tmp_path, metric="score") as checkpoints:
        assert checkpoints.save(make_state(1), metadata=METADATA, metrics={"score": 0.1})
        checkpoints.wait()
        monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "async_save", full)
        checkpoints.save(make_state(2), metadata=METADATA, metrics={"score": 0.2})
        checkpoints.wait()
        monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "async_save", original)
        assert checkpoints.steps() == [1]
        assert len(notes) == 1
        assert notes[0] == (
            "Step 2 could not be saved: No space left on device. The checkpoint of step 1 is untouched, and the "
            "next one will be tried."
        )
        assert checkpoints.save(make_state(3), metadata=METADATA, metrics={"score": 0.3})
        assert checkpoints.steps() == [1, 3]
    assert restore_newest(tmp_path) == (3, [])


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
