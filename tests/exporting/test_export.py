"""python -m dat_jax.export: what other programs get of it, with jax alone, and mistakes that end with one sentence."""

import importlib.util
import json
import pathlib
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
from dat_jax.checkpoints.loading import export_model
from dat_jax.conversion import to_official
from dat_jax.errors import UserError
from dat_jax.exporting import check_files, make_program
from dat_jax.tasks.classification import normalize
from tests.helpers.photographs import photographs
from tests.helpers.tiny_classification import random_classifier
from tests.helpers.tiny_segmentation import random_segmentor
from tests.inference.test_detection import export_detector

NAMES = ("cat", "dog", "crane", "cow", "hen")
OPTIONS = {"image_size": 64, "resize": 72}
# What `pip install jax flatbuffers` installs.
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
    sys.exit(f"{name} is here")
import jax, jax.export, numpy, pathlib
data = pathlib.Path(folder, "model.stablehlo").read_bytes()
program = jax.jit(jax.export.deserialize(bytearray(data)).call)
images = numpy.load(images)
numpy.savez(out, *[program(images[:count]) for count in (1, 3, 8)])
"""


def run(*arguments):
    """What main does, without a process."""
    values = flags.FlagValues()
    export.define_flags(values)
    try:
        export.main(values(["export", *map(str, arguments)]), values)
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture
def interruptible():
    """SIGINT as programs have it; workers of pytest ignore it."""
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
    directory = tmp_path_factory.mktemp("exported") / "of_classifier"
    assert run(trained, directory) == 0
    return directory


@pytest.fixture(scope="module")
def images():
    return np.stack([photographs(width=64, height=64)[index % 3] // (1 + index // 3) for index in range(8)])


@pytest.fixture(scope="module")
def logits(trained, images):
    model, variables = dat_jax.load(trained)
    return np.asarray(jax.jit(model.apply)(variables, normalize(images)))


def test_a_process_with_jax_alone_has_the_same_logits(exported, images, logits, tmp_path):
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
    with np.load(tmp_path / "out.npz") as found:
        for count, key in zip((1, 3, 8), found.files, strict=True):
            np.testing.assert_allclose(found[key], logits[:count], rtol=1e-5, atol=1e-5)


def test_the_program_is_for_platforms_that_are_not_here(exported):
    program = jax.export.deserialize(bytearray((exported / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "tpu", "cuda")
    assert [str(side) for side in program.in_avals[0].shape] == ["b", "64", "64", "3"]
    assert program.in_avals[0].dtype == np.uint8


def test_each_platform_has_its_own_algorithms(trained):
    """Depthwise convolutions are shifts on a CPU alone; weights are there once however many platforms there are."""
    looker = inference.load(trained)
    texts = {}
    for platforms in (("cpu",), ("tpu",), ("cpu", "tpu", "cuda")):
        texts[platforms] = make_program(looker, image_shape=(64, 64), platforms=platforms, batch=2).mlir_module()
    convolutions = {platforms: text.count("feature_group_count = ") for platforms, text in texts.items()}
    grouped = {platforms: text.count("feature_group_count = 1 ") for platforms, text in texts.items()}
    depthwise = {platforms: convolutions[platforms] - grouped[platforms] for platforms in texts}
    assert depthwise[("cpu",)] < depthwise[("tpu",)]
    assert depthwise[("cpu", "tpu", "cuda")] >= depthwise[("cpu",)] + 2 * depthwise[("tpu",)]
    largest = max(jax.tree.leaves(looker.variables), key=np.size)
    assert texts[("cpu", "tpu", "cuda")].count(np.asarray(largest).tobytes().hex().upper()) == 1


def test_the_caller_may_normalise(trained, tmp_path, images, logits):
    out = tmp_path / "outside"
    assert run(trained, out, "--formats=stablehlo", "--platforms=cpu", "--preprocessing=outside", "--batch=3") == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.stablehlo"]
    program = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(normalize(images[:3])), logits[:3], rtol=1e-5, atol=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    (described,) = manifest["program"]["inputs"]
    assert (described["name"], described["shape"], described["dtype"]) == ("images", [3, 64, 64, 3], "float32")
    assert not manifest["preprocessing"]["normalized_in_the_program"]
    mean, std = manifest["preprocessing"]["mean"], manifest["preprocessing"]["std"]
    np.testing.assert_allclose((images / 255 - mean) / std, normalize(images), atol=1e-5)


def test_the_folder_is_what_the_tools_take(exported, trained, tmp_path, capsys):
    model, variables = dat_jax.load(exported)
    wanted_model, wanted = dat_jax.load(trained)
    assert model == wanted_model
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)
    classifier = inference.load(exported)
    assert classifier.class_names == NAMES
    assert {name: classifier.options[name] for name in OPTIONS} == OPTIONS
    space = {}
    exec(export.format_loading(str(exported), json.loads((exported / "manifest.json").read_text())), space)
    assert space["logits"].shape == (1, len(NAMES))
    assert (exported / "model.safetensors").stat().st_mode == (exported / "model.json").stat().st_mode
    arrays = to_official(wanted_model, wanted["params"])
    written = load_file(exported / "model.safetensors")
    assert set(written) == set(arrays)
    for name, array in written.items():
        np.testing.assert_array_equal(array, arrays[name])
    # Exported again, it is the same.
    assert run(exported, tmp_path / "again", "--formats=orbax") == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "again/model.json").read_text()) == json.loads((exported / "model.json").read_text())


def test_the_manifest_says_what_is_done_to_an_image(exported):
    """Its numbers alone lead to what the program takes."""
    manifest = json.loads((exported / "manifest.json").read_text())
    assert (manifest["task"], manifest["classes"]) == ("classification", list(NAMES))
    assert manifest["model"]["num_classes"] == len(NAMES)
    (resized, _), (side, _) = manifest["preprocessing"]["resize"], manifest["preprocessing"]["crop"]
    image = photographs(width=96, height=80)[0]
    seen = Image.fromarray(image).resize((resized, resized), Image.Resampling.BICUBIC)
    border = round((resized - side) / 2)
    seen = np.asarray(seen)[border:, border:][:side, :side]
    program = jax.export.deserialize(bytearray((exported / manifest["program"]["file"]).read_bytes()))
    found = jax.nn.softmax(program.call(seen[None])[0])
    np.testing.assert_allclose(found, inference.load(exported)(image), atol=1e-5)


def test_a_changed_file_is_noticed(exported, trained, tmp_path, capsys):
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
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        check_files(out)
    assert run(f"--check={tmp_path}") == 1
    assert "is no folder of dat_jax.export" in capsys.readouterr().err


def test_an_interrupted_export_leaves_nothing(trained, tmp_path, monkeypatch, interruptible):
    """Ctrl-C while Orbax writes: its threads are waited for."""
    save = orbax.checkpoint.Checkpointer.save

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return save(*arguments, **options)

    monkeypatch.setattr(orbax.checkpoint.Checkpointer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(trained, tmp_path / "a/b", "--formats=orbax")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_segmentors_program(tmp_path, images):
    model, variables = random_segmentor()
    export_model(tmp_path / "trained", model=model, variables=variables)
    looker = inference.load(tmp_path / "trained", short_side=64)
    program = make_program(looker, image_shape=(64, 96), platforms=("cpu",))
    wide = np.concatenate([images, images[:, :, :32]], axis=2)[:2]
    wanted = jax.jit(model.apply)(variables, normalize(wide))["logits"]
    found = program.call(wide)
    assert found.shape == (2, 16, 24, looker.model.num_classes)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_a_detectors_program(tmp_path, images, capsys):
    trained, out = tmp_path / "trained", tmp_path / "out"
    export_detector(trained)
    options = ["--batch=2", "--image_size=64", "--platforms=cpu", "--formats=stablehlo"]
    assert run(trained, out, *options) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert [array["name"] for array in manifest["program"]["inputs"]] == ["images", "sizes"]
    space = {}
    exec(capsys.readouterr().out.partition("To load it:\n\n")[2], space)  # the lines that it prints
    assert space["detections"]["boxes"].shape[0] == 2
    program = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    valid = np.array([[64, 64], [48, 64]], np.int32)
    found = program.call(images[:2], valid)
    looker = inference.load(trained)
    # What the manifest says of an image leads to what ``predict`` finds in it.
    how, image = manifest["preprocessing"], photographs(width=100, height=75)[0]
    scale = min(how["long_side"] / 100, how["short_side"] / 75)
    height, width = (int(side * scale + 0.5) for side in image.shape[:2])
    padded = np.zeros((2, *how["pad_to"], 3), np.uint8)
    padded[0, :height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    seen = program.call(padded, np.array([[height, width]] * 2, np.int32))
    wanted = inference.load(trained, long_side=64, short_side=64)(image)
    count = int(seen["valid"][0].sum())
    assert count == len(wanted["boxes"]) > 0
    boxes = np.asarray(seen["boxes"])[0, :count] / (np.array([width, height, width, height]) / [100, 75, 100, 75])
    np.testing.assert_allclose(boxes, wanted["boxes"], rtol=1e-3, atol=1e-2)

    batch = {"image": images[:2], "valid": valid, "scale": np.ones((2, 4), np.float32)}
    wanted = looker.predict(looker.variables, batch)
    assert set(found) == set(wanted) == {array["name"] for array in manifest["program"]["outputs"]}
    assert np.asarray(wanted["scores"]).max() > 0
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert run(trained, tmp_path / "symbolic", "--batch=symbolic") == 1
    assert "batch wants a number" in capsys.readouterr().err
    assert not (tmp_path / "symbolic").exists()


def test_onnx_gives_the_same_logits(trained, tmp_path, images, logits):
    """With the extra that is none of the development requirements, since it wants an older Orbax."""
    pytest.importorskip("jax2onnx", reason='pip install -e ".[onnx]"')
    onnxruntime = pytest.importorskip("onnxruntime")
    with jax.numpy_rank_promotion("allow"):  # the converter's own
        assert run(trained, tmp_path / "of_classifier", "--formats=onnx") == 0
    assert sorted(path.name for path in (tmp_path / "of_classifier").iterdir()) == ["manifest.json", "model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "of_classifier/model.onnx")
    for count in (1, 3, 8):
        (found,) = session.run(["logits"], {"images": images[:count]})
        np.testing.assert_allclose(found, logits[:count], rtol=1e-5, atol=1e-5)

    model, variables = random_segmentor()
    export_model(tmp_path / "segmentor", model=model, variables=variables)
    out = tmp_path / "of_segmentor"
    with jax.numpy_rank_promotion("allow"):
        assert run(tmp_path / "segmentor", out, "--formats=onnx", "--image_size=64", "--batch=2") == 0
    (found,) = onnxruntime.InferenceSession(out / "model.onnx").run(None, {"images": images[:2]})
    wanted = jax.jit(model.apply)(variables, normalize(images[:2]))["logits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_onnx_without_its_library_and_of_a_detector_is_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert run(trained, tmp_path / "out", "--formats=onnx") == 1
    assert 'not installed: pip install -e ".[onnx]"' in capsys.readouterr().err
    export_detector(tmp_path / "detector")
    assert run(tmp_path / "detector", tmp_path / "out", "--formats=onnx", "--image_size=64") == 1
    assert "ONNX is written of classifiers and segmentors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{trained}"], "Wanted: TRAINED OUT_DIR"),
        (["nothing", "{out}"], "Wanted an export"),
        (["{trained}", "{trained}"], "exists already and nothing is overwritten"),
        (
            ["{trained}", "{out}", "--formats=tflite"],
            "formats wants some of orbax, stablehlo, safetensors, onnx, got tflite",
        ),
        (["{trained}", "{out}", "--platforms=gpu"], "platforms wants some of cpu, tpu, cuda, rocm, got gpu"),
        (["{trained}", "{out}", "--batch=0"], "batch wants symbolic or a number of at least 1, got 0"),
        (["{trained}", "{out}", "--batch=few"], "--batch wants symbolic or a number of at least 1, got few"),
        (["{trained}", "{out}", "--image_size=64,96"], "A classifier looks at squares"),
        (["{trained}", "{out}/in/it", "--formats=onnx"], "ONNX"),
        (["{trained}", "{out}", "--formats=orbax", "--platforms=gpu"], "platforms wants some of"),
        (["{trained}", "{out}" + "x" * 300], "cannot be written: File name too long"),
        (["x" * 300, "{out}"], "Wanted an export"),
        (["{trained}", "{out}", "--image_size=big"], "--image_size wants SIDE or HEIGHT,WIDTH"),
        (
            ["{trained}", "{out}", "--image_size=16"],
            "image_size must be at least 32 and resize at least image_size, got 16 and 18",
        ),
        (["{trained}", "/dev/null/out", "--formats=safetensors"], "/dev/null/out cannot be written"),
    ],
)
def test_mistakes_end_with_a_sentence_and_nothing_is_written(
    arguments, sentence, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    out = tmp_path / "out"
    assert run(*[argument.format(trained=trained, out=out) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
