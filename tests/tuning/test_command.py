"""python -m dat_jax.tune: the table it prints, the file it writes, and the report that uses it."""

import json

import pytest

from dat_jax.errors import UserError
from dat_jax.ops import dispatch
from dat_jax.profiling import step_report
from dat_jax.profiling.command import report_steps
from dat_jax.tuning import command
from dat_jax.tuning.choices import Choice, get_names, read_choices, read_stored_choices
from dat_jax.tuning.measurement import Measurement
from tests.helpers import tiny_config


@pytest.fixture
def config():
    config = tiny_config.get_config()
    config.compilation_cache = ""
    return config


def test_the_table_has_times_and_differences_of_every_implementation(config, tmp_path, capsys):
    with dispatch.interpreted_kernels():
        choices = command.tune_run(config, steps=["eval"], output=tmp_path / "choices.json")
    assert read_choices(tmp_path / "choices.json") == choices
    lines = capsys.readouterr().out.splitlines()
    (title,) = [line for line in lines if line.startswith("Implementations of")]
    assert title == f"Implementations of {len(choices)} calls of ops, measured on cpu"
    (row,) = [line.split() for line in lines if line.split()[:1] == ["neighborhood_attention"]]
    assert row[1:5] == ["float32[4,", "8,", "8,", "16]"]
    assert row[5:9] == ["kernel_size=3", "num_heads=2", "dense", "(default)"]
    assert float(row[9]) > 0
    assert float(row[10]) < 1e-5
    for name, count in (("pallas", 8), ("triton", 2)):
        assert len([line for line in lines if line.split()[:1] == [name]]) == count
    assert len(choices) == 11  # of which three are depthwise convolutions
    assert f"of {len(choices)} calls another implementation than the default is the best. Runs do not use" in lines[-1]


def test_for_a_device_that_is_not_attached_bytes_are_counted_and_nothing_runs(config, tmp_path, capsys):
    file = tmp_path / "choices.json"
    choices = command.tune_run(config, topology="cpu", output=file)
    printed = capsys.readouterr().out
    assert "bytes by the compiler, without running, for cpu" in printed
    assert "time, ms" not in printed
    for choice in choices.values():
        for measured in choice.measured.values():
            assert measured.seconds is None
            assert measured.error is None
    compared = [choice for choice in choices.values() if len(choice.measured) > 1]
    assert compared
    assert all(m.bytes > 0 for choice in compared for m in choice.measured.values())
    assert json.loads(file.read_text())["device"] == "cpu"


def test_the_compile_report_uses_choices(config, tmp_path, monkeypatch):
    file, seen = tmp_path / "choices.json", []
    choices = command.tune_run(config, topology="cpu", output=file)
    monkeypatch.setattr(step_report, "report_step", lambda trainer, step, **_: seen.append(trainer.choices) or {})
    monkeypatch.setattr("dat_jax.profiling.command.print_report", lambda *_: None)
    report_steps(config, topology="cpu", steps=["train"], examples=160, choices_file=str(file))
    assert seen == [get_names(choices)]


def test_choices_without_effect_are_refused(config, tmp_path):
    file = tmp_path / "choices.json"
    command.tune_run(config, topology="cpu", output=file)
    config.unlock().model.implementation = "plain"
    with pytest.raises(UserError, match=r"no effect with config\.model\.implementation=plain; set it to auto"):
        report_steps(config, topology="cpu", steps=["train"], examples=160, choices_file=str(file))


@pytest.mark.parametrize("can_be_kept", [True, False])
def test_on_a_device_the_command_logs_whether_runs_have_the_choices(config, tmp_path, monkeypatch, logs, can_be_kept):
    choices = {"grid_sample()": Choice("gather", "gather", {"gather": Measurement(seconds=1.0, error=0.0)})}
    monkeypatch.setattr(command, "target_platform", lambda: "gpu")
    monkeypatch.setattr(command, "tune", lambda calls: choices)
    monkeypatch.setattr(command, "enable_cache", lambda setting: tmp_path if can_be_kept else None)
    assert command.tune_run(config) == choices
    assert read_stored_choices(tmp_path, "cpu") == (choices if can_be_kept else {})
    expected = "are kept in" if can_be_kept else "are not kept for runs: set config.compilation_cache"
    assert [line for line in logs if "The choices" in line and expected in line]


def test_choices_of_another_batch_are_refused(config, tmp_path):
    file = tmp_path / "choices.json"
    command.tune_run(config, topology="cpu", output=file)
    config.batch_size = 32
    with pytest.raises(UserError, match=r"has no choice for any of the 11 calls of ops in this run"):
        report_steps(config, topology="cpu", steps=["train"], examples=160, choices_file=str(file))


def test_settings_with_which_nothing_can_be_compared_are_refused(config):
    config.batch_size = 12  # on eight devices
    with pytest.raises(UserError, match=r"config\.batch_size 12 is not a multiple of 8"):
        command.tune_run(config, topology="cpu")
    config.unlock().model.implementation = "plain"
    with pytest.raises(UserError, match=r"Nothing is compared with config\.model\.implementation=plain"):
        command.tune_run(config, topology="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=["test"]), r"--steps must be one or more of train, eval, got test"),
        (dict(steps=[]), r"got none"),
        (dict(topology="v5e"), r"Unknown topology 'v5e'"),
        (dict(output="."), r"\. cannot be written: Is a directory"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(config, monkeypatch, options, message, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "tune", None)
    with pytest.raises(UserError, match=message):
        command.tune_run(config, **options)
