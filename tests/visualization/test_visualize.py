"""python -m dat_jax.visualize: figures of segmentors (with and without annotations), detectors and classifiers."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

import dat_jax
from dat_jax import visualize
from dat_jax.checkpoints.exports import export_model
from dat_jax.errors import UserError
from dat_jax.visualization import charts
from dat_jax.visualization.label_files import read_labels
from tests.helpers.photographs import photographs
from tests.helpers.random_variables import random_variables
from tests.helpers.tiny_segmentation import random_segmentor
from tests.inference.test_detection import export_detector
from tests.inference.test_predict import SMALL
from tests.visualization.test_attention_page import TINY

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "export"
    model, variables = random_segmentor()
    export_model(directory, model=model, variables=variables)
    return directory


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return export_detector(tmp_path_factory.mktemp("detector") / "export")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifier") / "export"
    model = dat_jax.create_model("dat_pp_nano", **TINY)
    export_model(directory, model=model, variables=random_variables(model, np.zeros((1, 64, 64, 3), np.float32)))
    return directory


@pytest.fixture
def folder(tmp_path):
    """Folder of two photographs of 64 x 64 pixels, one size to be compiled, with label maps beside it."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for index, name in enumerate("ab"):
        Image.fromarray(photographs(width=64, height=64)[index]).save(images / f"{name}.jpg")
        values = np.full((64, 64), 255, np.uint8)
        values[:32] = index + 3
        Image.fromarray(values).save(labels / f"{name}.png")
    return images


def run(*arguments):
    values = flags.FlagValues()
    visualize.define_flags(values)
    try:
        visualize.main(values(["visualize", *map(str, arguments)]), values)
    except SystemExit as error:
        return error.code
    return 0


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.slow
def test_figures_of_a_segmentor_have_a_further_panel_for_labels(export, folder, tmp_path, capsys):
    plain, labelled = tmp_path / "plain", tmp_path / "labelled"
    assert run(export, folder, f"--output={plain}", *SMALL) == 0
    assert run(export, folder, f"--output={labelled}", f"--labels={tmp_path / 'labels'}", *SMALL) == 0
    lines = [f"{folder / name}.jpg: {directory / name}.png" for directory in (plain, labelled) for name in "ab"]
    printed = capsys.readouterr()
    assert (printed.out.splitlines(), printed.err) == (lines, "")
    for directory in (plain, labelled):
        assert sorted(path.name for path in directory.iterdir()) == ["a.png", "b.png"]
    first, second = read(plain / "a.png"), read(labelled / "a.png")
    assert 400 < first.shape[0] == second.shape[0] < 1000
    assert 1500 < first.shape[1] < 2500
    assert second.shape[1] - first.shape[1] == pytest.approx(520, abs=2)  # 4 inches of 130 pixels
    assert not np.array_equal(first, read(plain / "b.png"))
    assert first.std() > 20


def test_long_class_names_are_shortened_in_the_middle():
    assert charts.shorten("short", 5) == "short"
    assert charts.shorten("n02085936_Maltese_dog", 11) == "n0208…e_dog"
    assert len(charts.shorten("n02085936_Maltese_dog", 8)) == 8


def test_titles_of_predictions_do_not_overlap(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(charts.Axes, "set_title", lambda self, title, **_: titles.append(title))
    names = ["a_very_long_name_of_a_class", "another_very_long_name_of_a_class", "c"]
    options = dict(labels=[0, 1, 2], predictions=[0, 0, 2], class_names=names)
    charts.save_predictions(tmp_path / "predictions.png", np.zeros((3, 8, 8, 3), np.uint8), **options)
    assert len(titles) == 3
    assert max(len(line) for title in titles for line in title.split("\n")) <= 15


@pytest.mark.slow
def test_figures_of_a_detector_show_detections_and_sampled_points(detector, folder, tmp_path, capsys):
    assert run(detector, folder, f"--output={tmp_path / 'out'}", "--max_detections=5", *SMALL) == 0
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    figure = read(tmp_path / "out" / "a.png")
    assert figure.shape == (559, 2080, 3)  # four panels of 4 inches; the last one is empty
    image, detections, points, empty = np.split(figure, 4, axis=1)
    assert (empty == 255).all()
    for panel in (detections, points):
        assert (panel != image).any(axis=-1).mean() > 0.05
    blue = np.array([31, 119, 180])  # color of the first group
    assert (abs(points - blue).max(axis=-1) < 30).sum() > 4 * (abs(image - blue).max(axis=-1) < 30).sum()


def test_figures_and_pages_of_a_classifier_show_its_attention(classifier, folder, tmp_path, capsys):
    common = [classifier, folder / "a.jpg", "--html", "--keys=3"]
    assert run(*common, f"--output={tmp_path / 'out'}") == 0
    assert run(*common, f"--output={tmp_path / 'other'}", "--query=20,50", "--blocks=stages_0/blocks_0") == 0
    assert run(*common, f"--output={tmp_path / 'other'}") == 1
    assert re.fullmatch(r"error: .*a.png exists already; --overwrite replaces it\.\n", capsys.readouterr().err)
    (tmp_path / "other" / "a.png").unlink()
    assert run(*common, f"--output={tmp_path / 'other'}") == 1
    assert re.fullmatch(r"error: .*a.html exists already; --overwrite replaces it\.\n", capsys.readouterr().err)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.html", "a.png"]
    figure = read(tmp_path / "out" / "a.png")
    assert figure.shape[1] == 1430  # five panels of 2.6 inches
    colors = [np.array([31, 119, 180]), np.array([255, 127, 14])]  # colors of the first and the second group
    first, second, third = np.array_split(figure[: figure.shape[0] // 3].astype(int), 5, axis=1)[:3]
    counts = [[(abs(panel - c).max(axis=-1) < 40).sum() for c in colors] for panel in (first, second, third)]
    assert counts[1][0] > counts[0][0] + 50  # stages_0/blocks_1 has one group, stages_1/blocks_0 two
    assert counts[2][1] > counts[1][1] + 50
    selections = [
        re.search(r'"query":\[(.*?)\],"block":"(.*?)"', (tmp_path / d / "a.html").read_text()) for d in ("out", "other")
    ]
    assert selections[0].groups() == ("32.0,32.0", "stages_1/blocks_0")
    y, x = map(float, selections[1][1].split(","))
    assert (y, x) == pytest.approx((20.5 * 73 / 64 - 4, 50.5 * 73 / 64 - 4))
    assert selections[1][2] == "stages_0/blocks_0"


def test_points_are_smaller_if_there_are_many(tmp_path):
    image, sums = np.zeros((64, 64, 3), np.uint8), []
    for side in (4, 60):
        points = {"stages_0/blocks_0": np.zeros((1, 1, side, side, 2))}  # all points in the center
        path = tmp_path / f"{side}.png"
        charts.save_sampled_points(path, image[None], points, map_shapes={"stages_0/blocks_0": (16, 16)})
        blue = read(path).astype(int)
        sums.append(((blue[..., 2] - blue[..., 0]) > 60).sum())
    assert sums[0] > 2 * sums[1] > 0


@pytest.mark.slow
def test_labels_of_one_image_are_a_file_or_a_folder(export, folder, tmp_path):
    for name, place in (("file", "labels/a.png"), ("folder", "labels")):
        arguments = [f"--output={tmp_path / name}", f"--labels={tmp_path / place}", *SMALL]
        assert run(export, folder / "a.jpg", *arguments) == 0
    np.testing.assert_array_equal(read(tmp_path / "file" / "a.png"), read(tmp_path / "folder" / "a.png"))


def test_label_files_count_classes_from_0_or_1(tmp_path):
    values = np.array([[0, 1, 5, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    options = dict(shape=(1, 4), classes=5)
    labels = read_labels(tmp_path / "a.png", **options, zero_is_ignored=True)
    np.testing.assert_array_equal(labels, [[255, 0, 4, 255]])
    with pytest.raises(UserError, match=r"a.png contains 5, which is not one of 5 classes\."):
        read_labels(tmp_path / "a.png", **options)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png", shape=(1, 4), classes=6), values)


def test_colormap_goes_from_dark_to_bright():
    colors = charts.apply_colormap(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert (colors.shape, colors.dtype) == ((1, 3, 3), np.uint8)
    assert colors[0, 0].sum() < colors[0, 1].sum() < colors[0, 2].sum()


@pytest.mark.slow
def test_failed_images_are_reported_and_the_others_processed(export, folder, tmp_path, capsys):
    (folder / "c.jpg").write_bytes(b"no image")
    (tmp_path / "labels" / "c.png").write_bytes(b"")
    Image.fromarray(np.zeros((64, 60), np.uint8)).save(tmp_path / "labels" / "a.png")
    assert run(export, folder, f"--output={tmp_path / 'out'}", f"--labels={tmp_path / 'labels'}", *SMALL) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: .*a.jpg: The label file .*a.png .* 64 x 64 .*, got 64 x 60\.", first)
    assert re.fullmatch(r"error: The image .*c.jpg cannot be decoded.*", second)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{export}", "{images}"], r"Expected TRAINED IMAGE\.\.\. --output=DIR"),
        (["{export}", "--output={tmp}/out"], r"Expected TRAINED IMAGE\.\.\. --output=DIR"),
        (["{export}", "{tmp}/none.jpg", "--output={tmp}/out"], "There is no image or folder .*none.jpg"),
        (["{tmp}", "{images}", "--output={tmp}/out"], r"Expected a folder of weights \(with model.json\)"),
        (["{export}", "{images}", "--output={tmp}/labels"], "a.png exists already; --overwrite replaces it"),
        (
            ["{export}", "{images}", "--output={tmp}/labels", "--labels={tmp}/labels", "--overwrite"],
            "a.png is an input and would be overwritten",
        ),
        (["{export}", "{images}", "--output={tmp}/out", "--labels={tmp}/labels/a.png"], "--labels must be a folder"),
        (["{export}", "{images}", "--output={tmp}/out", "--labels={images}"], "There is no label file .*a.png"),
        (["{export}", "{images}/a.jpg", "--output={tmp}/out", "--labels={tmp}/x"], "There is no label file .*x"),
        (
            ["{detector}", "{images}", "--output={tmp}/out", "--labels={tmp}/labels"],
            "--labels requires a segmentor, but .*export is a detector",
        ),
        (["{detector}", "{images}", "--output={tmp}/out", "--ratios=1.0"], "Unknown option 'ratios' of a detector"),
        (
            ["{export}", "{images}", "--output={tmp}/out", "--html"],
            "--html requires a classifier, but .*export is a segm",
        ),
        (
            ["{detector}", "{images}", "--output={tmp}/out", "--query=1,2"],
            "--query requires a classifier, but .* detector",
        ),
        (
            ["{classifier}", "{images}", "--output={tmp}/out", "--labels={tmp}/labels"],
            "--labels requires .* a classifier",
        ),
        (["{classifier}", "{images}", "--output={tmp}/out", "--query=12"], "--query must be Y,X in pixels .* got 12"),
        (["{classifier}", "{images}", "--output={tmp}/out", "--query=a,nan"], "--query must be Y,X .* got a,nan"),
        (
            ["{classifier}", "{images}/a.jpg", "--output={tmp}/out", "--query=64,0"],
            "a.jpg: The query 64,0 lies outside",
        ),
        (["{classifier}", "{images}/a.jpg", "--output={tmp}/out", "--keys=0"], "--keys must be at least 1, got 0"),
        (
            ["{classifier}", "{images}", "--output={tmp}/out", "--blocks=stages_9/blocks_0"],
            "--blocks must be .*stages_0/blocks_0, stages_0/blocks_1, stages_1/blocks_0.* got 'stages_9/blocks_0'",
        ),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    arguments, message, export, detector, classifier, folder, tmp_path, capsys
):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = dict(export=export, detector=detector, classifier=classifier, images=folder, tmp=tmp_path)
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert re.match(f"error: .*{message}", printed.err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_command_line(export, folder, tmp_path):
    arguments = [export, folder / "a.jpg", f"--output={tmp_path / 'out'}", *SMALL]
    result = subprocess.run(
        [sys.executable, "-m", "dat_jax.visualize", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=180,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{folder / 'a.jpg'}: {tmp_path / 'out' / 'a.png'}\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
