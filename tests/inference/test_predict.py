"""python -m dat_jax.predict: predictions of every kind of model for files, and error messages."""

import csv
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
from dat_jax import inference, predict
from dat_jax.checkpoints.exports import export_model
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.data import ade20k
from dat_jax.data.coco import decode_mask
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform
from dat_jax.evaluation.segmentation import make_segmenter
from dat_jax.inference.command import report_predictions
from dat_jax.inference.image_files import number_images
from dat_jax.tasks.segmentation.objective import make_segmentation_objective
from dat_jax.training.state import TrainState
from tests.helpers import tiny_detection, tiny_segmentation
from tests.helpers.photographs import photographs
from tests.helpers.tiny_classification import random_classifier
from tests.helpers.tiny_segmentation import random_segmentor
from tests.inference.test_detection import export_detector

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ["--long_side=64", "--short_side=64"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "export"
    model, variables = random_segmentor()
    export_model(directory, model=model, variables=variables)
    return directory


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Work directory of a run that evaluates in sliding windows, at two scales and flipped."""
    directory = tmp_path_factory.mktemp("workdir")
    model, variables = random_segmentor(num_classes=3)
    config = tiny_segmentation.get_config().unlock()
    config.head.dropout = model.dropout
    config.eval.update(ratios=(0.75, 1.0), flip=True, window=48, stride=32)
    (directory / "config.json").write_text(config.to_json_best_effort())
    (directory / "classes.txt").write_text("sky\nroad\ntree\n")
    save_checkpoint(directory, variables, metric="mIoU")
    return directory


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return export_detector(tmp_path_factory.mktemp("detector") / "export")


@pytest.fixture(scope="module")
def detector_workdir(tmp_path_factory):
    """Work directory of a detector without masks."""
    directory = tmp_path_factory.mktemp("detector_workdir")
    config = tiny_detection.get_config("retinanet").unlock()
    (directory / "config.json").write_text(config.to_json_best_effort())
    (directory / "classes.txt").write_text("cat\ndog\ncow\n")
    save_checkpoint(directory, tiny_detection.random_detector("retinanet")[1], metric="bbox/AP")
    return directory


def save_checkpoint(directory, variables, *, metric):
    model_state = {name: values for name, values in variables.items() if name != "params"}
    state = TrainState(jnp.int32(1), variables["params"], model_state, (), None)
    with Checkpoints(directory / "checkpoints", metric=metric) as checkpoints:
        checkpoints.save(jax.device_put(state), metadata={"examples": 0}, metrics={metric: 1.0})


@pytest.fixture
def folder(tmp_path):
    """Folder of three photographs, of only two sizes to be compiled, and files that are not images."""
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
    """Call ``main`` as the command does, and return the exit status."""
    values = flags.FlagValues()
    predict.define_flags(values)
    try:
        predict.main(values(["predict", *map(str, arguments)]), values)
    except SystemExit as error:
        return error.code
    return 0


def read_indices(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image), np.array(image.getpalette()).reshape(-1, 3)


def expected(trained, path, *, long_side=64, short_side=64, ratios=(1.0,), **options):
    """Labels computed with the model directly."""
    model, variables = dat_jax.load_pretrained(trained)
    with Image.open(path) as opened:
        image = np.array(opened.convert("RGB"))
    transform = make_segmentation_eval_transform(scale=(long_side, short_side), ratios=ratios)
    views = transform({"image": image, "label": np.zeros(image.shape[:2], np.uint8)})
    segment = make_segmenter(make_segmentation_objective(model, auxiliary_weight=0.0).predict, **options)
    inputs = [views[f"view_{index}"][None] for index in range(len(ratios))]
    labels, _ = segment(variables, inputs, np.array([image.shape[:2]]), image.shape[:2])
    return np.array(labels[0])


def test_segmentor_writes_label_maps_of_a_folder(export, folder, tmp_path, capsys):
    out, files = tmp_path / "new" / "out", [f"--{kind}={tmp_path / 'all'}.{kind}" for kind in ("json", "csv")]
    assert run(export, folder, f"--output={out}", *files, *SMALL) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "grey.png"]
    printed = capsys.readouterr()
    assert printed.err == ""
    lines, rows = printed.out.splitlines(), json.loads((tmp_path / "all.json").read_text())
    header, *table = csv.reader(io.StringIO((tmp_path / "all.csv").read_text()))
    assert header == ["image", "class", "share"]
    assert [(image, name, float(share)) for image, name, share in table] == [
        (row["image"], *item) for row in rows for item in row["classes"].items()
    ]
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
    assert read_indices(out / "b.png")[0].shape == (
        64,
        96,
    )  # at the size of the image, not of the network input (43 x 64)


def test_without_output_flags_results_are_only_printed(export, folder, tmp_path, capsys, monkeypatch):
    names = [folder / "grey.webp", "", folder / "a.PNG"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{name}\n" for name in names)))
    before = sorted(tmp_path.rglob("*"))
    assert run(export, "-", *SMALL) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(names[0]), str(names[2])]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_terminal_output_is_a_table(export, folder):
    segmenter = inference.load(export, long_side=64, short_side=64)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert report_predictions(segmenter, [folder / "a.PNG"], console=console)
    labels, _ = segmenter(np.array(Image.open(folder / "a.PNG")))
    assert console.file.getvalue().startswith(f"{folder / 'a.PNG'}\n┌")
    assert f"{np.mean(labels == np.bincount(labels.ravel()).argmax()):.1%}" in console.file.getvalue()


@pytest.mark.slow
def test_options_and_class_names_are_read_from_the_work_directory(workdir, folder, tmp_path, capsys):
    image = folder / "a.PNG"
    assert run(workdir, image, f"--output={tmp_path}", f"--json={tmp_path / 'x.json'}") == 0
    labels = expected(workdir, image, ratios=(0.75, 1.0), flip=True, window=48, stride=32)
    np.testing.assert_array_equal(read_indices(tmp_path / "a.png")[0], labels)
    assert set(json.loads((tmp_path / "x.json").read_text())[0]["classes"]) <= {"sky", "road", "tree"}
    (tmp_path / "names.txt").write_text("ciel\nforêt\narbre\n", encoding="utf-8")
    capsys.readouterr()
    overrides = ["--ratios=0.5,1.5", "--noflip", f"--classes={tmp_path / 'names.txt'}"]
    assert run(workdir, image, f"--output={tmp_path / 'other'}", *overrides) == 0
    labels = expected(workdir, image, ratios=(0.5, 1.5), window=48, stride=32)
    np.testing.assert_array_equal(read_indices(tmp_path / "other" / "a.png")[0], labels)
    assert set(re.findall(r"(\w+) [\d.]+%", capsys.readouterr().out)) <= {"ciel", "forêt", "arbre"}


def read_image(path):
    with Image.open(path) as opened:
        return np.array(opened.convert("RGB"))


def test_detector_writes_drawn_images_and_coco_results_of_a_folder(detector, folder, tmp_path, capsys):
    out, names = tmp_path / "out", ("a.PNG", "b.jpg", "grey.webp")
    options = ["--min_score=0.5", "--max_detections=5", *SMALL]
    assert run(detector, folder, f"--output={out}", f"--json={tmp_path / 'all.json'}", *options) == 0
    predictor = inference.load(detector, long_side=64, short_side=64, max_detections=5)
    printed, entries = capsys.readouterr(), json.loads((tmp_path / "all.json").read_text())
    assert printed.err == ""
    assert len(entries) == 15
    *lines, note = printed.out.splitlines()
    assert note.startswith(f"{tmp_path / 'all.json'}: image ids are 1 to 3")
    for number, (name, line) in enumerate(zip(names, lines, strict=True), start=1):
        image = read_image(folder / name)
        prediction = predictor(image)
        entries_of_image = [entry for entry in entries if entry["image"] == str(folder / name)]
        for index, entry in enumerate(entries_of_image):
            label, (x1, y1, x2, y2) = prediction["labels"][index], prediction["boxes"][index].tolist()
            mask = decode_mask(entry.pop("segmentation"))
            np.testing.assert_array_equal(mask, prediction["masks"][index])
            assert entry == {
                "image": str(folder / name),
                "image_id": number,
                "category": str(label),
                "category_id": label + 1,
                "bbox": pytest.approx([x1, y1, x2 - x1, y2 - y1]),
                "score": pytest.approx(prediction["scores"][index]),
            }
        scores = [f"{score:.2f}" for score in prediction["scores"] if score >= 0.5]
        assert sorted(re.findall(r"0\.\d\d", line), reverse=True) == scores
        assert line.startswith(f"{folder / name}: {prediction['labels'][0]} {scores[0]}" if scores else "")
        drawn, factor = read_image(out / f"{pathlib.Path(name).stem}.png"), -(-640 // max(image.shape[:2]))
        assert drawn.shape == (factor * image.shape[0], factor * image.shape[1], 3)
        assert (drawn[::factor, ::factor] != image).any()


@pytest.mark.slow
def test_class_names_of_a_detector_are_read_from_its_work_directory(detector_workdir, folder, tmp_path, capsys):
    files = [f"--{kind}={tmp_path / 'x'}.{kind}" for kind in ("json", "csv")]
    assert run(detector_workdir, folder / "a.PNG", *files, "--min_score=0") == 0
    entries = json.loads((tmp_path / "x.json").read_text())
    header, *rows = csv.reader(io.StringIO((tmp_path / "x.csv").read_text()))
    assert header == ["image", "class", "score", "x", "y", "width", "height"]
    for row, entry in zip(rows, entries, strict=True):
        assert row[:2] == [entry["image"], entry["category"]]
        np.testing.assert_allclose([float(value) for value in row[2:]], [entry["score"], *entry["bbox"]], rtol=1e-5)
    names = [("cat", "dog", "cow")[entry["category_id"] - 1] for entry in entries]
    assert [entry["category"] for entry in entries] == names
    assert "segmentation" not in entries[0]
    assert len(entries) == 5
    assert re.match(rf".*a.PNG: {names[0]} {entries[0]['score']:.2f}[ ,]", capsys.readouterr().out)
    (tmp_path / "names.txt").write_text("chat\nchien\nvache\n")
    assert run(detector_workdir, folder / "a.PNG", "--min_score=0", f"--classes={tmp_path / 'names.txt'}") == 0
    assert set(re.findall(r"([A-Za-z]+) 0\.", capsys.readouterr().out)) <= {"chat", "chien", "vache"}
    assert run(detector_workdir, folder / "a.PNG", "--min_score=1") == 0
    assert capsys.readouterr().out == f"{folder / 'a.PNG'}: nothing\n"


@pytest.mark.slow
def test_terminal_output_is_a_table_of_detections(detector_workdir, folder):
    predictor = inference.load(detector_workdir, min_score=0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert report_predictions(predictor, [folder / "a.PNG"], console=console)
    assert console.file.getvalue().startswith(f"{folder / 'a.PNG'}\n┌")
    for name, scores in predictor.describe(predictor(read_image(folder / "a.PNG"))).items():
        assert re.search(rf"{name} +│ {scores} ", console.file.getvalue())


def test_image_ids_are_the_numbers_in_file_names():
    def number(*names):
        return number_images([pathlib.Path(name) for name in names])

    assert number("val/000000000139.jpg", "val/000000000285.jpg") == [139, 285]
    assert number("a/7.jpg", "b/007.png") == [1, 2]
    assert number("7.jpg", "eight.jpg") == [1, 2]


@pytest.mark.slow
def test_damaged_images_are_left_out_of_the_results(detector_workdir, folder, tmp_path, capsys):
    (folder / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((2, 64, 3), np.uint8)).save(folder / "flat.png")  # padding makes it large enough
    arguments = [f"--output={tmp_path / 'out'}", f"--json={tmp_path / 'all.json'}"]
    assert run(detector_workdir, folder, *arguments) == 1
    assert re.fullmatch(r"error: The image .*empty.png cannot be decoded: .*\n", capsys.readouterr().err)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "flat.png", "grey.png"]
    numbers = {
        pathlib.Path(entry["image"]).name: entry["image_id"]
        for entry in json.loads((tmp_path / "all.json").read_text())
    }
    assert numbers["grey.webp"] == 5


@pytest.mark.slow
def test_damaged_images_are_reported_and_the_others_processed(export, folder, tmp_path, capsys):
    data = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((4, 64, 3), np.uint8)).save(folder / "flat.png")
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(folder / "deep.png")
    out = tmp_path / "out"
    assert run(export, folder, f"--output={out}", f"--json={tmp_path / 'all.json'}", *SMALL) == 1
    printed = capsys.readouterr()
    messages = printed.err.splitlines()
    for message, name, words in zip(
        messages,
        ("cut.jpg", "deep.png", "empty.png", "flat.png"),
        (
            "cannot be decoded",
            "more than 8 bits",
            "the file is empty",
            "image of 4 x 64 pixels is resized to 4 x 64",
        ),
        strict=True,
    ):
        assert message.startswith("error: ")
        assert str(folder / name) in message
        assert words in message
    assert len(printed.out.splitlines()) == len(json.loads((tmp_path / "all.json").read_text())) == 3
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "grey.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"TRAINED IMAGE\.\.\. .*, got nothing\."),
        (["{export}"], r"TRAINED IMAGE\.\.\. .*, got .*export\."),
        (["{export}", "{images}/none.jpg"], "There is no image or folder .*none.jpg"),
        (["{export}", "{images}/below"], "There is no image in .*below"),
        (["{export}", "-"], "There is no image in stdin"),
        (["{images}", "{images}/b.jpg"], r"Expected a folder of weights \(with model.json\)"),
        (["{classifier}", "{images}/b.jpg", "--flip"], "Unknown option 'flip' of a classifier"),
        (["{classifier}", "{images}/b.jpg", "--output={tmp}/o"], "is a classifier, which draws nothing"),
        (["{classifier}", "{images}/b.jpg", "--min_score=0.5"], "Unknown option 'min_score' of a classifier"),
        (["{classifier}", "{images}/b.jpg", "--short_side=64"], "Unknown option 'short_side' of a classifier"),
        (["{classifier}", "{images}/b.jpg", "--top=0"], "top must be at least 1, got 0"),
        (["{classifier}", "{images}/b.jpg", "--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["{classifier}", "{images}/b.jpg", "--image_size=0"], "image_size must be at least 32 .* got 0"),
        (["{classifier}", "{images}/b.jpg", "--image_size=64", "--resize=63"], "got 64 and 63"),
        (["{classifier}", "{images}/b.jpg", "--csv={tmp}/x", "--json={tmp}/x"], "x would be written twice"),
        (["{export}", "{images}/b.jpg", "--top=3"], "Unknown option 'top' of a segmentor"),
        (["{export}", "{images}/b.jpg", "--csv={tmp}/there/b.png"], "b.png exists already"),
        (["{detector}", "{images}/b.jpg", "--image_size=64"], "Unknown option 'image_size' of a detector"),
        (["{detector}", "{images}/b.jpg", "--flip"], "Unknown option 'flip' of a detector"),
        (["{detector}", "{images}/b.jpg", "--min_score=2"], "min_score must be from 0 to 1, got 2"),
        (["{detector}", "{images}/b.jpg", "--max_detections=0"], "max_detections must be at least 1, got 0"),
        (["{detector}", "{images}/b.jpg", "--classes={images}/notes.txt"], r"notes\.txt.* 3 "),
        (["{detector}", "{images}", "--output={tmp}/there"], "b.png exists already; --overwrite replaces it"),
        (["{export}", "{images}/b.jpg", "--min_score=0.5"], "Unknown option 'min_score' of a segmentor"),
        (
            ["{export}", "{images}", "{images}/a.PNG", "--output={tmp}/out"],
            "a.PNG and .*a.PNG would both be written to a.png",
        ),
        (["{export}", "{images}/b.jpg", "--output={tmp}/there"], "b.png exists already; --overwrite replaces it"),
        (["{export}", "{images}/b.jpg", "--json={tmp}/there/b.png"], "b.png exists already"),
        (["{export}", "{tmp}/there/b.png", "--output={tmp}/there", "--overwrite"], "b.png is an input"),
        (["{export}", "{images}/b.jpg", "--output={tmp}/o", "--json={tmp}/o/b.png"], "b.png would be written twice"),
        (["{export}", "{images}/b.jpg", "--output={images}/b.jpg"], "b.jpg is not a folder"),
        (["{export}", "{images}/b.jpg", "--json={images}"], "images cannot be written: it is a folder"),
        (["{export}", "{images}/b.jpg", "--ratios=1,x"], "--ratios must be numbers .* got 1,x"),
        (["{export}", "{images}/b.jpg", "--ratios=0"], "ratios must be one or more numbers above 0"),
        (["{export}", "{images}/b.jpg", "--ratios=nan"], "ratios must be one or more numbers above 0"),
        (["{export}", "{images}/b.jpg", "--short_side=0"], "short_side must be at least 1, got 0"),
        (["{export}", "{images}/b.jpg", "--classes={images}/notes.txt"], r"notes\.txt.* 5 "),
        (["{export}", "{images}/b.jpg", "--classes={images}/none.txt"], "none.txt cannot be read: .*No such file"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    arguments, message, export, detector, folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / "there").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "there" / "b.png")
    places = {"export": export, "detector": detector, "images": folder, "tmp": tmp_path}
    places["classifier"] = tmp_path / "classifier"
    if "{classifier}" in arguments:
        classifier, variables = random_classifier()
        export_model(places["classifier"], model=classifier, variables=variables)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n-\n"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert re.search(message, printed.err)
    assert printed.err.startswith("error: ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_failed_overwrite_keeps_the_existing_file(export, folder, tmp_path, capsys, monkeypatch):
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


@pytest.mark.slow
def test_command_line(export, folder, tmp_path):
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
