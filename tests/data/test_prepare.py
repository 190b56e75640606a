"""`python -m dat_jax.data.prepare`: data sets from tars and folders, interruption and resuming, invalid input."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from dat_jax.data import prepare as program
from dat_jax.data.image_files import Member, list_images, read_member
from dat_jax.data.prepare import prepare
from dat_jax.data.sources import load_source
from dat_jax.errors import UserError
from tests.helpers.photographs import photograph_files

ROOT = pathlib.Path(__file__).parents[2]
CLASSES = tuple(f"n{number:08d}" for number in range(1, 21))
DAMAGED = "n00000003_1.JPEG"


def encode(image, kind="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def make_images():
    """{split: {class: {file name: bytes}}}: 3 and 1 crops per class, some in unusual formats, one of them truncated."""
    photographs = []
    for path in photograph_files()[:2]:
        with Image.open(path) as image:
            photographs.append(image.convert("RGB"))
    rng = np.random.default_rng(0)

    def crop():
        x, y = rng.integers(200, 340, 2)
        return photographs[rng.integers(2)].crop((x, y, x + rng.integers(40, 80), y + rng.integers(40, 80)))

    train = {name: {f"{name}_{i}.JPEG": encode(crop()) for i in (1, 2, 10)} for name in CLASSES}
    train["n00000003"][DAMAGED] = train["n00000003"][DAMAGED][:-100]
    train["n00000001"]["n00000001_2.JPEG"] = encode(crop().convert("CMYK"))
    train["n00000001"]["n00000001_10.JPEG"] = encode(crop(), "PNG")
    train["n00000002"]["n00000002_1.JPEG"] = encode(crop().convert("L"))
    # The order of the image names is not the order of the classes.
    validation = {name: {f"ILSVRC2012_val_{20 - i:08d}.JPEG": encode(crop())} for i, name in enumerate(CLASSES)}
    return {"train": train, "validation": validation}


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))
    return path.read_bytes()


def write_folders(path, classes):
    for name, files in classes.items():
        (path / name).mkdir(parents=True)
        for file_name, data in files.items():
            (path / name / file_name).write_bytes(data)


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.fixture(scope="module")
def inputs(images, tmp_path_factory):
    """A training tar with one tar per class, and a flat validation tar with a list of its classes."""
    root = tmp_path_factory.mktemp("tars")
    inner = {}
    for name in reversed(CLASSES):  # neither archives nor files are stored in sorted order
        files = dict(reversed(images["train"][name].items()))
        inner[f"{name}.tar"] = write_tar(root / "inner.tar", {**files, f"._{name}_1.JPEG": b"x", "readme.txt": b"x"})
    write_tar(root / "train.tar", inner)
    flat = {name: data for files in images["validation"].values() for name, data in files.items()}
    write_tar(root / "val.tar", {f"./{name}": data for name, data in flat.items()})
    (root / "labels.txt").write_text("\n".join(reversed(CLASSES)) + "\n")
    return {
        "train": str(root / "train.tar"),
        "validation": str(root / "val.tar"),
        "validation_labels": str(root / "labels.txt"),
        "records_per_shard": 16,
    }


@pytest.fixture(scope="module")
def prepared(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    message = prepare(**inputs, output=str(output))
    assert message == (
        f"{output} is complete: 59 train images, 1 damaged and left out; 20 validation images, 0 damaged and left out."
    )
    return output


def shard_bytes(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.array_record-*"))}


def test_prepared_images_are_sorted_and_have_the_pixels_of_pillow(images, prepared):
    for split in ("train", "validation"):
        source = load_source("", split=split, directory=str(prepared))
        assert source.class_names == CLASSES
        expected = [
            (label, data)
            for label, name in enumerate(CLASSES)
            for file_name, data in sorted(images[split][name].items())
            if file_name != DAMAGED
        ]
        assert len(source) == len(expected)
        for index, (label, data) in enumerate(expected):
            record = source[index]
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            np.testing.assert_array_equal(record["image"], pixels)
            assert record["image"].dtype == np.uint8
            assert record["label"] == label
            assert record["label"].dtype == np.int32


def test_damaged_images_are_listed_with_the_reason(prepared):
    split, name, reason = (prepared / "damaged.txt").read_text().strip().split("\t")
    assert (split, name) == ("train", f"n00000003.tar/{DAMAGED}")
    assert "truncated" in reason


def test_tfds_reads_the_data_set_and_files_are_unchanged(images, prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 59, "validation": 20}
    assert builder.info.splits["train"].shard_lengths == [15, 16, 16, 12]
    assert builder.info.features["label"].names == list(CLASSES)
    decoded = builder.as_data_source(split="validation")[4]
    encoded = builder.as_data_source(split="validation", decoders={"image": tfds.decode.SkipDecoding()})[4]
    ((file_name, data),) = images["validation"][CLASSES[4]].items()
    assert (encoded["image"], encoded["file_name"].decode(), encoded["label"]) == (data, file_name, 4)
    np.testing.assert_array_equal(decoded["image"], np.asarray(Image.open(io.BytesIO(data))))


def test_folders_give_the_same_records_as_tars(images, inputs, prepared, tmp_path):
    write_folders(tmp_path / "train", images["train"])
    write_folders(tmp_path / "val", images["validation"])
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    folders = {"train": str(tmp_path / "train"), "validation": str(tmp_path / "val"), "records_per_shard": 16}
    prepare(**folders, output=str(tmp_path / "output"))
    assert shard_bytes(tmp_path / "output") == shard_bytes(prepared)

    flat = tmp_path / "flat"
    flat.mkdir()
    for files in images["validation"].values():
        for name, data in files.items():
            (flat / name).write_bytes(data)
    prepare(**{**inputs, "validation": str(flat)}, output=str(tmp_path / "other"))
    assert shard_bytes(tmp_path / "other") == shard_bytes(prepared)


def test_an_interrupted_call_is_resumed_with_the_same_result(inputs, prepared, tmp_path, monkeypatch):
    write, written = program.write_shard, []

    def write_three(shard):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard.path.name)
        return write(shard)

    monkeypatch.setattr(program, "write_shard", write_three)
    with pytest.raises(KeyboardInterrupt):
        prepare(**inputs, output=str(tmp_path))
    assert len(shard_bytes(tmp_path)) == 3
    with pytest.raises(UserError, match=r"is incomplete: run `python -m dat_jax.data.prepare` again"):
        load_source("", split="train", directory=str(tmp_path))

    (tmp_path / written[1]).unlink()
    (tmp_path / written[2]).write_bytes(b"truncated")
    (tmp_path / "progress" / "train-00005.1.array_record").write_bytes(b"left by a call that was killed")
    monkeypatch.setattr(program, "write_shard", lambda shard: (written.append(shard.path.name), write(shard))[1])
    prepare(**inputs, output=str(tmp_path))
    assert written[3:5] == written[1:3]
    assert written.count(written[0]) == 1
    assert shard_bytes(tmp_path) == shard_bytes(prepared)
    assert (tmp_path / "damaged.txt").read_text() == (prepared / "damaged.txt").read_text()
    assert not list((tmp_path / "progress").glob("*.array_record"))

    count = len(written)
    assert "is already complete: 59 train images" in prepare(**inputs, output=str(tmp_path))
    assert len(written) == count


def run(*arguments):
    command = [sys.executable, "-m", "dat_jax.data.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_killed_command_leaves_no_partial_shard_and_can_be_resumed_with_workers(inputs, prepared, tmp_path):
    arguments = [f"--{name}={value}" for name, value in inputs.items()]
    arguments += [f"--output={tmp_path}", "--workers=2"]
    command = [sys.executable, "-m", "dat_jax.data.prepare", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and not shard_bytes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = shard_bytes(tmp_path)
    assert finished
    assert finished.items() <= shard_bytes(prepared).items()

    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert "59 train images, 1 damaged" in result.stdout
    assert shard_bytes(tmp_path) == shard_bytes(prepared)
    assert len(load_source("", split="train", directory=str(tmp_path))) == 59


def test_other_inputs_and_folders_in_use_are_rejected(inputs, prepared, tmp_path):
    before = shard_bytes(prepared)
    with pytest.raises(UserError, match="was started with other images or another --records_per_shard"):
        prepare(**{**inputs, "records_per_shard": 8}, output=str(prepared))
    other = tmp_path / "labels.txt"
    other.write_text("\n".join(CLASSES))
    with pytest.raises(UserError, match="was started with other images"):
        prepare(**{**inputs, "validation_labels": str(other)}, output=str(prepared))
    assert shard_bytes(prepared) == before
    with pytest.raises(UserError, match="is not empty: choose another --output"):
        prepare(**inputs, output=str(tmp_path))
    with pytest.raises(UserError, match=r"labels.txt cannot be written: Not a directory"):
        prepare(**inputs, output=str(other))


def test_invalid_inputs_are_rejected(images, inputs, tmp_path):
    wrong = {**inputs, "output": str(tmp_path / "output")}

    def assert_rejected(match, **changed):
        with pytest.raises(UserError, match=match):
            prepare(**{**wrong, **changed})
        assert not (tmp_path / "output").exists()

    assert_rejected("There is no tar or folder of images at nothing.tar", train="nothing.tar")
    assert_rejected("have no classes: expected class folders", train=inputs["validation"])
    assert_rejected("contains 20 images without classes: set --validation_labels", validation_labels="")
    assert_rejected("labels.txt cannot be read", validation_labels=str(tmp_path / "labels.txt"))
    (tmp_path / "short.txt").write_text("n00000001\n" * 19)
    assert_rejected("has 19 lines for the 20 images", validation_labels=str(tmp_path / "short.txt"))
    (tmp_path / "numbers.txt").write_text("490\n" * 20)
    assert_rejected(
        "has classes that are missing in the training images: 490", validation_labels=str(tmp_path / "numbers.txt")
    )
    assert_rejected("already have classes: omit --validation_labels", validation=inputs["train"])

    data = pathlib.Path(inputs["train"]).read_bytes()
    for name, content in (
        ("compressed.tar.gz", b"\x1f\x8b" + data),
        ("header.tar", data[: 9 * len(data) // 10]),
        ("zeroed.tar", data[:20000] + b"\xff" * 2000 + data[22000:]),
        ("text.tar", b"hello" * 300),
        ("nothing.tar", b""),
    ):
        (tmp_path / name).write_bytes(content)
        assert_rejected(f"{name} cannot be read as an uncompressed tar", train=str(tmp_path / name))
    write_tar(tmp_path / "texts.tar", {"readme.txt": b"x", "._a.JPEG": b"x"})
    assert_rejected("texts.tar contains no images", train=str(tmp_path / "texts.tar"))
    write_tar(tmp_path / "zipped.tar", {"n00000001.tar.gz": b"x"})
    assert_rejected("n00000001.tar.gz in .*zipped.tar is compressed", train=str(tmp_path / "zipped.tar"))
    write_folders(tmp_path / "mixed", images["train"])
    (tmp_path / "mixed" / "loose.png").write_bytes(b"x")
    assert_rejected("contains classes, but also images without a class: loose.png", train=str(tmp_path / "mixed"))


def test_a_split_with_only_damaged_images_is_rejected(images, inputs, tmp_path):
    folder = tmp_path / "val" / CLASSES[0]
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"no image")
    changed = {**inputs, "validation": str(tmp_path / "val"), "validation_labels": ""}
    with pytest.raises(UserError, match="Every validation image is damaged"):
        prepare(**changed, output=str(tmp_path / "output"))


def test_a_shard_with_only_damaged_images_is_empty(images, inputs, tmp_path):
    write_folders(
        tmp_path / "train", {"a": {f"{i}.png": b"no image" for i in range(4)}, "b": images["train"][CLASSES[5]]}
    )
    write_folders(tmp_path / "val", {"b": images["validation"][CLASSES[5]]})
    folders = {"train": str(tmp_path / "train"), "validation": str(tmp_path / "val")}
    prepare(**folders, output=str(tmp_path / "output"), records_per_shard=4)
    source = load_source("", split="train", directory=str(tmp_path / "output"))
    assert [int(source[index]["label"]) for index in range(len(source))] == [1, 1, 1]


def test_the_images_of_imagenet_are_counted_before_anything_is_written(tmp_path, monkeypatch):
    synsets = program._read_imagenet_list("labels.txt")
    assert len(synsets) == 1000
    assert synsets == sorted(synsets)
    labels = program._read_imagenet_list("validation_labels.txt")
    flat = [Member("v.tar", 0, 1, f"{index:05d}.JPEG", "") for index in range(50_000)]
    train = [Member("t.tar", 0, 1, f"{name}.tar/{name}_1.JPEG", name) for name in synsets]
    monkeypatch.setattr(program, "list_images", lambda path: {"t": train, "v": flat}[path])
    members, class_names = program.list_splits(train="t", validation="v")
    assert list(class_names) == synsets
    by_name = {member.name: member.class_name for member in members["validation"]}
    assert [by_name[member.name] for member in flat] == labels
    output = tmp_path / "output"
    with pytest.raises(UserError, match="1,281,167 and 50,000 images, but t has 1,000 and v has 50,000.*--incomplete"):
        prepare(train="t", validation="v", output=str(output))
    assert not output.exists()
    monkeypatch.setattr(program, "write_shards", lambda shards, **_: None)
    with pytest.raises(UserError, match="imagenet2012-train.array_record-00000-of-00001 in"):
        prepare(train="t", validation="v", output=str(output), incomplete=True)
    assert json.loads((output / "progress" / "inputs.json").read_text())["images"]["train"] == 1000


def test_images_are_read_from_archives_without_unpacking(images, inputs):
    members = list_images(inputs["train"])
    assert len(members) == 60
    for member in members:
        assert read_member(member) == images["train"][member.class_name][member.name.split("/")[1]]
    with pytest.raises(UserError, match="ends within the image"):
        read_member(members[0]._replace(size=10**7))
    with pytest.raises(UserError, match="cannot be read from nothing.tar"):
        read_member(members[0]._replace(path="nothing.tar"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --train=PATH --validation=PATH --output=DIR"),
        (["--train=a", "--validation=b", "--output=c", "--workers=0"], "--workers=0"),
        (["--tran=a"], "Unknown command line flag 'tran'"),
        (["--train=nothing.tar", "--validation=b", "--output=c"], "There is no tar or folder of images at nothing.tar"),
    ],
)
def test_user_errors_are_printed_as_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
