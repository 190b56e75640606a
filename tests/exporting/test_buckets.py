"""Exported programs that take images of all sizes up to a bucket."""

import json
import re
import shutil

import jax
import jax.export
import numpy as np
import pytest

import dat_jax
from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.errors import UserError
from dat_jax.exporting import load_program
from dat_jax.exporting.command import format_loading_code
from dat_jax.tasks.preprocessing import normalize
from tests.exporting.test_export import run
from tests.helpers.photographs import photographs
from tests.helpers.tiers import slow
from tests.helpers.tiny_classification import random_classifier
from tests.helpers.tiny_segmentation import random_segmentor
from tests.inference.test_detection import export_detector

SIZES = ((64, 96), (33, 70), (57, 41))  # of images in a bucket of 64 x 96


def fill(sizes, bucket):
    """Photographs of these sizes at the top left of arrays, whose other pixels are white."""
    arrays = np.full((len(sizes), *bucket, 3), 255, np.uint8)
    for index, (height, width) in enumerate(sizes):
        arrays[index, :height, :width] = photographs(width=width, height=height)[index]
    return arrays


@pytest.mark.parametrize("make", [slow(random_segmentor), random_classifier])
def test_images_of_mixed_sizes_get_the_logits_of_each_alone(make, tmp_path, capsys):
    model, variables = make()
    export_model(tmp_path / "trained", model=model, variables=variables)
    out = tmp_path / "out"
    options = ("--buckets=64x96,128x96", "--platforms=cpu", "--formats=orbax,stablehlo")
    assert run(tmp_path / "trained", out, *options) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["program"] is None
    assert [program["bucket"] for program in manifest["programs"]] == [[64, 96], [128, 96]]
    program = load_program(out, (50, 80))
    assert [str(side) for side in program.in_avals[0].shape] == ["b", "64", "96", "3"]
    images = fill(SIZES, (64, 96))
    logits = np.asarray(program.call(images, np.array(SIZES, np.int32)))
    alone = jax.jit(model.apply)
    for index, (height, width) in enumerate(SIZES):
        expected = alone(variables, normalize(images[index : index + 1, :height, :width]))
        expected = np.asarray(expected["logits"] if make is random_segmentor else expected)[0]
        got = logits[index][: -(-height // 4), : -(-width // 4)] if make is random_segmentor else logits[index]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    space = {}
    exec(format_loading_code(str(out), manifest), space)
    assert space["bucket"] == [64, 96]
    assert np.isfinite(space["logits"]).all()
    capsys.readouterr()
    assert run(f"--check={out}") == 0
    assert dat_jax.load(out)[0] == model
    for size, sentence in (
        (None, "for the buckets 64x96,128x96: pass the size"),
        ((200, 40), "No bucket holds"),
        ((64, 16), "whole numbers of at least 32, got"),
        ((64.0, 64), "whole numbers of at least 32, got"),
        ("64x64", "whole numbers of at least 32, got"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_program(out, size)


def swap_files(programs):
    programs[0]["file"], programs[1]["file"] = programs[1]["file"], programs[0]["file"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda programs: programs.pop(), "manifest.json is damaged"),
        (lambda programs: programs.clear(), "manifest.json is damaged"),
        (lambda programs: programs[0].pop("inputs"), "manifest.json is damaged"),
        (lambda programs: programs[0].pop("bucket"), "manifest.json is damaged"),
        (lambda programs: programs[0].update(bucket=[640, 640]), "manifest.json is damaged"),
        (lambda programs: programs[0].update(file="../elsewhere.stablehlo"), "manifest.json is damaged"),
        (lambda programs: programs[0].update(file=3), "manifest.json is damaged"),
        (lambda programs: programs[0]["inputs"][0].update(shape=["b", "64", 96, 3]), "manifest.json is damaged"),
        (lambda programs: programs.append(1), "manifest.json is damaged"),
        (swap_files, r"the program of model_96x64.stablehlo is not the one that manifest.json describes"),
    ],
)
def test_programs_that_do_not_fit_the_manifest_are_noticed(damage, sentence, two_buckets, tmp_path, capsys):
    shutil.copytree(two_buckets, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest["programs"])
    path.write_text(json.dumps(manifest))
    assert run(f"--check={tmp_path / 'copy'}") == 1
    error = capsys.readouterr().err
    assert re.search(sentence, error)
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def two_buckets(tmp_path_factory):
    place = tmp_path_factory.mktemp("two_buckets")
    model, variables = random_classifier()
    export_model(place / "trained", model=model, variables=variables)
    assert run(place / "trained", place / "out", "--buckets=64x96,96x64", "--platforms=cpu", "--formats=stablehlo") == 0
    return place / "out"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet"])
def test_a_detector_gives_the_detections_of_each_image_alone(head, tmp_path):
    export_detector(tmp_path / "trained", head)
    options = ("--buckets=96x128", "--batch=2", "--platforms=cpu", "--formats=stablehlo")
    assert run(tmp_path / "trained", tmp_path / "out", *options) == 0
    sizes, predictor = ((64, 90), (90, 33)), inference.load(tmp_path / "trained")
    images = fill(sizes, (96, 128))
    detections = load_program(tmp_path / "out", (64, 90)).call(images, np.array(sizes, np.int32))
    assert np.asarray(detections["valid"]).any(axis=1).all()
    for index, (height, width) in enumerate(sizes):
        padded = np.zeros((1, -(-height // 32) * 32, -(-width // 32) * 32, 3), np.uint8)
        padded[0, :height, :width] = images[index, :height, :width]
        batch = {"image": padded, "valid": np.array([[height, width]]), "scale": np.ones((1, 4), np.float32)}
        expected = predictor.predict(predictor.variables, batch)
        for name, values in expected.items():
            np.testing.assert_allclose(detections[name][index], values[0], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_bucket_has_programs_of_platforms_that_are_not_attached(tmp_path):
    model, variables = random_segmentor()
    export_model(tmp_path / "trained", model=model, variables=variables)
    assert run(tmp_path / "trained", tmp_path / "out", "--buckets=64x96", "--formats=stablehlo") == 0
    assert load_program(tmp_path / "out").platforms == ("cpu", "tpu", "cuda")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--buckets=64"], '--buckets: expected heights and widths such as "608x832,832x608", got '),
        (["--buckets=64x96,64x96"], "buckets must differ, got 64x96,64x96"),
        (["--buckets=16x96"], "buckets must be at least 32 pixels per side, got 16 x 96"),
        (["--buckets=64x96", "--batch=99999999999999999999"], "a number from 1 to 65,536, got 99999"),
        (["--buckets=64x20000"], "sides must be at most 16384 pixels, got '64x20000'"),
        (["--buckets=64x96", "--image_size=64"], "buckets and image_size cannot be combined"),
        (["--buckets=64x96", "--formats=orbax"], "buckets are for the format stablehlo"),
        (["--buckets=64x96", "--formats=stablehlo,onnx"], "An ONNX file takes images of one size"),
    ],
)
def test_impossible_buckets_are_refused_and_nothing_is_written(arguments, sentence, tmp_path, capsys):
    model, variables = random_classifier()
    export_model(tmp_path / "trained", model=model, variables=variables)
    assert run(tmp_path / "trained", tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_the_jax_that_wrote_it_cannot_read_is_damaged(two_buckets, tmp_path):
    shutil.copytree(two_buckets, tmp_path / "copy")
    (tmp_path / "copy" / "model_64x96.stablehlo").write_bytes(b"no program")
    with pytest.raises(
        UserError, match=rf"is damaged: jax {re.escape(jax.__version__)}, which wrote it, cannot read it"
    ):
        load_program(tmp_path / "copy", (64, 96))


def test_buckets_of_a_detector_are_multiples(tmp_path, capsys):
    export_detector(tmp_path / "trained", "retinanet")
    assert run(tmp_path / "trained", tmp_path / "out", "--buckets=96x130") == 1
    assert "multiples of 32, got 96x130" in capsys.readouterr().err


def test_a_program_for_one_size_refuses_others(tmp_path):
    model, variables = random_classifier()
    export_model(tmp_path / "trained", model=model, variables=variables)
    assert run(tmp_path / "trained", tmp_path / "out", "--image_size=64", "--platforms=cpu", "--formats=stablehlo") == 0
    assert load_program(tmp_path / "out", (64, 64)).in_avals[0].shape[1:3] == (64, 64)
    with pytest.raises(UserError, match="for images of 64x64 only, got a size of 32x64"):
        load_program(tmp_path / "out", (32, 64))
