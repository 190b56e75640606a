"""summary.md of a run."""

import pytest

from dat_jax.training.monitoring import summary

SERIES = {
    "train/loss": {5: 2.0, 10: 1.5},
    "train/images_per_second": {5: 100.0, 10: 300.0, 15: 120.0},
    "train/host_memory_gib": {5: 1.0, 10: 2.5},
    "eval/top1": {10: 80.0, 20: 70.0},
    "eval/loss": {10: 0.5, 20: 0.25},
    "eval/examples": {10: 50, 20: 50},
}


def format_one(**changes):
    given = dict(
        name="run",
        description={"model": "a | b"},
        step=20,
        total_steps=20,
        steps_per_epoch=10,
        ended_by=None,
        series=SERIES,
        metric="top1",
        seconds=3723.4,
        activities={"steps": 75.0, "input": 25.0, "lost": 0.0},
        figures=["curves.png"],
        commands={"To evaluate it": "python -m dat_jax.main --mode=eval"},
    )
    return summary.format_summary(**{**given, **changes})


def test_a_finished_run():
    text = format_one()
    for line in (
        "# run",
        "All 20 steps are done.",
        r"| model | a \| b |",
        "| done | 20 of 20 steps, 2 of 2 epochs |",
        "| wall time of the last call | 1:02:03 |",
        "| images/s, median | 120.0 |",
        "| peak memory per process | 2.50 GiB |",
        "| | best top1 (step) | last (step) |",
        "| eval/top1 | 80 (10) | 70 (20) |",
        "| eval/loss | 0.5 (10) | 0.25 (20) |",
        "| train/loss |  | 1.5 (10) |",
        "| training steps | 1:15 | 75.0 |",
        "| waiting for images, with idle devices | 0:25 | 25.0 |",
        "![curves](curves.png)",
        "    python -m dat_jax.main --mode=eval",
    ):
        assert line in text.splitlines()


def test_an_unfinished_run_without_metrics():
    text = format_one(step=3, ended_by="SIGTERM", series={}, seconds=None, figures=[])
    assert "Unfinished: ended by SIGTERM at step 3 of 20." in text
    assert "## Figures" not in text
    assert "images/s" not in text


def test_commands_quote_the_work_directory():
    commands = summary.list_commands("a b", command_flags="--config=c.py").values()
    assert "python -m dat_jax.main --workdir='a b' --mode=eval" in commands
    assert "python -m dat_jax.predict 'a b' IMAGE..." in commands


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    summary.write_summary(tmp_path, "old")

    def full(path, text, **_):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        summary.write_summary(tmp_path, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("summary.md", "old")]
