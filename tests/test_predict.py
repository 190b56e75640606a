"""python -m dat_jax.predict: label maps of files, and mistakes that end with one sentence."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image
from rich.console import Console

import dat_jax
from dat_jax import predict
from dat_jax.data import ade20k
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform
from dat_jax.errors import UserError
from dat_jax.evaluation.segmentation import make_segmenter
from dat_jax.tasks.segmentation import make_segmentation_task
from dat_jax.training.checkpoint import Checkpoints
from dat_jax.training.pretrained import export_model
from dat_jax.training.state import TrainState
from tests import tiny_segmentation
from tests.photographs import photographs
from tests.random_variables import random_variables

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--long_side=64", "--short_side=64"]


def tiny_segmentor(**settings):
    """A model and random variables whose classes differ from place to place."""
    options = {"num_classes": 5, "channels": 16, "neck_channels": 16, **settings}
    backbone = {"name": "dat_pp_nano", **tiny_segmentation.BACKBONE}
    model = dat_jax.create_segmentor("sem_fpn", backbone=backbone, **options)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32), scale=0.4)
    positive = lambda path, leaf: abs(leaf) + 0.5 if path[-1].key == "var" else leaf  # noqa: E731
    statistics = jax.tree_util.tree_map_with_path(positive, variables["batch_stats"])
    return model, {"params": variables["params"], "batch_stats": statistics}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "export"
    model, variables = tiny_segmentor()
    export_model(directory, model=model, variables=variables)
    return directory


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run that evaluates in windows, at two ratios and mirrored."""
    directory = tmp_path_factory.mktemp("workdir")
    model, variables = tiny_segmentor(num_classes=3)
    config = tiny_segmentation.get_config().unlock()
    config.head.dropout = model.dropout
    config.eval.update(ratios=(0.75, 1.0), flip=True, window=48, stride=32)
    (directory / "config.json").write_text(config.to_json_best_effort())
    (directory / "classes.txt").write_text("sky\nroad\ntree\n")
    state = TrainState(jnp.int32(1), variables["params"], {"batch_stats": variables["batch_stats"]}, (), None)
    with Checkpoints(directory / "checkpoints", metric="mIoU") as checkpoints:
        checkpoints.save(jax.device_put(state), metadata={"examples": 0}, metrics={"mIoU": 1.0})
    return directory


@pytest.fixture
def folder(tmp_path):
    """Three photographs and what is none of them; every size is one of two, which are compiled once."""
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(photographs(width=96, height=64)[0]).save(images / "b.jpg")
    Image.fromarray(photographs(width=64, height=64)[1]).save(images / "a.PNG")
    Image.fromarray(photographs(width=64, height=64)[2]).convert("L").save(images / "grey.webp")
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_text("no image")
    (images / "below").mkdir()
    return images


def run(*arguments):
    """What main does, without a process: (status, words on stdout, on stderr) come from capsys."""
    values = flags.FlagValues()
    predict.define_flags(values)
    flags.DEFINE_string("json", None, "", flag_values=values)
    try:
        predict.main(values(["predict", *map(str, arguments)]), values)
    except SystemExit as error:
        return error.code
    return 0


def read_indices(path):
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.array(picture), np.array(picture.getpalette()).reshape(-1, 3)


def expected(trained, path, *, long_side=64, short_side=64, ratios=(1.0,), **options):
    """Labels by way of the model itself."""
    model, variables = dat_jax.load_pretrained(trained)
    with Image.open(path) as opened:
        image = np.array(opened.convert("RGB"))
    transform = make_segmentation_eval_transform(scale=(long_side, short_side), ratios=ratios)
    views = transform({"image": image, "label": np.zeros(image.shape[:2], np.uint8)})
    segment = make_segmenter(make_segmentation_task(model, auxiliary_weight=0.0).predict, **options)
    seen = [views[f"view_{index}"][None] for index in range(len(ratios))]
    labels, _ = segment(variables, seen, np.array([image.shape[:2]]), image.shape[:2])
    return np.array(labels[0])


def test_a_folder_becomes_label_maps(export, folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(export, folder, f"--output={out}", f"--json={tmp_path / 'all.json'}", *SMALL) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "grey.png"]
    said = capsys.readouterr()
    assert said.err == ""
    lines, rows = said.out.splitlines(), json.loads((tmp_path / "all.json").read_text())
    for line, row, name in zip(lines, rows, ("a.PNG", "b.jpg", "grey.webp"), strict=True):
        labels, palette = read_indices(out / f"{pathlib.Path(name).stem}.png")
        np.testing.assert_array_equal(labels, expected(export, folder / name))
        np.testing.assert_array_equal(palette[:5], ade20k.make_palette(5))
        shares = {str(k): float(np.mean(labels == k)) for k in range(5) if (labels == k).any()}
        assert len(shares) > 1
        assert row == {
            "image": str(folder / name),
            "classes": pytest.approx(shares),
            "labels": str(out / f"{pathlib.Path(name).stem}.png"),
        }
        assert list(row["classes"].values()) == sorted(shares.values(), reverse=True)
        largest = max(shares, key=shares.get)
        assert line.startswith(f"{folder / name}: {largest} {shares[largest]:.1%}, ")
    assert read_indices(out / "b.png")[0].shape == (64, 96)  # the network saw 43 x 64


def test_without_an_output_the_classes_are_said_and_nothing_is_written(export, folder, tmp_path, capsys, monkeypatch):
    names = [folder / "grey.webp", "", folder / "a.PNG"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{name}\n" for name in names)))
    before = sorted(tmp_path.rglob("*"))
    assert run(export, "-", *SMALL) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(names[0]), str(names[2])]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_terminal_gets_tables(export, folder):
    segmenter = predict.load_segmenter(export, long_side=64, short_side=64)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert predict.predict(segmenter, [folder / "a.PNG"], console=console)
    labels, _ = segmenter(np.array(Image.open(folder / "a.PNG")))
    assert console.file.getvalue().startswith(f"{folder / 'a.PNG'}\n┌")
    assert f"{np.mean(labels == np.bincount(labels.ravel()).argmax()):.1%}" in console.file.getvalue()


def test_a_work_directory_says_how_it_is_looked_at_and_what_classes_are_called(workdir, folder, tmp_path, capsys):
    image = folder / "a.PNG"
    assert run(workdir, image, f"--output={tmp_path}", f"--json={tmp_path / 'x.json'}") == 0
    wanted = expected(workdir, image, ratios=(0.75, 1.0), flip=True, window=48, stride=32)
    np.testing.assert_array_equal(read_indices(tmp_path / "a.png")[0], wanted)
    assert set(json.loads((tmp_path / "x.json").read_text())[0]["classes"]) <= {"sky", "road", "tree"}
    (tmp_path / "names.txt").write_text("Himmel\nStraße\nBaum\n", encoding="utf-8")
    capsys.readouterr()
    flat = ["--ratios=0.5,1.5", "--noflip", f"--classes={tmp_path / 'names.txt'}"]
    assert run(workdir, image, f"--output={tmp_path / 'other'}", *flat) == 0
    wanted = expected(workdir, image, ratios=(0.5, 1.5), window=48, stride=32)
    np.testing.assert_array_equal(read_indices(tmp_path / "other" / "a.png")[0], wanted)
    assert set(re.findall(r"(\w+) [\d.]+%", capsys.readouterr().out)) <= {"Himmel", "Straße", "Baum"}


def test_the_names_of_150_classes_are_those_of_ade20k(tmp_path):
    model, variables = tiny_segmentor(num_classes=150)
    export_model(tmp_path / "export", model=model, variables=variables)
    segmenter = predict.load_segmenter(tmp_path / "export")
    assert segmenter.class_names == ade20k.CLASS_NAMES
    np.testing.assert_array_equal(segmenter.palette, ade20k.PALETTE)
    assert (segmenter.transform.scale, segmenter.transform.ratios) == ((2048, 512), (1.0,))


def test_the_function_gives_labels_and_probabilities(export):
    segmenter = predict.load_segmenter(export, long_side=64, short_side=64)
    labels, probabilities = segmenter(photographs(width=64, height=64)[3])
    assert (labels.dtype, labels.shape) == (np.uint8, (64, 64))
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (64, 64))
    assert ((probabilities >= 0.2 - 1e-6) & (probabilities <= 1)).all()
    assert segmenter.class_names == ("0", "1", "2", "3", "4")


def test_shares_add_up_over_classes_of_one_name():
    labels = np.array([[0, 1, 1, 1], [2, 2, 2, 2]], np.uint8)
    shares = predict.measure_shares(labels, ["sky", "road", "sky", "tree"])
    assert list(shares.items()) == [("sky", 0.625), ("road", 0.375)]


def test_what_cannot_be_read_is_named_and_the_others_are_done(export, folder, tmp_path, capsys):
    whole = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((4, 64, 3), np.uint8)).save(folder / "flat.png")
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(folder / "deep.png")
    out = tmp_path / "out"
    assert run(export, folder, f"--output={out}", f"--json={tmp_path / 'all.json'}", *SMALL) == 1
    said = capsys.readouterr()
    messages = said.err.splitlines()
    for message, name, words in zip(
        messages,
        ("cut.jpg", "deep.png", "empty.png", "flat.png"),
        (
            "cannot be decoded",
            "more than 8 bits",
            "of no known kind",
            "4 x 64 pixels become 4 x 64: wanted sides of at least 32",
        ),
        strict=True,
    ):
        assert message.startswith("error: ")
        assert str(folder / name) in message
        assert words in message
    assert len(said.out.splitlines()) == len(json.loads((tmp_path / "all.json").read_text())) == 3
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "grey.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"Wanted: TRAINED IMAGE\.\.\. .*, got nothing\."),
        (["{export}"], r"Wanted: TRAINED IMAGE\.\.\. .*, got .*export\."),
        (["{export}", "{images}/none.jpg"], "There is no image or folder .*none.jpg"),
        (["{export}", "{images}/below"], "There is no image in .*below"),
        (["{export}", "-"], "There is no image in stdin"),
        (["{images}", "{images}/b.jpg"], r"Wanted an export \(with model.json\)"),
        (["{classifier}", "{images}/b.jpg"], "of a classifier; only segmentors are supported so far"),
        (["{detector}", "{images}/b.jpg"], "of a detector; only segmentors are supported so far"),
        (["{export}", "{images}", "{images}/a.PNG", "--output={tmp}/out"], "a.PNG and .*a.PNG would both become a.png"),
        (["{export}", "{images}/b.jpg", "--output={tmp}/there"], "b.png exists already; --overwrite replaces it"),
        (["{export}", "{images}/b.jpg", "--json={tmp}/there/b.png"], "b.png exists already"),
        (["{export}", "{tmp}/there/b.png", "--output={tmp}/there", "--overwrite"], "b.png is read and would be"),
        (["{export}", "{images}/b.jpg", "--output={tmp}/o", "--json={tmp}/o/b.png"], "b.png would be written twice"),
        (["{export}", "{images}/b.jpg", "--output={images}/b.jpg"], "b.jpg is in the way"),
        (["{export}", "{images}/b.jpg", "--json={images}"], "images is in the way"),
        (["{export}", "{images}/b.jpg", "--ratios=1,x"], "--ratios wants numbers with commas between them, got 1,x"),
        (["{export}", "{images}/b.jpg", "--ratios=0"], "ratios wants at least one number, all above 0"),
        (["{export}", "{images}/b.jpg", "--ratios=nan"], "ratios wants at least one number, all above 0"),
        (["{export}", "{images}/b.jpg", "--short_side=0"], "short_side want numbers of at least 1"),
        (["{export}", "{images}/b.jpg", "--classes={images}/notes.txt"], "notes.txt has 1 names, wanted 5, one a line"),
        (["{export}", "{images}/b.jpg", "--classes={images}/none.txt"], "none.txt cannot be read: .*No such file"),
    ],
)
def test_mistakes_end_with_one_sentence_and_nothing_is_written(
    arguments, message, export, folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / "there").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "there" / "b.png")
    places = {"export": export, "images": folder, "tmp": tmp_path}
    classifier = dat_jax.create_model("dat_pp_nano", num_classes=4, **tiny_segmentation.BACKBONE)
    detector = dat_jax.create_detector("retinanet", backbone=classifier, features=8)
    for name, model in (("classifier", classifier), ("detector", detector)):
        places[name] = tmp_path / name
        if f"{{{name}}}" in arguments:
            variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
            export_model(places[name], model=model, variables=variables)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n-\n"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert re.match(f"error: .*({message})", said.err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_unknown_options_are_refused(export):
    with pytest.raises(UserError, match="Unknown option 'ratio': wanted some of long_side"):
        predict.load_segmenter(export, ratio=1.0)


def test_overwriting_is_asked_for_and_nothing_is_left_half_written(export, folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("old")

    def fill_the_disk(self, path, *_, **__):
        pathlib.Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(Image.Image, "save", fill_the_disk)
        assert run(export, folder / "a.PNG", f"--output={out}", "--overwrite", *SMALL) == 1
    assert re.search(r"a.png cannot be written: No space left on device\.", capsys.readouterr().err)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("a.png", "old")]
    assert run(export, folder / "a.PNG", f"--output={out}", "--overwrite", *SMALL) == 0
    assert read_indices(out / "a.png")[0].shape == (64, 64)


def test_the_command(export, folder, tmp_path):
    arguments = [export, "-", f"--output={tmp_path / 'out'}", f"--json={tmp_path / 'all.json'}", "--flip", *SMALL]
    result = subprocess.run(
        [sys.executable, "-m", "dat_jax.predict", *map(str, arguments)],
        input=f"{folder / 'b.jpg'}\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=180,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{folder / 'b.jpg'}: ")
    assert len(result.stdout.splitlines()) == 1
    labels, _ = read_indices(tmp_path / "out" / "b.png")
    np.testing.assert_array_equal(labels, expected(export, folder / "b.jpg", flip=True))
    assert len(json.loads((tmp_path / "all.json").read_text())) == 1
