"""Whole runs in a work directory: files, resuming, going on, evaluation, and what stops a run."""

import itertools
import json
import re
import shutil
import time

import jax
import pytest

from dat_jax.errors import UserError
from dat_jax.training import loop
from dat_jax.training.monitoring.metrics import read_metrics
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work directory after two epochs, and what training returned."""
    directory = tmp_path_factory.mktemp("finished")
    start = time.monotonic()
    result = loop.train(tiny_config.get_config(), str(directory))
    (directory / "seconds").write_text(str(time.monotonic() - start))
    return directory, result


def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def with_values(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict(values)
    return config.lock()


def test_a_run_learns_and_leaves_its_files(finished):
    directory, result = finished
    assert result["examples"] == 50
    assert result["top1"] > 80  # chance is 50
    names = {path.name for path in directory.iterdir()}
    assert names >= {"checkpoints", "config.json", "metrics.jsonl", "tensorboard"}
    assert names >= {"curves.png", "predictions.png", "sampled_points.png"}
    assert json.loads((directory / "config.json").read_text())["batch_size"] == 16
    series = read_metrics(directory / "metrics.jsonl")
    assert list(series["train/loss"]) == [5, 10, 15, 20]
    assert list(series["eval/top1"]) == [10, 20]
    assert result["top1"] == max(series["eval/top1"].values())
    assert series["train/images_per_second"][20] > 0
    assert series["train/host_memory_gib"][20] >= series["train/host_memory_gib"][5] > 0.05
    assert not (directory / "profile").exists()
    summary = (directory / "summary.md").read_text()
    assert "All 20 steps are done." in summary
    assert f"| eval/top1 | {result['top1']:.4g} (" in summary
    assert {f"![{name}]({name}.png)" in summary for name in ("curves", "predictions", "sampled_points")} == {True}


def read_seconds(directory):
    """Activity -> {step: seconds} of a run."""
    series = read_metrics(directory / "metrics.jsonl")
    return {name.removeprefix("time/"): values for name, values in series.items() if name.startswith("time/")}


def test_the_time_of_a_run_is_accounted_for(finished):
    directory, _ = finished
    seconds = read_seconds(directory)
    assert {"start", "compilation", "steps", "input", "evaluation", "saving", "other"} == set(seconds)
    logged = sum(values[20] for values in seconds.values())
    assert sum(values[10] for values in seconds.values()) < logged
    wall_time = float((directory / "seconds").read_text())
    summary = (directory / "summary.md").read_text().partition("## Time of all calls")[2]
    rows = re.findall(r"^\| [a-z].* \| (?:(\d+):)?(\d+):(\d+) \| ([\d.]+) \|$", summary, re.MULTILINE)
    total = sum(3600 * int(hours or 0) + 60 * int(minutes) + int(seconds) for hours, minutes, seconds, _ in rows)
    assert total == pytest.approx(wall_time, abs=0.5 * len(rows) + 0.5)  # each is rounded to a second
    assert sum(float(percent) for *_, percent in rows) == pytest.approx(100, abs=0.05 * len(rows))
    assert logged < wall_time


@pytest.mark.slow
def test_a_finished_run_ends_at_once_and_eval_gives_the_same(finished, tmp_path, capsys):
    directory = copy(finished, tmp_path)
    before = (directory / "metrics.jsonl").read_text()
    assert loop.train(tiny_config.get_config(), str(directory)) == finished[1]
    assert "All 2 epochs are done" in capsys.readouterr().out
    assert (directory / "metrics.jsonl").read_text() == before
    assert loop.evaluate(tiny_config.get_config(), str(directory)) == finished[1]
    capsys.readouterr()
    latest = loop.evaluate(with_values(**{"eval.checkpoint": "latest"}), str(directory), quiet=True)
    assert re.fullmatch(r"top1 .*loss .*step 20 in .*checkpoints\n", capsys.readouterr().out)
    assert latest["top1"] == read_metrics(directory / "metrics.jsonl")["eval/top1"][20]


@pytest.mark.slow
def test_more_epochs_go_on_from_the_last_step(finished, tmp_path, capsys, monkeypatch):
    directory = copy(finished, tmp_path)
    traced = []  # the profiler itself is tested in a process of its own: beside a loaded libtpu it crashes
    monkeypatch.setattr(jax.profiler, "start_trace", traced.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("stop"))
    loop.train(with_values(epochs=3, profile=2), str(directory))
    printed = capsys.readouterr().out
    assert "Resumed at step 20 of 30" in printed
    assert "Profile of steps 24 to 25 in" in printed
    assert traced == [str(directory / "profile"), "stop"]
    assert list(read_metrics(directory / "metrics.jsonl")["eval/top1"]) == [10, 20, 30]


def test_an_interrupted_run_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch, it repeats that epoch from the checkpoint of the first."""
    original = loop.Trainer

    class StopsAt15(original):
        def train_batches(self, *, start_step):
            yield from itertools.islice(super().train_batches(start_step=start_step), 15 - start_step)
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Trainer", StopsAt15)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny_config.get_config(), str(tmp_path))
    monkeypatch.setattr(loop, "Trainer", original)
    assert loop.train(tiny_config.get_config(), str(tmp_path)) == finished[1]
    whole, resumed = (read_metrics(path / "metrics.jsonl")["train/loss"] for path in (finished[0], tmp_path))
    assert resumed == whole
    seconds = read_seconds(tmp_path)
    assert seconds["lost"][15] > 0  # of step 15, which the first call has logged and not saved
    assert seconds["lost"][20] == seconds["lost"][15]
    assert seconds["steps"][20] > seconds["steps"][15]


def test_a_checkpoint_of_another_model_is_refused_and_kept(finished, tmp_path):
    directory = copy(finished, tmp_path)
    other = tiny_config.get_config(dims=(24,))
    for call in (loop.train, loop.evaluate):
        with pytest.raises(UserError, match="is of another model: model.dims"):
            call(other, str(directory))
    assert loop.evaluate(tiny_config.get_config(), str(directory)) == finished[1]


def test_data_that_would_not_continue_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="started with batch_size 16, now 8"):
        loop.train(with_values(batch_size=8), str(copy(finished, tmp_path)))
    assert loop.evaluate(with_values(batch_size=8, seed=7), str(tmp_path / "copy")) == finished[1]
    with pytest.raises(UserError, match="started with seed 0, now 7"):
        loop.train(with_values(seed=7), str(copy(finished, tmp_path / "again")))


def test_evaluation_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="There are no checkpoints in"):
        loop.evaluate(tiny_config.get_config(), str(tmp_path))
    (tmp_path / "checkpoints" / "30").mkdir(parents=True)  # a stray empty folder is no checkpoint, and hides none
    with pytest.raises(UserError, match="There is no complete checkpoint"):
        loop.evaluate(tiny_config.get_config(), str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 41}, "batch_size 41 is not a multiple of 8: 8 devices times 1"),
        ({"accumulate_steps": 3}, "batch_size 16 is not a multiple of 24: 8 devices times 3"),
        ({"eval.batch_size": 100}, "eval.batch_size 100 is not a multiple of 8 devices"),
        ({"batch_size": 168}, "larger than the 160 training examples"),
        ({"mesh.data": 3}, "data=3 x fsdp=1 does not make up 8 devices"),
        ({"mesh.fsdp": 3}, "does not make up 8 devices"),
        ({"data.name": "mnist"}, "Unknown data set 'mnist'; choose one of mnist5k, halves"),
        ({"data.image_size": 16}, "config.model cannot be built: DAT .* images .* at least 32 pixels, got"),
        ({"model.name": "dat_pp_nanno"}, "Unknown model 'dat_pp_nanno', did you mean 'dat_pp_nano'"),
        ({"model.dtype": "float16"}, "config.model.dtype must be one of auto, float32, bfloat16, got 'float16'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message, tmp_path):
    assert len(jax.devices()) == 8
    with pytest.raises(UserError, match=message):
        loop.train(with_values(**values), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_work_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"folder .* cannot be written: Not a directory"):
        loop.train(tiny_config.get_config(), str(tmp_path / "file" / "run"))
