"""Several averages of the weights in one run: evaluated, saved, loaded and exported."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import dat_jax
from dat_jax import inference
from dat_jax.config import validate
from dat_jax.errors import UserError
from dat_jax.exporting import command
from dat_jax.training import loop
from dat_jax.training.averaging import make_average, make_further_averages
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config

DECAYS = (0.5, 0.9)


def with_values(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict({"logs": (), **values})
    return config.lock()


def run_steps(config, count=3):
    trainer = Trainer(config, devices=jax.devices()[:1])
    states = [trainer.initialize()]
    for batch in itertools.islice(trainer.train_batches(start_step=0), count):
        states.append(jax.device_get(trainer.train_step(jax.tree.map(jax.numpy.copy, states[-1]), batch)[0]))
    return trainer, states


@pytest.mark.parametrize("warmup", [False, True])
def test_further_averages_follow_the_weights_and_change_nothing_else(warmup):
    _, plain = run_steps(with_values(ema_decay=0.8, ema_warmup=warmup))
    _, states = run_steps(with_values(ema_decay=0.8, ema_warmup=warmup, ema_decays=DECAYS))
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(states[-1], name), getattr(plain[-1], name))
    weights = [np.asarray(state.params["cls_head"]["kernel"]) for state in states]
    for decay in DECAYS:
        average = weights[0]
        for step, after in enumerate(weights[1:]):
            used = min(decay, 1 - (1 + step) ** (-2 / 3)) if warmup else decay
            average = used * average + (1 - used) * after
        got = states[-1].further_averages[f"{decay:g}"]["cls_head"]["kernel"]
        np.testing.assert_allclose(got, average, rtol=1e-5, atol=1e-7)
    assert plain[-1].further_averages is None
    assert plain[-1].further_variables == {}


def test_frozen_parameters_of_further_averages_stay_bit_for_bit():
    config = with_values(ema_decays=DECAYS)
    with config.unlocked():
        config.optimizer.freeze = ("all_but_head",)
    _, states = run_steps(config)
    first = states[0].params["stages_0"]
    for average in states[-1].further_averages.values():
        jax.tree.map(np.testing.assert_array_equal, average["stages_0"], first)
        assert (average["cls_head"]["kernel"] != states[0].params["cls_head"]["kernel"]).any()


def test_names_of_averages():
    config = with_values(ema_decays=(0.9999, 0.5))
    assert list(make_further_averages(config)) == ["0.9999", "0.5"]
    assert make_average(config) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema_decays": (0.9, 0.9)}, r"config\.ema_decays must be numbers that differ"),
        ({"ema_decays": (0.9,), "ema_decay": 0.9}, r"and from config\.ema_decay 0\.9, got \(0\.9,\)"),
        ({"ema_decays": (1.0,)}, r"config\.ema_decays must be a tuple of numbers above 0 and below 1"),
        ({"ema_decays": (0.0,)}, r"config\.ema_decays must be a tuple of numbers above 0 and below 1"),
        (
            {"ema_decays": (0.9,), "optimizer.name": "schedule_free_adamw"},
            r"config\.ema_decays empty for schedule_free_adamw",
        ),
    ],
)
def test_decays_that_cannot_be_meant(values, message):
    with pytest.raises(UserError, match=message):
        validate(with_values(**values))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("averages") / "run"
    config = with_values(ema_decay=0.8, ema_decays=DECAYS, epochs=2)
    return workdir, config, loop.train(config, str(workdir), quiet=True)


def test_a_run_evaluates_every_average(finished):
    workdir, config, metrics = finished
    assert {"top1", "loss", "ema_0.5/top1", "ema_0.9/loss", "ema_0.9/top1"} <= metrics.keys()
    assert metrics["ema_0.5/loss"] != metrics["ema_0.9/loss"] != metrics["loss"]
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/top1" in record]
    assert len(evaluated) == 2
    assert all("eval/ema_0.9/top1" in record for record in evaluated)
    again = loop.evaluate(config, str(workdir), quiet=True)
    assert again == pytest.approx(metrics)


def test_an_average_can_be_loaded_and_exported(finished, tmp_path):
    workdir, _, metrics = finished
    heads = {}
    for decay in (None, 0.8, *DECAYS):
        _, variables = dat_jax.load(workdir, ema_decay=decay)
        heads[decay] = np.asarray(variables["params"]["cls_head"]["kernel"])
    np.testing.assert_array_equal(heads[None], heads[0.8])
    assert len({head.tobytes() for head in heads.values()}) == 3
    options = dict(
        formats=["orbax"], platforms=["cpu"], preprocessing="inside", batch=None, image_size=None, classes=None
    )
    command.export(str(workdir), str(tmp_path / "export"), **options, resize=None, ema_decay=0.9)
    recorded = json.loads((tmp_path / "export" / "manifest.json").read_text())["training"]
    assert recorded["settings"]["average of the weights"] == "decay 0.9"
    assert set(recorded["results"]) >= {"eval/top1", "eval/loss"}
    assert float(recorded["results"]["eval/loss"].split()[0]) == pytest.approx(metrics["ema_0.9/loss"], rel=1e-3)
    assert "ema_" not in "".join(recorded["results"])
    _, exported = dat_jax.load(tmp_path / "export")
    np.testing.assert_array_equal(exported["params"]["cls_head"]["kernel"], heads[0.9])
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    predicted = inference.load(tmp_path / "export")(image)
    np.testing.assert_allclose(predicted, inference.load(workdir, ema_decay=0.9)(image), rtol=1e-5)
    assert not np.allclose(predicted, inference.load(workdir)(image), rtol=1e-3)
    for decay in (0.7, 0.9000001):
        with pytest.raises(UserError, match=rf"^There is no average .* decay {decay}: choose one of 0\.5, 0\.8, 0\.9"):
            dat_jax.load(workdir, ema_decay=decay)
    with pytest.raises(UserError, match="ema_decay must be a number, got 'best'"):
        dat_jax.load(workdir, ema_decay="best")
    with pytest.raises(UserError, match="ema_decay 0.9 needs the work directory of a run"):
        dat_jax.load(tmp_path / "export", ema_decay=0.9)


def test_a_run_cannot_be_resumed_with_other_averages(finished, tmp_path):
    workdir, config, _ = finished
    workdir = shutil.copytree(workdir, tmp_path / "run")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.ema_decays, config.epochs = (0.5,), 3
    with pytest.raises(UserError, match=r"was started with ema_decays \[0\.5, 0\.9\], now \[0\.5\]"):
        loop.train(config, str(workdir), quiet=True)
    with config.unlocked():
        config.ema_decays = DECAYS[::-1]  # the order does not matter
    assert "ema_0.9/top1" in loop.train(config, str(workdir), quiet=True)


def test_other_averages_cannot_be_evaluated(finished):
    workdir, config, _ = finished
    for values in ({"ema_decays": (0.5,)}, {"ema_decays": (0.3, 0.9)}, {"ema_decay": 0.0}):
        other = config.copy_and_resolve_references().unlock()
        other.update(values)
        with pytest.raises(UserError, match=r"The checkpoint has other averages of the weights: ema_decays? "):
            loop.evaluate(other, str(workdir), quiet=True)


def test_weights_without_a_step_have_no_further_averages(finished, tmp_path):
    workdir, config, metrics = finished
    other = config.copy_and_resolve_references().unlock()
    other.init_from = str(workdir)
    found = loop.evaluate(other, str(tmp_path / "none"), quiet=True)
    assert found["loss"] == pytest.approx(metrics["loss"])
    assert not any(name.startswith("ema_") for name in found)


def test_names_of_close_decays_differ():
    config = with_values(ema_decays=(0.9999999, 0.99999999))
    assert list(make_further_averages(config)) == ["0.9999999", "0.99999999"]
