"""Files of choices: for each kind of device and version, and what happens to damaged ones."""

import json

import pytest

from dat_jax.errors import UserError
from dat_jax.tuning import choices as module
from dat_jax.tuning.choices import (
    Choice,
    choices_file,
    get_names,
    read_choices,
    read_stored_choices,
    store_choices,
    write_choices,
)
from dat_jax.tuning.measurement import Measurement

CHOICES = {
    "neighborhood_attention(query=float32[2])": Choice(
        "pallas",
        "tiles",
        {"tiles": Measurement(seconds=2.0, error=1e-6), "pallas": Measurement(seconds=1.0, error=2e-6)},
    ),
    "grid_sample()": Choice(
        "gather", "gather", {"gather": Measurement(bytes=3.0), "matmul": Measurement(problem="it fails: x")}
    ),
}


def make_text(measured, *, chosen="gather"):
    choice = {"chosen": chosen, "default": "gather", "measured": measured}
    return json.dumps({"format": 1, "device": "gpu", "versions": {}, "calls": {"grid_sample()": choice}})


def test_a_file_keeps_choices_and_what_was_measured(tmp_path):
    write_choices(tmp_path / "new" / "choices.json", CHOICES, device_kind="TPU v5 lite")
    assert read_choices(tmp_path / "new" / "choices.json") == CHOICES
    content = json.loads((tmp_path / "new" / "choices.json").read_text())
    assert content["device"] == "TPU v5 lite"
    assert {"dat_jax", "jax", "jaxlib"} <= set(content["versions"])
    assert get_names(CHOICES) == {"neighborhood_attention(query=float32[2])": "pallas", "grid_sample()": "gather"}


def test_stored_choices_are_added_and_are_of_one_device_and_version(tmp_path, monkeypatch):
    first, second = ({key: CHOICES[key]} for key in CHOICES)
    store_choices(tmp_path, first, device_kind="TPU v5 lite")
    store_choices(tmp_path, second, device_kind="TPU v5 lite")
    assert read_stored_choices(tmp_path, "TPU v5 lite") == CHOICES
    assert read_stored_choices(tmp_path, "TPU v6 lite") == {}
    assert read_stored_choices(None, "TPU v5 lite") == {}
    assert choices_file(tmp_path, "TPU v5 lite").name.startswith("tpu-v5-lite-")
    versions = module.describe_versions()
    monkeypatch.setattr(module, "describe_versions", lambda: {**versions, "libtpu": "0.0.99"})
    assert read_stored_choices(tmp_path, "TPU v5 lite") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "calls": {}}',
        '{"format": 1, "calls": {"a": {"chosen": "x", "default": "x", "measured": {}}}}',
        '{"format": 1, "calls": {"a": {"chosen": "x", "default": "x", "measured": {"x": {"speed": 1}}}}}',
        '{"format": 1, "device": "gpu", "versions": {}, "calls": []}',
        make_text({"x": {}}, chosen="x"),
        make_text({"gather": {}}, chosen="matmul"),
        make_text({"gather": {"seconds": float("nan")}}),
        make_text({"gather": {"seconds": -1.0}}),
        make_text({"gather": {"bytes": "many"}}),
        make_text({"gather": {"problem": "it fails: x"}, "matmul": {"seconds": 1.0}}),
        "[" * 200_000,
    ],
)
def test_a_damaged_file_is_refused_by_name_and_a_stored_one_is_not_used(tmp_path, logs, text):
    path = choices_file(tmp_path, "gpu")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=r"\.json is not a file of choices"):
        read_choices(path)
    assert read_stored_choices(tmp_path, "gpu") == {}
    assert "Stored choices of implementations are not used" in "\n".join(logs)
    store_choices(tmp_path, CHOICES, device_kind="gpu")
    assert read_stored_choices(tmp_path, "gpu") == CHOICES


def test_choices_of_another_device_are_refused(tmp_path):
    write_choices(tmp_path / "choices.json", CHOICES, device_kind="TPU v5 lite")
    assert read_choices(tmp_path / "choices.json", device_kind="TPU v5 lite") == CHOICES
    with pytest.raises(UserError, match=r"are for TPU v5 lite, expected cpu\.$"):
        read_choices(tmp_path / "choices.json", device_kind="cpu")


def test_stored_choices_of_another_device_are_not_used(tmp_path, logs):
    write_choices(choices_file(tmp_path, "TPU v6 lite"), CHOICES, device_kind="TPU v5 lite")
    assert read_stored_choices(tmp_path, "TPU v6 lite") == {}
    assert "are for TPU v5 lite, expected TPU v6 lite" in "\n".join(logs)


def test_choices_of_other_versions_are_read_with_a_warning(tmp_path, monkeypatch, logs):
    write_choices(tmp_path / "choices.json", CHOICES, device_kind="gpu")
    assert read_choices(tmp_path / "choices.json") == CHOICES
    assert logs == []
    versions = {**module.describe_versions(), "jax": "99", "libtpu": "0.0.99"}
    monkeypatch.setattr(module, "describe_versions", lambda: versions)
    assert read_choices(tmp_path / "choices.json") == CHOICES
    assert "of other versions than the installed ones: jax " in "\n".join(logs)
    assert "now 99, libtpu " in "\n".join(logs)


def test_the_default_is_a_choice_if_everything_has_a_problem(tmp_path):
    problem = Measurement(problem="it fails: x")
    choices = {"grid_sample()": Choice("gather", "gather", {"gather": problem, "matmul": problem})}
    write_choices(tmp_path / "choices.json", choices, device_kind="gpu")
    assert read_choices(tmp_path / "choices.json") == choices


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json cannot be read: No such file"):
        read_choices(tmp_path / "missing.json")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, logs):
    (tmp_path / "file").write_text("")
    assert store_choices(tmp_path / "file", CHOICES, device_kind="gpu") is None
    assert store_choices(tmp_path / "folder", CHOICES, device_kind="gpu") == choices_file(tmp_path / "folder", "gpu")
    assert "Choices of implementations are not kept in" in "\n".join(logs)
