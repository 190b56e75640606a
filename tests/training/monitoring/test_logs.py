"""Weights & Biases beside metrics.jsonl, with a stand-in for its package."""

import json
import sys
import threading
import types

import pytest

from dat_jax.errors import UserError
from dat_jax.training.monitoring.logs import WandbLog, check_logs, choose_logs
from dat_jax.training.monitoring.metrics import MetricWriter


class FakeRun:
    def __init__(self, options, *, fails=""):
        self.options, self.fails, self.logged, self.finished = options, fails, [], False

    def define_metric(self, name, *, step_metric):
        assert step_metric == "step"

    def log(self, values):
        if self.fails == "log":
            raise ConnectionError("network is unreachable\nand more")
        self.logged.append(values)

    def finish(self):
        if self.fails == "finish":
            raise ConnectionError("timed out")
        if self.fails == "hang":
            threading.Event().wait(20)
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """Its ``runs`` are those begun; ``fails`` is what goes wrong in the next one."""
    module = types.ModuleType("wandb")
    module.runs, module.fails = [], ""

    def init(**options):
        if module.fails == "init":
            raise RuntimeError("api_key not configured")
        module.runs.append(FakeRun(options, fails=module.fails))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write(directory, notes, names=("wandb",)):
    logs = choose_logs(names, directory, config={"seed": 0}, note=notes.append)
    with MetricWriter(directory, logs=logs, note=notes.append) as writer:
        writer.write(5, {"loss": 2.0}, prefix="train")
        writer.write(10, {"loss": 1.0}, prefix="train")


def test_a_resumed_run_goes_on_in_the_same_run(wandb, tmp_path):
    notes = []
    write(tmp_path, notes)
    write(tmp_path, notes)
    first, second = wandb.runs
    assert first.logged == second.logged == [{"step": 5, "train/loss": 2.0}, {"step": 10, "train/loss": 1.0}]
    assert first.options == second.options
    assert (first.options["resume"], first.options["config"]) == ("allow", {"seed": 0})
    assert first.options["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert first.finished
    assert notes == []
    assert not (tmp_path / "tensorboard").exists()
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", notes, ("tensorboard",))
    assert len(wandb.runs) == 2
    assert (tmp_path / "other" / "tensorboard").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_what_fails_there_is_said_once_and_the_run_goes_on(wandb, tmp_path, fails):
    wandb.fails, notes = fails, []
    write(tmp_path, notes)
    assert len(notes) == 1
    assert notes[0].startswith("WARNING: Weights & Biases")
    assert "\n" not in notes[0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10]


def test_a_network_that_hangs_is_not_waited_for(wandb, tmp_path):
    wandb.fails, notes = "hang", []
    WandbLog(tmp_path, config={}, note=notes.append, finish_seconds=0.05).close()
    assert "it took more than 0.05 s" in notes[0]


def test_a_missing_package_is_said_at_once(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="config.logs has wandb, which is not installed"):
        check_logs(("tensorboard", "wandb"))
    check_logs(("tensorboard",))
