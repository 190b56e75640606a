"""What goes wrong around a run: numbers, signals, disks, images, workers; in this process, on a small model."""

import dataclasses
import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dat_jax.checkpoints import manager as checkpoint
from dat_jax.data import batching, sources
from dat_jax.errors import UserError
from dat_jax.training import loop
from dat_jax.training.monitoring.input import ImageCounter, StallWarning
from dat_jax.training.monitoring.metrics import MetricWriter, read_metrics
from tests.helpers import tiny_config
from tests.helpers.logs import collect_logs
from tests.training.test_loop import with_values

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A program for one device compiles in half the time."""
    monkeypatch.setattr(loop, "Trainer", functools.partial(loop.Trainer, devices=jax.devices()[:1]))


def poison(monkeypatch, *steps):
    """The loss of these steps is NaN, and so is its gradient."""
    make_trainer = loop.Trainer

    def make_poisoned_trainer(config):
        trainer = make_trainer(config)
        original_loss, train_batches = trainer.objective.loss, trainer.train_batches

        def loss(variables, batch, key):
            inputs = {"image": batch["image"], "label": batch["label"]}
            value, metrics, model_state = original_loss(variables, inputs, key)
            value = value * batch["factor"].mean()
            return value, metrics | {"loss": value}, model_state

        def poisoned_batches(*, start_step):
            for step, batch in enumerate(train_batches(start_step=start_step), start=start_step + 1):
                factor = np.nan if step in steps else 1.0
                yield batch | {"factor": np.full(len(batch["label"]), factor, np.float32)}

        trainer.objective = dataclasses.replace(trainer.objective, loss=loss)
        trainer.train_batches = poisoned_batches
        return trainer

    monkeypatch.setattr(loop, "Trainer", make_poisoned_trainer)


def change_batches(monkeypatch, change):
    """Every trainer's training batches become change(original batches, start_step)."""
    make_trainer = loop.Trainer

    def make_changed_trainer(config):
        trainer = make_trainer(config)
        train_batches = trainer.train_batches
        trainer.train_batches = lambda *, start_step: change(train_batches(start_step=start_step), start_step)
        return trainer

    monkeypatch.setattr(loop, "Trainer", make_changed_trainer)


def restore(directory, step):
    trainer = loop.Trainer(tiny_config.get_config())
    with checkpoint.Checkpoints(directory / "checkpoints", metric="top1", read_only=True) as checkpoints:
        return checkpoints.restore(step, trainer.abstract_state)[0]


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 7)
    result = loop.train(with_values(spike_factor=3.0), str(tmp_path))
    assert result["examples"] == 50
    series = read_metrics(tmp_path / "metrics.jsonl")
    assert series["train/skipped"] == {10: 1, 15: 1, 20: 1}
    assert all(np.isfinite(value) for value in series["train/loss"].values())
    assert list(series["train/loss"]) == [5, 10, 15, 20]
    (line,) = (tmp_path / "loss_spikes.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["step"], record["loss"], len(record["images"])) == (7, None, 16)
    assert "step 7: loss nan" in capsys.readouterr().out
    state = restore(tmp_path, 20)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (20, 1, 0)


def test_too_many_in_a_row_end_the_run_with_the_state_before_them(tmp_path, monkeypatch):
    config = {"max_skipped_steps": 3, "epochs": 3, "log_every": 1}
    with monkeypatch.context() as patch:
        poison(patch, 7, *range(20, 31))
        with pytest.raises(UserError, match=r"3 steps in a row .*from step 20 on\. The checkpoint of step 19 has the"):
            loop.train(with_values(**config), str(tmp_path))
    state = restore(tmp_path, 19)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (19, 1, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
    # Mended, it goes on from there.
    loop.train(with_values(**config), str(tmp_path))
    assert list(read_metrics(tmp_path / "metrics.jsonl")["eval/top1"]) == [10, 20, 30]


def test_the_state_before_the_skipped_steps_is_that_of_a_run_without_them(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch)
        loop.train(with_values(**{"checkpoint.every": 14}), str(tmp_path / "healthy"))
    poison(monkeypatch, *range(15, 21))
    with pytest.raises(UserError, match="The checkpoint of step 14 has the state before them"):
        loop.train(with_values(max_skipped_steps=2), str(tmp_path / "sick"))
    healthy, sick = restore(tmp_path / "healthy", 14), restore(tmp_path / "sick", 14)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sick), jax.device_get(healthy))


def test_a_signal_saves_the_next_step_and_the_run_goes_on_from_it(tmp_path, monkeypatch, capsys):
    whole = loop.train(tiny_config.get_config(), str(tmp_path / "whole"))

    def with_signal(batches, start_step):
        for step, batch in enumerate(batches, start=start_step + 1):
            if step == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        change_batches(patch, with_signal)
        assert loop.train(tiny_config.get_config(), str(tmp_path / "stopped")) == {}
    assert signal.getsignal(signal.SIGTERM) is handler
    stopped = tmp_path / "stopped"
    printed = capsys.readouterr().out
    assert f"Ended by SIGTERM at step 13. Saved in {stopped}/checkpoints/13." in printed
    assert f"python -m dat_jax.main --config=FILE --workdir={stopped}\n" in printed
    assert "Unfinished: ended by SIGTERM at step 13 of 20." in (stopped / "summary.md").read_text()
    assert int(restore(tmp_path / "stopped", 13).step) == 13
    assert loop.train(tiny_config.get_config(), str(tmp_path / "stopped")) == whole
    for name in ("train/loss", "eval/loss"):
        steps, wanted = (read_metrics(tmp_path / run / "metrics.jsonl")[name] for run in ("stopped", "whole"))
        assert steps[20] == wanted[20]
    stopped, wanted = (restore(tmp_path / run, 20) for run in ("stopped", "whole"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(stopped), jax.device_get(wanted))


def test_the_second_signal_ends_at_once():
    code = (
        "import os, signal, time, jax\n"
        "from dat_jax.cli.console import configure_logging\n"
        "from dat_jax.training.preemption import Preemption\n"
        "from dat_jax.parallel.sharding import make_mesh\n"
        "configure_logging()\n"
        "with Preemption(make_mesh(data=-1, fsdp=1)) as preemption:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert preemption.should_stop()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(20)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGTERM
    assert "SIGTERM received" in ended.stdout


def test_a_full_disk_costs_checkpoints_and_not_the_run(tmp_path, monkeypatch, capsys):
    handler = checkpoint.ocp.StandardCheckpointHandler

    async def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def train_until_full(step):
        def filling(batches, start_step):
            for index, batch in enumerate(batches, start=start_step + 1):
                if index == step:
                    monkeypatch.setattr(handler, "async_save", full)
                yield batch

        change_batches(monkeypatch, filling)
        return loop.train(with_values(**{"checkpoint.every": 3}), str(tmp_path))

    result = train_until_full(14)
    assert result["examples"] == 50
    printed = capsys.readouterr().out
    assert re.search("WARNING: .*15.* could not be saved: No space left on device", printed)
    assert "The checkpoint of step 12 is untouched" in printed
    assert list(read_metrics(tmp_path / "metrics.jsonl")["eval/top1"]) == [10, 20]
    assert int(restore(tmp_path, 12).step) == 12


def test_metrics_that_cannot_be_written_wait(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tr')  # of a killed run
    with collect_logs() as messages, MetricWriter(tmp_path) as writer:
        writer.write(2, {"loss": 2.0}, prefix="train")
        with monkeypatch.context() as patch:
            opened = type(path).open

            def full(self, mode="r", *args, **kwargs):
                if "a" in mode:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return opened(self, mode, *args, **kwargs)

            patch.setattr(type(path), "open", full)
            writer.write(3, {"loss": 3.0}, prefix="train")
            writer.write(4, {"loss": 4.0}, prefix="train")
        assert len(messages) == 1
        assert "No space left on device" in messages[0]
        writer.write(5, {"loss": 5.0}, prefix="train")
    assert read_metrics(path)["train/loss"] == {step: float(step) for step in range(1, 6)}


# Data


@dataclasses.dataclass(frozen=True)
class PartlyDamaged:
    """Records of ``EncodedSource``: 16 x 16 PNGs, of which every n-th is not one."""

    count: int
    every: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((16, 16, 3), index % 256, np.uint8)
        data = sources.np.zeros(8, np.uint8).tobytes() if index % self.every == 0 else _encode(image)
        return data, index % 2, f"image_{index}.png"


def _encode(image):
    import cv2

    return cv2.imencode(".png", image)[1].tobytes()


def damaged_batches(every, *, batches, max_damaged=0.2, workers=0):
    """Count damaged images in batches of 16 from a source of 400; returns the summary, the notes and the warnings."""
    source = sources.EncodedSource(PartlyDamaged(400, every), ("a", "b"), skip_damaged=True)
    counter = ImageCounter(
        max_damaged,
        count=len(source),
        example_indices=lambda step: batching.example_indices(len(source), seed=0, step=step, batch_size=16),
        describe=functools.partial(sources.describe_damage, source),
    )
    loaded = batching.make_train_batches(source, lambda record, _: record, batch_size=16, seed=0, workers=workers)
    with collect_logs() as messages:
        for step, batch in zip(range(1, batches + 1), loaded, strict=False):
            counter.on_batch(step, batch)
            assert set(batch) == {"image", "label"}
    named = [message for message in messages if "image_" in message]
    return counter.on_log(0, []), [message for message in messages if message not in named], named


def test_damaged_images_are_skipped_counted_and_named():
    summary, notes, named = damaged_batches(20, batches=25)  # one epoch: every image once
    assert summary == {"damaged_images": 20}
    assert notes == []
    assert {f"image_{index}.png" for index in range(0, 400, 20)} == {message.split()[2] for message in named}


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_images_end_the_run(workers):
    with pytest.raises(UserError, match=r"\d+ of \d+ images could not be read, .*config.data.max_damaged 0.2"):
        damaged_batches(2, batches=25, workers=workers)


def test_a_run_names_the_images_of_a_batch_as_it_loads_them():
    source = sources.ArraySource(np.zeros((50, 1, 1, 3), np.uint8), np.arange(50), ("a",))
    loaded = batching.make_train_batches(source, lambda record, _: record, batch_size=16, seed=5)
    for step in range(1, 6):
        wanted = next(loaded)["label"].tolist()
        assert batching.example_indices(50, seed=5, step=step, batch_size=16) == wanted


def test_a_stalled_pipeline_says_so():
    hook = StallWarning(0.1)
    with collect_logs() as messages:
        for seconds in (0.0, 0.35, 0.0):
            hook.before_batch(1)
            time.sleep(seconds)
            hook.on_batch(1, {})
        time.sleep(0.2)
    assert 2 <= len(messages) <= 4
    assert "has not delivered a batch for 0 s" in messages[0]


def test_a_killed_worker_is_said_and_not_waited_for():
    """In a process of its own, which must end by itself."""
    code = """
import os, pathlib, signal, time
import numpy as np
from dat_jax.data import batching, sources
from dat_jax.errors import UserError
def slow(record, _):
    time.sleep(0.01)
    return record
if __name__ == "__main__":
    source = sources.ArraySource(np.zeros((5000, 1, 1, 3), np.uint8), np.arange(5000), ("a",))
    loaded = batching.make_train_batches(source, slow, batch_size=16, seed=0, workers=2)
    next(loaded)
    children = [int(pid) for task in pathlib.Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    workers = [pid for pid in children if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2, workers
    os.kill(workers[0], signal.SIGKILL)
    start = time.monotonic()
    try:
        for _ in range(500):
            next(loaded)
    except UserError as error:
        print(f"after {time.monotonic() - start:.0f} s: {error}")
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert "A data worker died" in ended.stdout, ended.stdout + ended.stderr[-2000:]
