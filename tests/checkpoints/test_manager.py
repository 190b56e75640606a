"""Checkpoints of a run: which are kept, which is restored, damage that is detected, and saves that fail."""

import asyncio
import dataclasses
import errno
import itertools
import pathlib
import re
import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dat_jax.checkpoints import manager
from dat_jax.checkpoints.directory import SET_ASIDE
from dat_jax.checkpoints.integrity import DamagedError, write_manifest
from dat_jax.checkpoints.manager import Checkpoints
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
    """Save steps with their scores. Returns what was logged."""
    with collect_logs() as messages, Checkpoints(directory, metric="score", **options) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(make_state(step), metadata=METADATA, metrics=None if score is None else {"score": score})
    return messages


def assert_state_of_step(state, step):
    for actual, expected in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype


def restore_newest(directory) -> tuple[int | None, list[str]]:
    """The restored step, after a comparison of its arrays, and what was logged."""
    with collect_logs() as messages, Checkpoints(directory, metric="score") as checkpoints:
        restored = checkpoints.restore_newest(abstract(make_state(0)))
    if restored is None:
        return None, messages
    state, metadata = restored
    assert metadata == METADATA
    assert_state_of_step(state, int(state.step))
    return int(state.step), messages


def test_a_relative_directory_is_restored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(pathlib.Path("runs/checkpoints"), {1: 0.2, 2: 0.9})
    assert restore_newest(pathlib.Path("runs/checkpoints")) == (2, [])


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.2, 2: 0.9, 3: 0.5, 4: None, 5: 0.4, 6: None})
    (tmp_path / "7").mkdir()  # an empty folder is not a checkpoint
    with Checkpoints(tmp_path, metric="score", read_only=True) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 6)
        for step in (2, 5, 6):
            state, metadata = checkpoints.restore(step, abstract(make_state(0)))
            assert metadata == METADATA
            assert_state_of_step(state, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6", "7"]


def test_the_best_step_is_the_newest_of_equals_and_the_latest_without_evaluations(tmp_path):
    save(tmp_path / "a", {1: 0.5, 2: 0.5, 3: 0.1})
    save(tmp_path / "b", {1: None, 2: None})
    for name, best in (("a", 2), ("b", 2)):
        with Checkpoints(tmp_path / name, metric="score", read_only=True) as checkpoints:
            assert checkpoints.best_step() == best


def test_saving_an_earlier_step_is_an_error(tmp_path):
    with pytest.raises(UserError, match="Step 2 was not saved: .* later step"):
        save(tmp_path, {3: 0.2, 2: 0.3})


def test_a_reader_does_not_move_a_save_in_progress(tmp_path):
    save(tmp_path, {1: 0.2})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, metric="score", read_only=True) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (1, 1)
        assert int(checkpoints.restore(1, abstract(make_state(0)))[0].step) == 1
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()


def test_the_remains_of_a_killed_run_are_set_aside_and_logged(tmp_path):
    save(tmp_path, {1: 0.2})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "state").write_text("something")
    step, messages = restore_newest(tmp_path)
    assert step == 1
    assert len(messages) == 2
    assert re.search(r"2\.orbax-checkpoint-tmp is an unfinished save .*set_aside/2\.orbax", messages[0])
    assert re.search(r"/7 is not a complete checkpoint .*set_aside/7", messages[1])
    assert (tmp_path / SET_ASIDE / "7" / "state").read_text() == "something"
    assert save(tmp_path, {2: 0.3}) == []
    (tmp_path / "7").mkdir()
    restore_newest(tmp_path)
    assert sorted(path.name for path in (tmp_path / SET_ASIDE).iterdir()) == ["2.orbax-checkpoint-tmp", "7", "7-2"]


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert restore_newest(tmp_path) == (None, [])
    with Checkpoints(tmp_path, metric="score") as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (None, None)


def test_a_directory_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints cannot be opened: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints", metric="score")


def test_arrays_of_another_step_are_detected_and_named(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.0})
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    write_manifest(tmp_path / "2")
    with (
        Checkpoints(tmp_path, metric="score") as checkpoints,
        pytest.raises(DamagedError, match=r"2 is damaged: .*params/kernel differs"),
    ):
        checkpoints.restore(2, abstract(make_state(0)))


def test_another_shape_is_an_error_and_nothing_is_set_aside(tmp_path):
    save(tmp_path, {1: 0.1})
    with (
        Checkpoints(tmp_path, metric="score") as checkpoints,
        pytest.raises(UserError, match=r"params/kernel: expected \(30, 6\), got \(30, 5\)"),
    ):
        checkpoints.restore_newest(abstract(make_state(0, width=6)))
    assert restore_newest(tmp_path) == (1, [])


def test_a_field_that_was_unknown_when_the_checkpoint_was_written_keeps_its_value(tmp_path):
    fields = {field.name: getattr(make_state(1), field.name) for field in dataclasses.fields(TrainState)}
    assert fields.pop("further_averages") is None  # added after 0.1.0
    earlier = flax.struct.dataclass(type("EarlierState", (), {"__annotations__": dict.fromkeys(fields, Any)}))
    with Checkpoints(tmp_path, metric="score") as checkpoints:
        checkpoints.save(earlier(**fields), metadata=METADATA)
        checkpoints.wait()
        state, _ = checkpoints.restore(1, abstract(make_state(0)))
        assert_state_of_step(state, 1)
        assert state.further_averages is None
        averaged = make_state(0).replace(further_averages={"0.9": make_state(0).params})
        with pytest.raises(UserError, match=r"further_averages/0\.9/bias: expected \(5,\), got nothing"):
            checkpoints.restore(1, abstract(averaged))


def _flip(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    start = max(0, len(data) // 2 - 8)
    for place in range(start, min(start + 16, len(data))):
        data[place] ^= 0xFF
    path.write_bytes(data)


def _truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {"flipped": _flip, "truncated": _truncate, "deleted": pathlib.Path.unlink}


def test_damage_of_any_file_is_detected_and_the_previous_checkpoint_is_used(tmp_path):
    """Every file of the newest checkpoint: 16 bytes flipped, truncated, or deleted; and whole folders deleted."""
    original = tmp_path / "original"
    save(original, {1: 0.1, 2: 0.2})
    files = sorted(path.relative_to(original) for path in (original / "2").rglob("*") if path.is_file())
    cases = [(str(file), *damage) for file, damage in itertools.product(files, DAMAGE.items())]
    cases += [(name, "removed", lambda path: shutil.rmtree(path)) for name in ("2/state", "2/meta", "2/metrics")]
    assert len(cases) >= 50
    assert any("manifest.ocdbt" in name for name, *_ in cases)
    for number, (name, kind, damage) in enumerate(cases):
        directory = shutil.copytree(original, tmp_path / str(number))
        damage(directory / name)
        step, messages = restore_newest(directory)  # compares all arrays
        assert (step, len(messages)) == (1, 1), (name, kind, messages)
        assert "2 is" in messages[0]
        assert "\n" not in messages[0]
        assert (directory / SET_ASIDE / "2").is_dir()
        shutil.rmtree(directory)


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path, monkeypatch):
    original = manager.ocp.StandardCheckpointHandler.async_save

    async def fail(*_, **__):
        # Orbax's thread that writes the rest must be done by then: if the cleanup overtakes it, it raises its own error.
        await asyncio.sleep(0.5)
        raise OSError(errno.ENOSPC, "No space left on device")

    with collect_logs() as messages, Checkpoints(tmp_path, metric="score") as checkpoints:
        assert checkpoints.save(make_state(1), metadata=METADATA, metrics={"score": 0.1})
        checkpoints.wait()
        monkeypatch.setattr(manager.ocp.StandardCheckpointHandler, "async_save", fail)
        checkpoints.save(make_state(2), metadata=METADATA, metrics={"score": 0.2})
        checkpoints.wait()
        monkeypatch.setattr(manager.ocp.StandardCheckpointHandler, "async_save", original)
        assert checkpoints.steps() == [1]
        assert len(messages) == 1
        assert re.match("Step 2 could not be saved: No space left on device. The checkpoint of step 1", messages[0])
        assert checkpoints.save(make_state(3), metadata=METADATA, metrics={"score": 0.3})
        assert checkpoints.steps() == [1, 3]
    assert restore_newest(tmp_path) == (3, [])


def test_another_number_of_states_without_arrays_is_no_damage(tmp_path):
    """Adafactor with and without clipping has the same arrays. The checkpoint stays where it is, and is not called damaged."""
    opt_state = optax.EmptyState(), {"count": jnp.zeros(2)}
    states = [make_state(3).replace(opt_state=(*opt_state, *more)) for more in ((), (optax.EmptyState(),))]
    with Checkpoints(tmp_path, metric="score") as checkpoints:
        checkpoints.save(states[0], metadata=METADATA)
        checkpoints.wait()
        assert checkpoints.restore_newest(abstract(states[0])) is not None
        with pytest.raises(
            UserError, match=r"another model or optimizer: opt_state/2: expected no arrays, got nothing"
        ):
            checkpoints.restore_newest(abstract(states[1]))
        assert checkpoints.steps() == [3]
