"""Listing of image files: what is taken, and what is reported as left out."""

import pytest
from PIL import Image

from dat_jax.data.image_files import list_images, scan_folder
from dat_jax.data.sources import load_source
from dat_jax.errors import UserError
from dat_jax.inference.image_files import find_images
from tests.helpers.logs import collect_logs


def save(path, kind="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40)).save(path, kind)


@pytest.fixture
def folders(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / "1.jfif")
        save(tmp_path / split / "cat" / "2.pgm", "PPM")
        save(tmp_path / split / "dog" / "3.jpg")
    return tmp_path


def test_every_file_that_is_left_out_is_counted_by_reason_with_an_example(folders):
    save(folders / "train" / "cat" / "more" / "4.jpg")
    save(folders / "train" / "dog" / "._3.jpg")
    save(folders / "train" / "5.jpg")
    (folders / "train" / "dog" / "6.heic").write_bytes(b"x")
    with collect_logs() as messages:
        source = load_source("", split="train", directory=str(folders))
    assert len(source) == 3
    (message,) = messages
    assert "train: 3 images in 2 class folders. Left out:" in message
    for part in (
        "1 images outside class folders (such as 5.jpg)",
        "1 folders at a level that is not read (such as cat/more)",
        "1 hidden images (such as dog/._3.jpg)",
        "1 files that are no images (such as dog/6.heic)",
    ):
        assert part in message


def test_folders_to_prepare_report_it_too(folders):
    (folders / "train" / "dog" / "notes.txt").write_text("x")
    with collect_logs() as messages:
        assert len(list_images(str(folders / "train"))) == 3
    assert "1 files that are no images (such as dog/notes.txt)" in messages[0]


def test_a_folder_without_images_names_the_suffixes(folders):
    (folders / "train" / "cat" / "1.jfif").rename(folders / "train" / "cat" / "1.heic")
    (folders / "train" / "cat" / "2.pgm").unlink()
    with pytest.raises(UserError, match=r"contain no images: cat\. Images are files named \*\.jpeg, .*\*\.pnm"):
        load_source("", split="train", directory=str(folders))


def test_folders_in_folders_are_found_with_recursive(folders):
    with pytest.raises(
        UserError, match=r"no image in .*val: .*folders are not read: cat, dog\. --recursive reads them"
    ):
        find_images([str(folders / "val")])
    found = find_images([str(folders / "val")], recursive=True)
    assert [path.name for path in found] == ["1.jfif", "2.pgm", "3.jpg"]
    save(folders / "val" / ".trash" / "9.jpg")
    assert find_images([str(folders / "val")], recursive=True) == found


def test_listing_is_sorted(folders):
    assert scan_folder(folders / "train").folders == ["cat", "dog"]
    assert scan_folder(folders / "train" / "cat").images == ["1.jfif", "2.pgm"]
