"""A folder of classes is split into training and validation images."""

import pytest
from PIL import Image

from dat_jax.data.sources import load_source
from dat_jax.data.split import split_folder
from dat_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name, count in (("cat", 10), ("dog", 2), ("red fox", 5)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 40)).save(tmp_path / "photos" / name / f"{index}.jpg")
    return tmp_path / "photos"


def names(path):
    return {file.relative_to(path).as_posix() for file in path.rglob("*.jpg")}


def test_every_class_is_in_both_parts_and_every_image_in_one(folder, tmp_path):
    assert split_folder(str(folder), str(tmp_path / "data")) == {"train": 13, "val": 4}
    train, val = names(tmp_path / "data/train"), names(tmp_path / "data/val")
    assert train | val == names(folder)
    assert not train & val
    assert [len([name for name in val if name.startswith(kind)]) for kind in ("cat", "dog", "red fox")] == [2, 1, 1]
    source = load_source("", split="validation", directory=str(tmp_path / "data"))
    assert source.class_names == ("cat", "dog", "red fox")


def test_the_choice_depends_on_the_seed_only(folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split_folder(str(folder), str(tmp_path / name), validation=0.4, seed=seed)
    assert names(tmp_path / "a/val") == names(tmp_path / "b/val") != names(tmp_path / "c/val")


@pytest.mark.parametrize("validation", [0.0, 1.0, -1.0, float("nan")])
def test_fractions_outside_0_and_1_are_refused(folder, tmp_path, validation):
    with pytest.raises(UserError, match="--validation must be between 0 and 1"):
        split_folder(str(folder), str(tmp_path / "data"), validation=validation)


def test_folders_that_cannot_be_split_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        split_folder(str(folder / "cat"), str(tmp_path / "data"))
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="fewer than two images: empty"):
        split_folder(str(folder), str(tmp_path / "data"))
    (folder / "empty").rmdir()
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="exists"):
        split_folder(str(folder), str(tmp_path / "data"))
