"""Classifiers of images with other channels than RGB, from files to training, evaluation, prediction, export and fine-tuning."""

import json

import cv2
import jax
import numpy as np
import pytest
import tifffile

import dat_jax
from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.checkpoints.restore import initialize_state
from dat_jax.config import get_keys, load_config, validate
from dat_jax.data.image_format import ImageFormat
from dat_jax.errors import UserError
from dat_jax.exporting import load_program
from dat_jax.inference.image_files import read_image
from dat_jax.tasks.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from dat_jax.training import loop
from dat_jax.training.model_defaults import resolve_model
from dat_jax.training.trainer import Trainer
from tests.exporting.test_export import run as run_export
from tests.helpers import tiny_config
from tests.helpers.random_variables import random_variables
from tests.helpers.tiny_classification import random_classifier
from tests.inference.test_predict import run as run_predict
from tests.visualization.test_visualize import run as run_visualize

KINDS = {
    "gray": dict(channels=1, dtype="uint8", mean=(0.4,), std=(0.2,)),
    "multispectral": dict(channels=12, dtype="uint16", mean=(3000.0,), std=(1500.0,)),
    "float": dict(channels=4, dtype="float32", mean=(-0.5, 0.0, 0.5, 1.0), std=(1.0,)),
}


def write_image(path, image):
    """Write an array (H, W, C) in a format that its channels and dtype have in practice; returns the path with its suffix."""
    number = int(path.name)
    if image.shape[2] == 1:
        path = path.with_suffix((".png", ".jpg")[number % 2])
        assert cv2.imwrite(str(path), image[:, :, 0])
    elif number % 2:
        path = path.with_suffix(".npy")
        np.save(path, image)
    else:
        path = path.with_suffix(".tif")
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig", compression="zlib")
    return path


def write_data(folder, *, channels, dtype, **_):
    """Write two classes of noise that is brighter in the left or in the right half, in the last of the channels."""
    rng = np.random.default_rng(0)
    scale, shift = {"uint8": (1, 0), "uint16": (30, 0), "float32": (0.01, -1.0)}[dtype]
    for split, count in (("train", 96), ("val", 24)):
        for number in range(count):
            name = ("left", "right")[number // 2 % 2]
            values = rng.integers(0, 100, (36, 40, channels)).astype(np.float64)
            values[:, :20, -1] += 120 * (name == "left")
            values[:, 20:, -1] += 120 * (name == "right")
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            write_image(folder / split / name / str(number), (scale * values + shift).astype(dtype))
    return folder


def make_config(folder, kind, **values):
    config = tiny_config.get_config().unlock()
    config.data.update(directory=str(folder), **KINDS[kind])
    config.augmentation.update(rand_augment_count=0, erasing_probability=0.25, mixup_alpha=0.2, cutmix_alpha=0.2)
    config.augmentation.min_crop_area = 0.8
    config.epochs = 8
    config.update_from_flattened_dict(values)
    return config.lock()


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request, tmp_path_factory):
    """The kind of images, their folder, and the work directory and result of a run."""
    root = tmp_path_factory.mktemp(request.param)
    folder = write_data(root / "data", **KINDS[request.param])
    return request.param, folder, root / "run", loop.train(make_config(folder, request.param), str(root / "run"))


@pytest.mark.slow
def test_a_run_learns_and_is_evaluated(trained):
    kind, folder, workdir, result = trained
    assert result["top1"] > 90
    assert loop.evaluate(make_config(folder, kind), str(workdir))["top1"] == result["top1"]
    data = json.loads((workdir / "config.json").read_text())["data"]
    count = KINDS[kind]["channels"]
    assert data["std"] == list(KINDS[kind]["std"]) * count
    assert (data["channels"], len(data["mean"])) == (count, count)
    assert {"predictions.png", "sampled_points.png"} <= {path.name for path in workdir.iterdir()}
    other = make_config(folder, kind, **{"data.std": (7.0,)})
    with pytest.raises(UserError, match=r"The checkpoint is of another model: data\.std .*, now \[7\.0"):
        loop.evaluate(other, str(workdir))


@pytest.mark.slow
def test_files_are_classified_by_the_run_and_its_export(trained, tmp_path, capsys):
    kind, folder, workdir, result = trained
    assert run_export(workdir, tmp_path / "export") == 0
    entries = {}
    for name, path in (("run", workdir), ("export", tmp_path / "export")):
        table = tmp_path / f"{name}.json"
        assert run_predict(path, folder / "val", "--recursive", f"--json={table}") == 0
        entries[name] = json.loads(table.read_text())
    assert entries["run"] == entries["export"]
    correct = [max(entry["classes"], key=entry["classes"].get) in entry["image"] for entry in entries["run"]]
    assert (len(correct), 100 * np.mean(correct)) == (24, pytest.approx(result["top1"]))

    classifier = inference.load(tmp_path / "export")
    assert classifier.image_format == ImageFormat(KINDS[kind]["channels"], KINDS[kind]["dtype"])
    with pytest.raises(
        UserError, match=rf"{classifier.image_format.dtype} \(H, W, {classifier.image_format.channels}\)"
    ):
        classifier(np.zeros((32, 32, 3), np.uint8))
    path = sorted((folder / "val" / "left").iterdir())[0]
    image = read_image(path, classifier.image_format)
    batch = classifier.transform({"image": image})["image"][None]
    program = load_program(tmp_path / "export")
    assert program.in_avals[0].dtype == classifier.image_format.dtype
    np.testing.assert_allclose(jax.nn.softmax(program.call(batch)[0]), classifier(image), atol=1e-5)
    preprocessing = json.loads((tmp_path / "export" / "manifest.json").read_text())["preprocessing"]
    assert preprocessing["channels"] == KINDS[kind]["channels"]
    assert ("divide by 255" in preprocessing["steps"][-1]) == (kind == "gray")
    outside = tmp_path / "outside"
    arguments = ("--preprocessing=outside", "--formats=stablehlo", "--platforms=cpu", "--batch=1")
    assert run_export(workdir, outside, *arguments) == 0
    values = batch / 255 if kind == "gray" else batch.astype(np.float64)
    normalized = ((values - preprocessing["mean"]) / preprocessing["std"]).astype(np.float32)
    np.testing.assert_allclose(load_program(outside).call(normalized), program.call(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_images_and_points_are_drawn(trained, tmp_path):
    _, folder, workdir, _ = trained
    path = sorted((folder / "val" / "left").iterdir())[0]
    assert run_visualize(workdir, path, f"--output={tmp_path}", "--html") == 0
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".html"}


@pytest.mark.slow
def test_settings_are_taken_from_the_weights(trained, tmp_path, logs):
    """Of a run and of its export; an evaluation of the weights gives the result of the run."""
    kind, folder, workdir, result = trained
    assert run_export(workdir, tmp_path / "export", "--formats=orbax") == 0
    derived = {"data.channels": -1, "data.dtype": "auto", "data.mean": (), "data.std": ()}
    for weights in (workdir, tmp_path / "export"):
        config = make_config(folder, kind, init_from=str(weights), **derived)
        validate(config)
        assert loop.evaluate(config, str(tmp_path / "nothing"))["top1"] == result["top1"]
        data, count = Trainer(config).config.data, KINDS[kind]["channels"]
        assert (data.channels, data.dtype) == (count, KINDS[kind]["dtype"])
        assert data.std == KINDS[kind]["std"] * count
    assert not any("were trained with" in message for message in logs)
    loop.evaluate(make_config(folder, kind, init_from=str(workdir), **{"data.std": (7.0,)}), str(tmp_path / "nothing"))
    assert any("were trained with config.data.std=" in message for message in logs)


@pytest.mark.slow
def test_the_first_convolution_of_rgb_weights_is_adapted(trained, tmp_path, logs):
    kind, folder, _, _ = trained
    model = dat_jax.create_model("dat_pp_nano", num_classes=2, **tiny_config.ONE_STAGE)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    export_model(tmp_path / "rgb", model=model, variables=variables)
    trainer = Trainer(make_config(folder, kind, init_from=str(tmp_path / "rgb")))
    state = initialize_state(trainer.config, **loop._state_options(trainer))
    kernel, channels = variables["params"]["patch_proj"]["conv1"]["kernel"], KINDS[kind]["channels"]
    expected = kernel.sum(axis=2, keepdims=True) if channels == 1 else np.tile(kernel, (1, 1, 4, 1)) * 3 / channels
    adapted = state.params["patch_proj"]["conv1"]["kernel"]
    np.testing.assert_allclose(adapted, expected[:, :, :channels], rtol=1e-6)
    described = "one channel" if channels == 1 else f"{channels} channels"
    assert any(f"first convolution, for images with {described}" in message for message in logs)
    assert np.isfinite(loop.evaluate(trainer.config, str(tmp_path / "nothing"))["loss"])


def resolve(**values):
    config = load_config("finetune").unlock()
    config.update_from_flattened_dict({"model.name": "dat_pp_nano", "init_from": "", **values})
    return resolve_model(config).data


def test_settings_without_weights_are_those_of_imagenet():
    data = resolve()
    assert (data.channels, data.dtype, data.mean, data.std) == (3, "uint8", IMAGENET_MEAN, IMAGENET_STD)
    keys = get_keys("classification")["data"]
    assert (keys["mean"].default, keys["std"].default) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"data.channels": 12},
            r"config\.data\.mean must be one number, or one for each channel of the images \(12\), got 3: 0\.485, ",
        ),
        (
            {"data.channels": 4, "data.mean": (0.5,), "data.std": (0.1, 0.2)},
            r"config\.data\.std must be one number, or one for each channel of the images \(4\), got 2: 0\.1, 0\.2",
        ),
        ({"data.mean": (123.675, 116.28, 103.53)}, r"uint8 are divided by 255: config\.data\.mean .* got 123\.675"),
        ({"data.dtype": "uint16"}, r"uint16 are not divided: config\.data\.mean and std .* got those of ImageNet"),
        (
            {"data.dtype": "uint16", "data.mean": (9.0,), "augmentation.rand_augment_count": 2},
            r"rand_augment_count must be 0 with config\.data\.channels=3 and config\.data\.dtype=uint16, got 2",
        ),
        (
            {
                "data.channels": 1,
                "data.mean": (0.5,),
                "data.std": (0.5,),
                "augmentation.rand_augment_count": 1,
            },
            r"rand_augment_count must be 0 with config\.data\.channels=1 and config\.data\.dtype=uint8, got 1",
        ),
    ],
)
def test_settings_that_do_not_fit_the_channels_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        resolve(**values)


@pytest.mark.parametrize("name", ["upernet:dat_pp_t", "mask_rcnn:dat_pp_t_1x"])
def test_other_tasks_are_for_rgb_images(name):
    config = load_config(name).unlock()
    config.data.channels = 12
    with pytest.raises(
        UserError, match=r"config\.data\.channels must be 3 for \w+, which takes RGB images only, got 12"
    ):
        validate(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"mean must be one number, or one for each channel of the images \(12\), got 3: 0\.485"),
        (
            {"mean": 0.5, "std": (1.0, 2.0)},
            r"std must be one number, or one for each channel of the images \(12\), got 2",
        ),
        ({"mean": 0.5, "std": 0}, "std must be above 0"),
        ({"mean": 0.5, "std": 1, "image_dtype": "float64"}, "image_dtype must be one of uint8, uint16, float32, got"),
    ],
)
def test_options_of_inference_that_do_not_fit_the_channels_are_refused(tmp_path, options, message):
    model, variables = random_classifier(in_channels=12)
    export_model(tmp_path / "export", model=model, variables=variables)
    with pytest.raises(UserError, match=message):
        inference.load(tmp_path / "export", **options)
    classifier = inference.load(tmp_path / "export", mean=0.5, std=0.25, image_dtype="float32")
    assert classifier.options["std"] == (0.25,) * 12
