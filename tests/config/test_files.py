"""Configurations are found by name from any folder, and by path."""

import contextlib
import shutil

import pytest
from absl import flags

from dat_jax.config import files, list_configs, load_config
from dat_jax.config.files import choose, define_config_flag, find_config
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
