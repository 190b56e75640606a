"""What the backward pass recomputes follows from the memory that a step may take."""

import json

import jax
import pytest

from dat_jax.errors import UserError
from dat_jax.profiling.step_report import report_step
from dat_jax.profiling.topologies import CHIPS
from dat_jax.training import loop
from dat_jax.training.memory_budget import POLICIES, choose_remat
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def with_budget(budget):
    config = tiny_config.get_config(stages=("NDND",)).unlock()
    config.update(memory_budget=budget, logs=())
    return config.lock()


def make_trainer(budget):
    return Trainer(with_budget(budget), devices=jax.devices()[:1])


def measure(trainer, policy):
    """Bytes of a training step on each device, by the report of the compiler."""
    return report_step(trainer.with_remat(policy), "train", chip=CHIPS["cpu"])["memory"]["peak"]


@pytest.fixture(scope="module")
def needed():
    """Bytes of a training step on one device with each choice."""
    trainer = make_trainer(0.0)
    return {policy: measure(trainer, policy) for policy in POLICIES}


def test_the_first_choice_that_fits_is_taken(needed, logs):
    assert needed["blocks"] < needed["none"]
    assert choose_remat(make_trainer(8.0)).config.model.remat == "none"
    trainer = make_trainer((needed["blocks"] + 1000) / 2**30)
    chosen = choose_remat(trainer)
    assert needed[chosen.config.model.remat] <= needed["blocks"] + 1000
    assert chosen.config.model.remat != "none"
    assert chosen.task.train_source is trainer.task.train_source
    assert any("remat none: the training step needs" in line and ", more than" in line for line in logs)


def test_without_a_budget_nothing_is_compiled(monkeypatch):
    trainer = make_trainer(0.0)
    monkeypatch.setattr(Trainer, "with_remat", lambda *_: pytest.fail("compiled"))
    assert choose_remat(trainer) is trainer


def test_a_budget_that_nothing_fits_and_devices_of_unknown_memory():
    with pytest.raises(UserError, match=r"does not fit into the .* of config\.memory_budget with any remat"):
        choose_remat(make_trainer(1e-4))
    with pytest.raises(UserError, match=r"config\.memory_budget=-1 needs devices whose memory is known, got cpu"):
        choose_remat(make_trainer(-1))


def test_a_run_records_its_choice_and_resumes(tmp_path):
    needed = measure(Trainer(with_budget(0.0)), "blocks")  # on all devices, as the run
    config = with_budget((needed + 1000) / 2**30).unlock()
    config.epochs = 1
    loop.train(config.lock(), str(tmp_path / "run"), quiet=True)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["model"]["remat"]
    assert recorded in POLICIES
    assert recorded != "none"
    config = with_budget(8.0).unlock()
    config.epochs = 2
    config.lock()
    assert loop.train(config, str(tmp_path / "run"), quiet=True)["examples"] == 50
    with config.unlocked():
        config.memory_budget = 1e-4  # a finished run has no step to fit
    assert loop.train(config, str(tmp_path / "run"), quiet=True)["examples"] == 50
