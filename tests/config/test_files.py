"""Configurations are found by name from any folder, and by path."""

import contextlib
import json
import shutil

import pytest
from absl import flags

from dat_jax.config import files, get_classification_config, list_configs, load_config, validate
from dat_jax.config.files import add_recorded_config, choose, define_config_flag, find_config
from dat_jax.errors import UserError
from tests.helpers.documents import ROOT


@pytest.mark.parametrize("name", ["dat_pp_s", "dat_pp_s.py", "configs/dat_pp_s", "configs/dat_pp_s.py"])
def test_packaged_configurations_are_found_from_any_folder(name, tmp_path):
    for folder in (ROOT, tmp_path):
        with contextlib.chdir(folder):
            assert load_config(name).model.name == "dat_pp_small"


def test_an_installed_package_has_its_own_folder(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(files, "_FOLDERS", (tmp_path / "configs", ROOT / "configs"))
    assert find_config("dat_pp_s") == tmp_path / "configs" / "dat_pp_s.py"


@pytest.mark.parametrize(("name", "file"), [("dat_pp_s.py", "dat_pp_s.py"), ("a/mine", "a/mine.py"), ("mine", "mine")])
def test_a_file_that_exists_takes_precedence(name, file, tmp_path):
    with contextlib.chdir(tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / file).write_text(
            "from dat_jax.config import load_config\n\n"
            "def get_config():\n    config = load_config('tiny').unlock()\n    config.seed = 7\n    return config\n"
        )
        assert load_config(name).seed == 7
        assert load_config(name).is_locked


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dat_pp_z", "dat_pp_"),
        ("configs/quickstrat.py", "quickstart"),
        ("upernet_dat_pp_s", "upernet:dat_pp_s"),
        ("mask_rcnn_dat_pp_t_1x.py", "mask_rcnn:dat_pp_t_1x"),
        ("elsewhere/dat_pp_s.py", "dat_pp_s"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name, nearest):
    with pytest.raises(UserError, match=f"no configuration {name}.*{nearest}"):
        load_config(name)


@pytest.mark.parametrize("name", ["upernet", "configs/upernet.py", "upernet:", "upernet:dat_pp_tiny"])
def test_a_family_needs_one_of_its_choices(name):
    with pytest.raises(UserError, match="one of dat_pp_t, dat_pp_s, dat_pp_b, such as upernet:dat_pp_t; got"):
        load_config(name)


def test_a_single_configuration_takes_no_choice():
    with pytest.raises(UserError, match=r"dat_pp_s\.py takes no choice after a colon, got 'dat_pp_t'"):
        load_config("dat_pp_s:dat_pp_t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"expected a function get_config\(\)"),
        ("def get_config():\n  pass\n", "must return a ConfigDict, got NoneType"),
    ],
)
def test_files_that_are_no_configurations_are_refused(text, message, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(path))


def test_families_are_listed_with_their_choices():
    names = list_configs()
    assert {"quickstart", "dat_pp_b_384", "upernet:dat_pp_b", "cascade_mask_rcnn:dat_pp_b_3x"} <= set(names)
    assert "upernet" not in names
    assert choose({"a": 1}, "a", family="letters") == 1


def test_the_flag_takes_names_and_overrides(monkeypatch):
    values = flags.FlagValues()
    define_config_flag(values)
    arguments = ["program", "--config=upernet:dat_pp_b", "--config.batch_size=32", "--config.eval.ratios=(0.5, 1.0)"]
    monkeypatch.setattr("sys.argv", arguments)
    assert values(arguments) == ["program"]
    assert (values.config.model.name, values.config.batch_size) == ("dat_pp_base", 32)
    assert values.config.eval.ratios == (0.5, 1.0)
    assert values["config"].config_filename == "upernet:dat_pp_b"
    assert values.config.is_locked


@pytest.mark.parametrize("name", ["dat_pp_s", "upernet:dat_pp_s", "mask_rcnn:dat_pp_t_1x"])
def test_the_configuration_that_a_run_recorded_is_read(name, tmp_path):
    config, path = load_config(name), tmp_path / "config.json"
    path.write_text(config.to_json_best_effort())
    assert load_config(str(path)).to_dict() == config.to_dict()
    validate(load_config(str(path)))


def test_keys_that_an_older_run_did_not_record_have_their_defaults(tmp_path):
    values = load_config("dat_pp_s").to_dict()
    del values["max_skipped_steps"], values["mesh"], values["data"]["workers"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(str(tmp_path / "config.json"))
    assert config.data.workers == get_classification_config().data.workers
    validate(config)


def test_a_flag_overrides_the_configuration_that_a_run_recorded(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(load_config("upernet:dat_pp_s").to_json_best_effort())
    argv = ["main", f"--config={path}", "--config.eval.ratios=(0.5, 1.0)", "--config.seed=3"]
    monkeypatch.setattr("sys.argv", argv)
    values = flags.FlagValues()
    holder = define_config_flag(values)
    values(argv)
    assert (holder.value.eval.ratios, holder.value.seed) == ((0.5, 1.0), 3)


@pytest.mark.parametrize("text", ["", "[]", '{"task": 3}', '{"schedule": []}', '{"data": 1}'])
def test_a_damaged_configuration_of_a_run_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
        load_config(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="cannot be read"):
        load_config(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["--workdir={tmp}", "--mode=eval", "--config.seed=1"], True),
        (["--mode", "eval", "--workdir", "{tmp}"], True),
        (["--workdir={tmp}"], False),
        (["--workdir={tmp}", "--mode=eval", "--config=quickstart"], False),
    ],
)
def test_an_evaluation_without_a_configuration_takes_that_of_the_run(arguments, added, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    argv = ["main", *(argument.format(tmp=tmp_path) for argument in arguments)]
    expected = ["main", f"--config={tmp_path / 'config.json'}", *argv[1:]] if added else argv
    assert add_recorded_config(argv) == expected


def test_keys_without_a_configuration_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config\.epochs sets a key .* expected --config=CONFIG"):
        add_recorded_config(["main", f"--workdir={tmp_path}", "--config.epochs=3"])


def test_a_path_is_not_a_packaged_name(tmp_path, monkeypatch):
    """./NAME is a file of the working directory, and folders may have a colon in their names."""
    folder = tmp_path / "2026-11-29T10:00"
    folder.mkdir()
    (folder / "dat_pp_s.py").write_text("from configs.quickstart import get_config\n")
    monkeypatch.chdir(folder)
    assert load_config("./dat_pp_s").model.name == "dat_pp_nano"
    assert load_config("dat_pp_s").model.name == "dat_pp_small"
    assert load_config(str(folder / "dat_pp_s.py")).model.name == "dat_pp_nano"
    with pytest.raises(UserError, match=r"There is no configuration \./tiny"):
        load_config("./tiny")
