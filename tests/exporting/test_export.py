"""The command python -m dat_jax.export: its files, as other programs load them, and errors that end with one sentence."""

import importlib.util
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import cv2
import jax
import jax.export
import numpy as np
import orbax.checkpoint
import pytest
from absl import flags
from PIL import Image
from safetensors.numpy import load_file

import dat_jax
from dat_jax import export, inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.conversion import to_official
from dat_jax.errors import UserError
from dat_jax.exporting import check_files, load_program, make_program
from dat_jax.exporting.command import format_loading_code
from dat_jax.tasks.preprocessing import normalize
from tests.helpers.photographs import photographs
from tests.helpers.tiny_classification import random_classifier
from tests.helpers.tiny_segmentation import random_segmentor
from tests.inference.test_detection import export_detector

NAMES = ("cat", "dog", "crane", "cow", "hen")
OPTIONS = {"image_size": 64, "resize": 72}
# Packages that `pip install jax flatbuffers` installs.
ONLY_JAX = ("jax", "jaxlib", "numpy", "numpy.libs", "scipy", "scipy.libs", "ml_dtypes", "opt_einsum", "flatbuffers")
LOAD = """
import sys
folder, packages, images, out = sys.argv[1:]
sys.path.append(packages)
for name in ("flax", "dat_jax", "safetensors", "absl"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is installed")
import jax, jax.export, numpy, pathlib
data = pathlib.Path(folder, "model.stablehlo").read_bytes()
program = jax.jit(jax.export.deserialize(bytearray(data)).call)
images = numpy.load(images)
numpy.savez(out, *[program(images[:count]) for count in (1, 3, 8)])
"""


def run(*arguments):
    """Exit status of the command, run in this process."""
    values = flags.FlagValues()
    export.define_flags(values)
    try:
        export.main(values(["export", *map(str, arguments)]), values)
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture
def interruptible():
    """The usual handler of SIGINT, which workers of pytest ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "export"
    model, variables = random_classifier()
    export_model(directory, model=model, variables=variables, classes=NAMES, options=OPTIONS)
    return directory


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "classifier"
    assert run(trained, directory) == 0
    return directory


@pytest.fixture(scope="module")
def images():
    return np.stack([photographs(width=64, height=64)[index % 3] // (1 + index // 3) for index in range(8)])


@pytest.fixture(scope="module")
def logits(trained, images):
    model, variables = dat_jax.load(trained)
    return np.asarray(jax.jit(model.apply)(variables, normalize(images)))


def test_program_gives_the_same_logits_in_a_process_with_only_jax(exported, images, logits, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ONLY_JAX:
        place = pathlib.Path(importlib.util.find_spec("jax").origin).parents[1] / name
        if place.exists():
            (packages / name).symlink_to(place)
    np.save(tmp_path / "images.npy", images)
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        LOAD,
        exported,
        packages,
        tmp_path / "images.npy",
        tmp_path / "out.npz",
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert np.ptp(logits, axis=0).min() > 0.01  # images differ
    with np.load(tmp_path / "out.npz") as outputs:
        for count, key in zip((1, 3, 8), outputs.files, strict=True):
            np.testing.assert_allclose(outputs[key], logits[:count], rtol=1e-5, atol=1e-5)


def test_program_is_for_platforms_that_are_not_attached(exported):
    program = jax.export.deserialize(bytearray((exported / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "tpu", "cuda")
    assert [str(side) for side in program.in_avals[0].shape] == ["b", "64", "64", "3"]
    assert program.in_avals[0].dtype == np.uint8


def test_program_has_the_algorithms_of_each_platform_and_the_weights_once(trained):
    """Depthwise convolutions are shifted products on a CPU only."""
    predictor = inference.load(trained)
    texts = {}
    for platforms in (("cpu",), ("tpu",), ("cpu", "tpu", "cuda")):
        texts[platforms] = make_program(predictor, image_shape=(64, 64), platforms=platforms, batch=2).mlir_module()
    convolutions = {platforms: text.count("feature_group_count = ") for platforms, text in texts.items()}
    grouped = {platforms: text.count("feature_group_count = 1 ") for platforms, text in texts.items()}
    depthwise = {platforms: convolutions[platforms] - grouped[platforms] for platforms in texts}
    assert depthwise[("cpu",)] < depthwise[("tpu",)]
    assert depthwise[("cpu", "tpu", "cuda")] >= depthwise[("cpu",)] + 2 * depthwise[("tpu",)]
    largest = max(jax.tree.leaves(predictor.variables), key=np.size)
    assert texts[("cpu", "tpu", "cuda")].count(np.asarray(largest).tobytes().hex().upper()) == 1


@pytest.mark.slow
def test_images_normalized_outside_the_program(trained, tmp_path, images, logits):
    out = tmp_path / "outside"
    assert run(trained, out, "--formats=stablehlo", "--platforms=cpu", "--preprocessing=outside", "--batch=3") == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.stablehlo"]
    program = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(normalize(images[:3])), logits[:3], rtol=1e-5, atol=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    (record,) = manifest["program"]["inputs"]
    assert (record["name"], record["shape"], record["dtype"]) == ("images", [3, 64, 64, 3], "float32")
    assert not manifest["preprocessing"]["normalized_in_the_program"]
    mean, std = manifest["preprocessing"]["mean"], manifest["preprocessing"]["std"]
    np.testing.assert_allclose((images / 255 - mean) / std, normalize(images), atol=1e-5)


def test_a_program_of_another_jax_version_is_refused_in_one_sentence(exported, tmp_path, monkeypatch, capsys):
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    manifest = json.loads(path.read_text())
    oldest, newest = manifest["program"]["calling_convention_versions_read"]
    assert oldest <= manifest["program"]["calling_convention_version"] <= newest
    assert manifest["jax"] == jax.__version__
    path.write_text(json.dumps({**manifest, "jax": "9.8.7"}))
    assert load_program(tmp_path / "copy").platforms == ("cpu", "tpu", "cuda")
    monkeypatch.setattr(jax.export, "minimum_supported_calling_convention_version", newest + 1)
    capsys.readouterr()
    assert run(f"--check={tmp_path / 'copy'}") == 1
    message = capsys.readouterr().err
    assert "written by jax 9.8.7" in message
    assert f"installed jax {jax.__version__}" in message
    (tmp_path / "copy" / "model.stablehlo").write_bytes(b"of a later format")
    with pytest.raises(UserError, match=r"written by jax 9\.8\.7"):
        load_program(tmp_path / "copy")


def test_exported_folder_loads_and_exports_again(exported, trained, tmp_path, capsys):
    model, variables = dat_jax.load(exported)
    expected_model, expected = dat_jax.load(trained)
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    classifier = inference.load(exported)
    assert classifier.class_names == NAMES
    assert {name: classifier.options[name] for name in OPTIONS} == OPTIONS
    space = {}
    exec(format_loading_code(str(exported), json.loads((exported / "manifest.json").read_text())), space)
    assert space["logits"].shape == (1, len(NAMES))
    assert (exported / "model.safetensors").stat().st_mode == (exported / "model.json").stat().st_mode
    arrays = to_official(expected_model, expected["params"])
    written = load_file(exported / "model.safetensors")
    assert set(written) == set(arrays)
    for name, array in written.items():
        np.testing.assert_array_equal(array, arrays[name])
    assert run(exported, tmp_path / "again", "--formats=orbax") == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "again/model.json").read_text()) == json.loads((exported / "model.json").read_text())


@pytest.mark.slow
def test_numbers_of_the_manifest_reproduce_the_preprocessing(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    assert (manifest["task"], manifest["classes"]) == ("classification", list(NAMES))
    assert manifest["model"]["num_classes"] == len(NAMES)
    (resized, _), (side, _) = manifest["preprocessing"]["resize"], manifest["preprocessing"]["crop"]
    image = photographs(width=96, height=80)[0]
    resized_image = Image.fromarray(image).resize((resized, resized), Image.Resampling.BICUBIC)
    border = round((resized - side) / 2)
    crop = np.asarray(resized_image)[border:, border:][:side, :side]
    program = jax.export.deserialize(bytearray((exported / manifest["program"]["file"]).read_bytes()))
    probabilities = jax.nn.softmax(program.call(crop[None])[0])
    np.testing.assert_allclose(probabilities, inference.load(exported)(image), atol=1e-5)


def test_check_names_changed_and_missing_files(exported, trained, tmp_path, capsys):
    assert run(f"--check={exported}") == 0
    assert "files are as they were written." in capsys.readouterr().out
    out = tmp_path / "out"
    assert run(trained, out, "--formats=safetensors") == 0
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert run(f"--check={out}") == 1
    assert capsys.readouterr().err == f"error: {out} is damaged: model.safetensors differs from what was written.\n"
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing or cannot be read"):
        check_files(out)
    assert run(f"--check={tmp_path}") == 1
    assert "is not a folder written by dat_jax.export" in capsys.readouterr().err


def test_interrupted_export_leaves_no_files(trained, tmp_path, monkeypatch, interruptible):
    """Ctrl-C while Orbax writes waits for its threads."""
    save = orbax.checkpoint.Checkpointer.save

    def interrupted_save(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return save(*arguments, **options)

    monkeypatch.setattr(orbax.checkpoint.Checkpointer, "save", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        run(trained, tmp_path / "a/b", "--formats=orbax")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_segmentor_program(tmp_path, images):
    model, variables = random_segmentor()
    export_model(tmp_path / "trained", model=model, variables=variables)
    predictor = inference.load(tmp_path / "trained", short_side=64)
    program = make_program(predictor, image_shape=(64, 96), platforms=("cpu",))
    wide = np.concatenate([images, images[:, :, :32]], axis=2)[:2]
    expected = jax.jit(model.apply)(variables, normalize(wide))["logits"]
    logits = program.call(wide)
    assert logits.shape == (2, 16, 24, predictor.model.num_classes)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_detector_program(tmp_path, images, capsys):
    trained, out = tmp_path / "trained", tmp_path / "out"
    export_detector(trained)
    options = ["--batch=2", "--image_size=64", "--platforms=cpu", "--formats=stablehlo"]
    assert run(trained, out, *options) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert [array["name"] for array in manifest["program"]["inputs"]] == ["images", "sizes"]
    space = {}
    exec(capsys.readouterr().out.partition("To load it:\n\n")[2], space)  # the code that it prints
    assert space["detections"]["boxes"].shape[0] == 2
    program = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    valid = np.array([[64, 64], [48, 64]], np.int32)
    outputs = program.call(images[:2], valid)
    predictor = inference.load(trained)
    # Preprocessing by the manifest gives the detections of ``predict``.
    numbers, image = manifest["preprocessing"], photographs(width=100, height=75)[0]
    scale = min(numbers["long_side"] / 100, numbers["short_side"] / 75)
    height, width = (int(side * scale + 0.5) for side in image.shape[:2])
    padded = np.zeros((2, *numbers["pad_to"], 3), np.uint8)
    padded[0, :height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    detections = program.call(padded, np.array([[height, width]] * 2, np.int32))
    expected = inference.load(trained, long_side=64, short_side=64)(image)
    count = int(detections["valid"][0].sum())
    assert count == len(expected["boxes"]) > 0
    boxes = np.asarray(detections["boxes"])[0, :count] / (np.array([width, height, width, height]) / [100, 75, 100, 75])
    np.testing.assert_allclose(boxes, expected["boxes"], rtol=1e-3, atol=1e-2)

    batch = {"image": images[:2], "valid": valid, "scale": np.ones((2, 4), np.float32)}
    expected = predictor.predict(predictor.variables, batch)
    assert set(outputs) == set(expected) == {array["name"] for array in manifest["program"]["outputs"]}
    assert np.asarray(expected["scores"]).max() > 0
    for name in expected:
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert run(trained, tmp_path / "symbolic", "--batch=symbolic") == 1
    assert "batch must be a number" in capsys.readouterr().err
    assert not (tmp_path / "symbolic").exists()


def test_onnx_gives_the_same_logits(trained, tmp_path, images, logits):
    """Skipped without the extra, which is not a development requirement as it needs an older Orbax."""
    pytest.importorskip("jax2onnx", reason='pip install -e ".[onnx]"')
    onnxruntime = pytest.importorskip("onnxruntime")
    with jax.numpy_rank_promotion("allow"):  # jax2onnx promotes ranks
        assert run(trained, tmp_path / "classifier", "--formats=onnx") == 0
    assert sorted(path.name for path in (tmp_path / "classifier").iterdir()) == ["manifest.json", "model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "classifier/model.onnx")
    for count in (1, 3, 8):
        (outputs,) = session.run(["logits"], {"images": images[:count]})
        np.testing.assert_allclose(outputs, logits[:count], rtol=1e-5, atol=1e-5)

    model, variables = random_segmentor()
    export_model(tmp_path / "segmentor", model=model, variables=variables)
    out = tmp_path / "onnx_segmentor"
    with jax.numpy_rank_promotion("allow"):
        assert run(tmp_path / "segmentor", out, "--formats=onnx", "--image_size=64", "--batch=2") == 0
    (outputs,) = onnxruntime.InferenceSession(out / "model.onnx").run(None, {"images": images[:2]})
    expected = jax.jit(model.apply)(variables, normalize(images[:2]))["logits"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_onnx_is_refused_for_a_detector_and_without_jax2onnx(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert run(trained, tmp_path / "out", "--formats=onnx") == 1
    assert 'not installed: pip install -e ".[onnx]"' in capsys.readouterr().err
    export_detector(tmp_path / "detector")
    assert run(tmp_path / "detector", tmp_path / "out", "--formats=onnx", "--image_size=64") == 1
    assert "ONNX export supports classifiers and segmentors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{trained}"], "EXPORTED --push=hf://USER/REPOSITORY or --check=DIR, got {trained}"),
        (["nothing", "{out}"], "got nothing"),
        (["{trained}", "{trained}"], "exists already and nothing is overwritten"),
        (
            ["{trained}", "{out}", "--formats=tflite"],
            "formats must be one or more of orbax, stablehlo, safetensors, onnx, got tflite",
        ),
        (["{trained}", "{out}", "--platforms=gpu"], "cpu, tpu, cuda, rocm, each at most once, got gpu"),
        (["{trained}", "{out}", "--batch=0"], "batch must be symbolic or a number from 1 to 65,536, got 0"),
        (["{trained}", "{out}", "--batch=few"], "--batch must be symbolic or a number of at least 1, got few"),
        (
            ["{trained}", "{out}", "--image_size=64,96"],
            "image_size must be a single SIDE for a classifier, got 64 x 96",
        ),
        (["{trained}", "{out}/in/it", "--formats=onnx"], "ONNX"),
        (["{trained}", "{out}", "--formats=orbax", "--platforms=gpu"], "platforms must be"),
        (["{trained}", "{out}" + "x" * 300], "cannot be written: File name too long"),
        (["x" * 300, "{out}"], "got xxx"),
        (["{trained}", "{out}", "--image_size=big"], "--image_size must be SIDE or HEIGHT,WIDTH in pixels, got big"),
        (
            ["{trained}", "{out}", "--image_size=16"],
            "image_size must be at least 32 and resize at least image_size, got 16 and 18",
        ),
        (["{trained}", "/dev/null/out", "--formats=safetensors"], "/dev/null/out cannot be written"),
    ],
)
def test_errors_end_with_one_sentence_and_nothing_is_written(
    arguments, sentence, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    out = tmp_path / "out"
    assert run(*[argument.format(trained=trained, out=out) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence.format(trained=trained) in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
