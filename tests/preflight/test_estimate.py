"""The estimate of a run from what was measured."""

import dataclasses

import pytest

from dat_jax.preflight.estimate import Measured, estimate_run

# 8 devices and 2 processes, 1,000 images a step, 500 of them for each process in half a second.
MEASURED = Measured(
    devices=8,
    processes=2,
    batch_size=1000,
    steps_left=7200,
    evaluations_left=10,
    steps_between_saves=720,
    step_seconds=0.5,
    compile_seconds=60.0,
    evaluation_seconds=6.0,
    save_seconds=10.0,
    input_rate=2000.0,
    workers=4,
    cores=16,
)


def estimate(**changes):
    return estimate_run(dataclasses.replace(MEASURED, **changes))


def test_the_devices_limit_a_run():
    result = estimate()
    assert result.steps_per_second == 2
    assert result.seconds == 7200 * 0.5 + 60 + 10 * 6
    assert result.device_hours == pytest.approx(8 * 3720 / 3600)
    assert (result.limit, result.advice) == ("the devices", ())
    assert result.describe() == {
        "steps/s": "2",
        "time to the end": "1:02:00 (1.03 hours)",
        "device-hours": "8.27",
        "limited by": "the devices",
    }


def test_the_input_limits_a_run():
    result = estimate(input_rate=400.0)
    assert result.steps_per_second == pytest.approx(400 / 500)
    assert result.seconds == pytest.approx(7200 * 1.25 + 120)
    assert result.limit == "the input"
    (sentence,) = result.advice
    assert "loads 400 images/s, and its devices could use 1,000" in sentence
    assert "--config.data.workers=10" in sentence
    assert "--config.data.workers=16" in estimate(input_rate=400.0, workers=0).advice[0]
    assert "--config.data.workers=16" in estimate(input_rate=10.0).advice[0]
    assert "All cores are busy" in estimate(input_rate=400.0, workers=16).advice[0]


def test_evaluations_limit_a_run():
    result = estimate(evaluations_left=100, evaluation_seconds=60.0)
    assert result.limit == "evaluations"
    (sentence,) = result.advice
    assert "Evaluations take 62 % of the time" in sentence


def test_checkpoints_limit_a_run():
    result = estimate(save_seconds=30.0, steps_between_saves=20)
    assert result.limit == "saving"
    assert result.steps_per_second == pytest.approx(20 / 30)
    (sentence,) = result.advice
    assert "takes 30.0 s, longer than the 20 steps from one to the next: save every 60 steps" in sentence
