"""Weights & Biases beside metrics.jsonl, with a stand-in for its package."""

import json
import sys
import threading
import types

import pytest

from dat_jax.errors import UserError
from dat_jax.training.monitoring.metrics import MetricWriter
from dat_jax.training.monitoring.sinks import WandbSink, check_sinks, sink_factories
from tests.helpers.logs import collect_logs


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


def write(directory, names=("wandb",)) -> list[str]:
    """Write two steps; returns the logged messages."""
    sinks = sink_factories(names, directory, config={"seed": 0})
    with collect_logs() as messages, MetricWriter(directory, sinks=sinks) as writer:
        writer.write(5, {"loss": 2.0}, prefix="train")
        writer.write(10, {"loss": 1.0}, prefix="train")
    return messages


def test_a_resumed_run_continues_the_same_run(wandb, tmp_path):
    assert write(tmp_path) == []
    assert write(tmp_path) == []
    first, second = wandb.runs
    assert first.logged == second.logged == [{"step": 5, "train/loss": 2.0}, {"step": 10, "train/loss": 1.0}]
    assert first.options == second.options
    assert (first.options["resume"], first.options["config"]) == ("allow", {"seed": 0})
    assert first.options["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert first.finished
    assert not (tmp_path / "tensorboard").exists()
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", ("tensorboard",))
    assert len(wandb.runs) == 2
    assert (tmp_path / "other" / "tensorboard").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_is_logged_once_and_does_not_end_the_run(wandb, tmp_path, fails):
    wandb.fails = fails
    (message,) = write(tmp_path)
    assert message.startswith("Weights & Biases")
    assert "\n" not in message
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10]


def test_a_network_that_hangs_does_not_block_the_run(wandb, tmp_path):
    wandb.fails = "hang"
    with collect_logs() as messages:
        WandbSink(tmp_path, config={}, finish_seconds=0.05).close()
    assert "it took more than 0.05 s" in messages[0]


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="config.logs .*wandb.* not installed"):
        check_sinks(("tensorboard", "wandb"))
    check_sinks(("tensorboard",))
