"""Metrics on disk and on the console."""

import types

import jax
import pytest

from dat_jax.training.monitoring.metrics import MetricWriter, read_metrics
from dat_jax.training.monitoring.throughput import Progress, Usage, format_duration, peak_host_memory


def test_what_is_written_is_read_back_and_the_last_of_a_repeated_step_counts(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(5, {"loss": 2.0}, prefix="train")
        writer.write(10, {"loss": 1.0}, prefix="train")
    with MetricWriter(tmp_path) as writer:  # a resumed run appends
        writer.write(10, {"loss": 0.5}, prefix="train")
        writer.write(10, {"top1": 90.0}, prefix="eval")
    assert read_metrics(tmp_path / "metrics.jsonl") == {"train/loss": {5: 2.0, 10: 0.5}, "eval/top1": {10: 90.0}}
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_line_that_a_killed_run_left_unfinished_hurts_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == {}
    path.write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a"')
    assert read_metrics(path) == {"a": {1: 2.0}}
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 4.0}, prefix="train")
    assert read_metrics(path) == {"a": {1: 2.0}, "train/loss": {3: 4.0}}
    assert len(path.read_text().splitlines()) == 2


def test_rate_and_time_left(monkeypatch):
    now = iter([100.0, 102.0, 110.0, 111.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Progress(start_step=10, total_steps=40, batch_size=8)
    assert progress.update(10) is None
    assert progress.update(20) == (40.0, 4.0)  # 10 steps in 2 s; 20 left
    progress.skip()  # 8 s of evaluation
    assert progress.update(25) == (40.0, 11.0)  # 15 steps in 11 s, evaluation included; 15 left


def make_device(kind, stats, **attributes):
    return types.SimpleNamespace(
        device_kind=kind, memory_stats=lambda: stats, **{"process_index": 0, "platform": "tpu", **attributes}
    )


def test_utilization_and_memory_of_a_known_chip():
    here = [make_device("TPU v5 lite", {"peak_bytes_in_use": size * 2**30}) for size in (3, 5)]
    elsewhere = [make_device("TPU v5 lite", {"peak_bytes_in_use": 9 * 2**30}, process_index=1) for _ in range(2)]
    usage = Usage([*here, *elsewhere], count_flops=lambda: 197e9)  # a v5e has 197 TFLOP/s
    measured = usage.measure(1000.0)
    assert measured == {"flop_utilization": pytest.approx(25.0), "device_memory_gib": 5.0}


def test_what_is_not_known_is_left_out():
    def no_count():
        raise AssertionError("counted for nothing")

    assert Usage([make_device("TPU v2", None)], count_flops=no_count).measure(1000.0) == {}
    measured = Usage(jax.devices(), count_flops=no_count).measure(1000.0)
    assert list(measured) == ["host_memory_gib"]
    assert 0.05 < measured["host_memory_gib"] == pytest.approx(peak_host_memory() / 2**30, rel=0.2)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
