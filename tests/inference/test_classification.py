"""Classifiers as functions of images, and python -m dat_jax.predict with a classifier."""

import csv
import functools
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import dat_jax
from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.data import imagenet_names
from dat_jax.errors import UserError
from dat_jax.inference.classification import from_trained
from dat_jax.inference.command import report_predictions
from tests.helpers.photographs import photographs
from tests.helpers.tiny_classification import random_classifier
from tests.inference.test_predict import run

NAMES = ("cat", "dog", "crane", "cow", "crane")
OPTIONS = {"image_size": 64, "resize": 72}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "export"
    model, variables = random_classifier()
    export_model(directory, model=model, variables=variables, classes=NAMES, options=OPTIONS)
    return directory


@pytest.fixture
def folder(tmp_path):
    """Folder of three photographs of different sizes and one file that is not an image."""
    images = tmp_path / "images"
    images.mkdir()
    for name, index, width in (("a.png", 0, 96), ("c.png", 1, 64), ("d.png", 2, 80)):
        Image.fromarray(photographs(width=width, height=64)[index]).save(images / name)
    (images / "b.png").write_bytes(b"")
    return images


_load = functools.cache(dat_jax.load_pretrained)
_apply = jax.jit(lambda model, variables, images: model.apply(variables, images), static_argnums=0)


def expected(trained, path, *, image_size=64, resize=72):
    """Probabilities computed with the model directly."""
    model, variables = _load(trained)
    with Image.open(path) as opened:
        image = opened.convert("RGB").resize((resize, resize), Image.Resampling.BICUBIC)
    border = round((resize - image_size) / 2)
    pixels = np.asarray(image)[border:, border:][:image_size, :image_size] / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    logits = _apply(model, variables, pixels[None].astype(np.float32))
    return np.asarray(jax.nn.softmax(logits[0]))


def test_classifier_returns_the_probabilities_of_the_model(export, folder):
    classifier = inference.load(export)
    for name in ("a.png", "d.png"):
        probabilities = classifier(np.asarray(Image.open(folder / name)))
        assert (probabilities.dtype, probabilities.shape) == (np.float32, (5,))
        np.testing.assert_allclose(probabilities, expected(export, folder / name), atol=1e-5)
    assert classifier.class_names == NAMES
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert dict(classifier.options) == {**OPTIONS, "top": 5, "batch_size": 8, "image_dtype": "uint8", **statistics}
    logits = classifier.model.apply(classifier.variables, np.zeros((1, 64, 64, 3), np.float32))
    assert logits.shape == (1, 5)


@pytest.mark.slow
def test_several_images_are_padded_to_a_batch(export):
    classifier, shapes = inference.load(export), []
    network = classifier.predict

    def record_shape(variables, batch):
        shapes.append(batch["image"].shape)
        return network(variables, batch)

    object.__setattr__(classifier, "predict", record_shape)
    images = [photographs(width=width, height=64)[0] for width in (64, 96, 70)]
    probabilities = classifier.classify(images, pad_to=4)
    assert shapes == [(4, 64, 64, 3)]
    np.testing.assert_allclose(probabilities, np.stack([classifier(image) for image in images]), atol=1e-5)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((0, 64, 3), np.uint8),
        "photo.jpg",
    ],
    ids=["gray", "alpha", "float", "empty", "path"],
)
def test_other_inputs_than_images_are_refused(export, image):
    classifier = inference.load(export)
    with pytest.raises(UserError, match=r"Expected an image as an array, uint8 \(H, W, 3\), got "):
        classifier(image)
    with pytest.raises(UserError, match="Expected at least one image"):
        classifier.classify([])


def test_classes_are_ranked_and_duplicate_names_have_their_labels(export):
    classifier = inference.load(export, top=3)
    prediction = np.array([0.05, 0.1, 0.3, 0.05, 0.5], np.float32)
    assert classifier.rank(prediction) == {
        "crane (4)": pytest.approx(0.5),
        "crane (2)": pytest.approx(0.3),
        "dog": pytest.approx(0.1),
    }
    assert classifier.describe(prediction) == {"crane (4)": "50.0%", "crane (2)": "30.0%", "dog": "10.0%"}
    assert [row[:3] for row in classifier.to_rows(prediction, image="x")][1:] == [
        ("x", 2, "crane (2)"),
        ("x", 3, "dog"),
    ]
    assert len(inference.load(export, top=9).rank(prediction)) == 5


@pytest.mark.slow
def test_sizes_are_passed_or_stored_or_published(tmp_path, export):
    def sizes(path, *, published=(), **options):
        model, variables = dat_jax.load_pretrained(export, **dict(published))
        classifier = from_trained(path, model, variables, **options)
        return classifier.options["image_size"], classifier.options["resize"]

    assert sizes(export) == (64, 72)
    assert sizes(export, image_size=128) == (128, 144)
    assert sizes(export, image_size=128, resize=130) == (128, 130)
    assert sizes(tmp_path) == (64, 73)
    assert sizes(tmp_path, published={"image_size": 224}) == (224, 256)
    assert sizes(tmp_path, published={"image_size": 384}) == (384, 384)
    (tmp_path / "config.json").write_text(json.dumps({"data": {"image_size": 48, "eval_resize": 50}}))
    assert sizes(tmp_path) == (48, 50)


def test_a_model_of_1000_classes_has_the_names_of_imagenet(tmp_path):
    model, variables = random_classifier(num_classes=1000)
    export_model(tmp_path / "export", model=model, variables=variables)
    assert inference.load(tmp_path / "export").class_names == imagenet_names.CLASS_NAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (1.0,)}, "Unknown option 'ratios' of a classifier; the options are image_size, resize, top"),
        ({"image_size": 16}, "image_size must be at least 32 .* got 16 and 18"),
        ({"resize": 63}, "got 64 and 63"),
        ({"top": 0}, "top must be at least 1, got 0"),
    ],
)
def test_invalid_options_are_reported(options, message, export):
    with pytest.raises(UserError, match=message):
        inference.load(export, **options)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_folder_is_classified_despite_a_damaged_image(batch_size, export, folder, tmp_path, capsys):
    files = [f"--json={tmp_path / 'all.json'}", f"--csv={tmp_path / 'all.csv'}"]
    assert run(export, folder, "--top=2", f"--batch_size={batch_size}", *files) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: The image {folder / 'b.png'} cannot be decoded")
    assert len(printed.err.splitlines()) == 1
    lines, entries = printed.out.splitlines(), json.loads((tmp_path / "all.json").read_text())
    header, *rows = csv.reader(io.StringIO((tmp_path / "all.csv").read_text()))
    assert header == ["image", "rank", "class", "probability"]
    assert len(rows) == 6
    unique = ("cat", "dog", "crane (2)", "cow", "crane (4)")
    for index, name in enumerate(("a.png", "c.png", "d.png")):
        probabilities = expected(export, folder / name)
        best = np.argsort(-probabilities)[:2]
        assert entries[index]["image"] == str(folder / name)
        classes = {key.split(" ")[0]: value for key, value in entries[index]["classes"].items()}
        assert classes == {NAMES[label]: pytest.approx(float(probabilities[label]), abs=1e-5) for label in best}
        for rank, label in enumerate(best, start=1):
            image, row_rank, class_name, probability = rows[2 * index + rank - 1]
            assert (image, row_rank) == (str(folder / name), str(rank))
            assert class_name in (NAMES[label], unique[label])
            assert float(probability) == pytest.approx(float(probabilities[label]), abs=1e-5)
        assert lines[index].startswith(f"{folder / name}: {NAMES[best[0]]}")


@pytest.mark.slow
def test_terminal_output_is_a_table(export, folder):
    classifier, console = (
        inference.load(export),
        Console(file=io.StringIO(), force_terminal=True, highlight=False, width=100),
    )
    assert report_predictions(classifier, [folder / "a.png"], console=console)
    assert console.file.getvalue().startswith(f"{folder / 'a.png'}\n┌")
    assert f"{expected(export, folder / 'a.png').max():.1%}" in console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "image_size", "resize"),
    [("dat_pp_tiny", 224, 256), ("dat_pp_base_384", 384, 384), ("dat_tiny", 224, 256), ("dat_base_384", 384, 438)],
)
def test_images_are_resized_and_cropped_as_published(tmp_path, name, image_size, resize):
    classifier = from_trained(tmp_path, dat_jax.create_model(name), {}, image_size=image_size)
    assert classifier.options["resize"] == resize
