"""Folders and names as other systems write them: classes as they are meant, or one sentence."""

import errno
import io
import os
import pathlib
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dat_jax.checkpoints.class_names import read_names
from dat_jax.cli.files import check_outputs, name_outputs
from dat_jax.data.image_files import list_images
from dat_jax.data.sources import load_source
from dat_jax.data.split import split_folder
from dat_jax.errors import UserError
from dat_jax.inference.image_files import find_images
from dat_jax.storage import atomic_path, check_writable
from tests.helpers.logs import collect_logs

_FILE = io.BytesIO()
Image.new("RGB", (8, 8), (10, 20, 30)).save(_FILE, "PNG")
PNG = _FILE.getvalue()
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
LATIN_1 = os.fsdecode(b"caf\xe9")


def put(root, *names):
    for name in names:
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)


@pytest.fixture
def root(tmp_path):
    """Two classes, a and b, with an image for training and one for validation each."""
    put(tmp_path / "data", *(f"{split}/{name}/1.png" for split in ("train", "val") for name in "ab"))
    return tmp_path / "data"


def load(directory):
    """Read a directory of class folders; returns the names and, for both splits, the name of the class of every image."""
    sources = [load_source("", split=split, directory=str(directory)) for split in ("train", "validation")]
    names = sources[0].class_names
    return names, [[names[source[index]["label"]] for index in range(len(source))] for source in sources]


def both(*names):
    return [f"{split}/{name}/1.png" for split in ("train", "val") for name in names]


# Files to add, the classes expected, and those of the validation images.
READABLE = {
    "spaces": (both("my cat"), "a b my_cat", "a b my_cat"),
    "other alphabets": (both("straße", "猫"), "a b straße 猫", "a b straße 猫"),
    "emoji": (both("🐱"), "a b 🐱", "a b 🐱"),
    "markup and commas": (both("[red]", "x,y;z"), "[red] a b x,y;z", "[red] a b x,y;z"),
    "composed and decomposed alike": (both(NFD), f"a b {NFD}", f"a b {NFD}"),
    "numbers, sorted as text": (both("0", "2", "10"), "0 10 2 a b", "0 10 2 a b"),
    "letter cases of two classes": (both("A"), "A a b", "A a b"),
    "class for training only": (["train/c/1.png"], "a b c", "a b"),
    "hidden folders": (["train/.cat/1.png", "train/a/.ipynb_checkpoints/1.png"], "a b", "a b"),
    "hidden files": (["train/.DS_Store", "train/a/.DS_Store", "train/a/._1.png"], "a b", "a b"),
    "files of Windows": (["train/Thumbs.db", "train/a/desktop.ini"], "a b", "a b"),
    "name of an image in Latin-1": ([f"train/a/{LATIN_1}.png"], "a b", "a b"),
    "newline in the name of an image": (["train/a/1\n2.png"], "a b", "a b"),
}


@pytest.mark.parametrize("kind", READABLE)
def test_readable_folders_have_the_classes_that_are_meant(root, kind):
    files, names, validation = READABLE[kind]
    put(root, *files)
    class_names, (train_classes, validation_classes) = load(root)
    assert [name.replace(" ", "_") for name in class_names] == names.split()
    assert sorted(set(train_classes)) == sorted(class_names)
    assert [name.replace(" ", "_") for name in validation_classes] == validation.split()


EMPTY = r"These class folders of .*train contain no images: {}\. Images are files named \*\.jpeg"
UNKNOWN = r"val has classes that are missing in the training images: {}\.{}$"
SIMILAR = r" The training images have {}, which is similar to {}\."
NAME = r"train has a class named {}: expected text in UTF-8 without line breaks\.$"
NO_DATA = r"data contains no data set: .* folders of images, train/<class> and val/<class> .*; got {}\. "

# Changes of the folder, and the message expected.
REFUSED = {
    "empty class": (lambda root: (root / "train/c").mkdir(), EMPTY.format("c")),
    "__MACOSX of an archive": (lambda root: put(root, "train/__MACOSX/a/._1.png"), EMPTY.format("__MACOSX")),
    "@eaDir of a file server": (lambda root: put(root, "train/@eaDir/a/1.png"), EMPTY.format("@eaDir")),
    "lost+found of a disk": (lambda root: (root / "train/lost+found").mkdir(), EMPTY.format(r"lost\+found")),
    "class for validation only": (lambda root: put(root, "val/c/1.png"), UNKNOWN.format("c", "")),
    "other letter case in validation": (
        lambda root: (root / "val/a").rename(root / "val/A"),
        UNKNOWN.format("A", SIMILAR.format("'a'", "'A'")),
    ),
    "space at the end in training": (
        lambda root: (root / "train/a").rename(root / "train/a "),
        UNKNOWN.format("a", SIMILAR.format("'a '", "'a'")),
    ),
    "decomposed in validation": (
        lambda root: put(root, f"train/{NFC}/1.png", f"val/{NFD}/1.png"),
        UNKNOWN.format(NFD, SIMILAR.format(r"'caf\\xe9'", r"'cafe\\u0301'")),
    ),
    "composed and decomposed": (
        lambda root: put(root, f"train/{NFC}/1.png", f"train/{NFD}/1.png"),
        r"two classes that both look like café, 'cafe\\u0301' and 'caf\\xe9': expected one of them\.$",
    ),
    "newline in a class": (lambda root: put(root, *both("c\nd")), NAME.format(r"'c\\nd'")),
    "class in Latin-1": (lambda root: put(root, *both(LATIN_1)), NAME.format(r"'caf\\udce9'")),
    "class of blanks": (lambda root: put(root, *both("  ")), NAME.format("'  '")),
    "val and validation": (
        lambda root: put(root, "validation/a/1.png"),
        r"data has the folders val and validation: expected only one of them\.$",
    ),
    "no val": (
        lambda root: (root / "val").rename(root / "test"),
        "has no folder of validation images: expected val or",
    ),
    "Train": (lambda root: (root / "train").rename(root / "Train"), NO_DATA.format("Train, val")),
    "images without classes": (
        lambda root: [(root / "val/a").rename(root / "val/.a"), (root / "val/b").rename(root / "val/.b")],
        r"val contains no images in class folders\.",
    ),
    "archive": (lambda root: [(root / "train").rename(root / "x.zip"), (root / "val").rename(root / "y")], "x.zip, y"),
    "loop of links": (
        lambda root: (root / "train/a/2.png").symlink_to("2.png"),
        r"train/a cannot be read: Too many levels of symbolic links\.$",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_folders_are_refused_in_one_sentence(root, kind):
    change, message = REFUSED[kind]
    change(root)
    with pytest.raises(UserError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_paths_may_be_relative_end_with_a_slash_or_be_links(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    pathlib.Path("link").symlink_to(root)
    for path in ("data", "data/", "./data", "link", f"{root}/../data"):
        assert load_source("", split="train", directory=path).class_names == ("a", "b")


@pytest.mark.parametrize("path", ["data/train/a/1.png", "~/data", "$HOME/data", "'data'", "file:///data", "data "])
def test_other_paths_are_refused_in_one_sentence(root, monkeypatch, path):
    monkeypatch.chdir(root.parent)
    with pytest.raises(UserError, match=r"^There is no directory .* to read images from\.$"):
        load_source("", split="train", directory=path)


def test_junk_is_counted_in_the_log(root):
    put(root, "train/Thumbs.db", "train/a/._1.png")
    with collect_logs() as messages:
        load_source("", split="train", directory=str(root))
    assert (
        "Left out: 1 files that are no images (such as Thumbs.db), 1 hidden images (such as a/._1.png)." in messages[0]
    )


def test_folders_to_prepare_have_readable_class_names_too(root):
    put(root, f"train/{LATIN_1}/1.png")
    with pytest.raises(UserError, match=NAME.format(r"'caf\\udce9'")):
        list_images(str(root / "train"))


FIND = r"There is no image or folder {}\.$"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"The name of an image or folder is empty\.$"),
        ("*.png", FIND.format(r"\*\.png")),
        ("https://example.org/x.png", "expected a local path, .* got the scheme https"),
        ("x" * 5000, FIND.format("x+")),
        ("a\0b", FIND.format("a\0b")),
        ("~/missing.png", FIND.format("~/missing.png")),
        ("link.png", FIND.format("link.png")),
    ],
)
def test_names_of_images_that_are_missing(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("link.png").symlink_to("missing.png")
    with pytest.raises(UserError, match=message):
        find_images([name])


def test_images_are_found_whatever_their_names(tmp_path):
    names = ["1\n2.png", "UPPER.PNG", "[bold].png", f"{LATIN_1}.png", "space .png", "猫.png"]
    put(tmp_path, *names, ".hidden.png", "Thumbs.db")
    assert [path.name for path in find_images([str(tmp_path)])] == sorted(names)


@pytest.fixture
def classes(tmp_path):
    put(tmp_path / "all", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    return tmp_path / "all"


@pytest.mark.parametrize(
    ("files", "output", "options", "message"),
    [
        (
            (f"{LATIN_1}/1.png", f"{LATIN_1}/2.png"),
            "out",
            {},
            r"has a class named 'caf\\udce9': expected text in UTF-8",
        ),
        (("__MACOSX/a/._1.png",), "out", {}, "fewer than two images: __MACOSX"),
        ((), "all/out", {}, r"--output is .*all/out: expected a folder outside .*all, which is only read\.$"),
        ((), "all", {}, "expected a folder outside"),
        ((), "out", {"seed": -1}, r"--seed must be at least 0, got -1\.$"),
        ((), "out", {"validation": float("nan")}, r"--validation must be between 0 and 1, got nan\.$"),
        ((), "all/a/1.png/out", {}, "expected a folder outside"),
        ((), "file/out", {}, r"file/out cannot be written: .*[Nn]ot a directory\.$"),
    ],
)
def test_impossible_splits_are_refused_and_write_nothing(classes, files, output, options, message):
    put(classes, *files)
    (classes.parent / "file").write_text("x")
    with pytest.raises(UserError, match=message):
        split_folder(str(classes), str(classes.parent / output), **options)
    assert not (classes.parent / "out").exists()


def test_a_folder_that_is_split_already_is_refused(root, tmp_path):
    with pytest.raises(UserError, match="class folders of .* have fewer than two images: train, val"):
        split_folder(str(root), str(tmp_path / "out"))


@pytest.mark.parametrize("number", ["EACCES", "EROFS", "ENOSPC"])
def test_folders_that_cannot_be_written_are_refused(tmp_path, monkeypatch, number):
    code = getattr(errno, number)

    def refuse(path, *arguments, **options):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    for write in (check_writable, lambda path: atomic_path(path / "x.json").__enter__()):
        with pytest.raises(UserError, match=rf"cannot be written: {os.strerror(code)}\.$"):
            write(tmp_path / "out")


def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path):
    def write():
        with atomic_path(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    with pytest.raises(UserError, match=r"x\.json cannot be written: No space left on device\.$"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_would_collide_or_overwrite_are_refused(tmp_path):
    paths = [tmp_path / name for name in ("x.jpg", "x.png")]
    with pytest.raises(UserError, match=r"would both be written to x\.png; process them separately\.$"):
        name_outputs(paths, tmp_path / "out")
    with pytest.raises(UserError, match="is an input and would be overwritten"):
        check_outputs([tmp_path / "x.png"], inputs=paths, overwrite=True)
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(UserError, match=r"x\.csv cannot be written: it is a folder\.$"):
        check_outputs([tmp_path / "x.csv"], inputs=paths, overwrite=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfcat\r\ndog\r\n", ("cat", "dog")),
        (b"cat\ndog", ("cat", "dog")),
        (b"cat\n\ndog\n", "expected 2 class names, one per line, got 3"),
        (b"cat,dog\n", "expected 2 class names, one per line, got 1"),
        ("cat\ndog\n".encode("utf-16"), "cannot be read: 'utf-8' codec can't decode"),
        (b"caf\xe9\ndog\n", "cannot be read: 'utf-8' codec can't decode"),
    ],
)
def test_files_of_class_names_for_a_model(tmp_path, content, expected):
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    if isinstance(expected, tuple):
        assert read_names(file, count=2) == expected
        return
    with pytest.raises(UserError, match=expected):
        read_names(file, count=2)


def test_labels_follow_the_sorted_names_of_the_training_folders(root):
    put(root, *both("10", "9"))
    source = load_source("", split="validation", directory=str(root))
    assert source.class_names == ("10", "9", "a", "b")
    assert [int(source[index]["label"]) for index in range(4)] == [0, 1, 2, 3]
    np.testing.assert_array_equal(source[0]["image"][0, 0], (10, 20, 30))


def test_outputs_of_images_with_the_same_name_are_in_their_folders(tmp_path):
    paths = [tmp_path / name for name in ("a/x.jpg", "b/x.png", "b/y.png")]
    assert name_outputs(paths, tmp_path / "out") == [
        tmp_path / "out" / name for name in ("a/x.png", "b/x.png", "b/y.png")
    ]
    assert name_outputs(paths[1:], "out") == [pathlib.Path("out/x.png"), pathlib.Path("out/y.png")]
