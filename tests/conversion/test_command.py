"""The command python -m dat_jax.conversion: both directions, and errors that end with one sentence and write nothing."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import dat_jax
from dat_jax import inference
from dat_jax.checkpoints.exports import export_model, load_export
from dat_jax.conversion import detectors, read_weights, to_official, write_safetensors
from dat_jax.conversion.command import convert_from_official, convert_to_official
from dat_jax.errors import UserError
from tests.helpers import pth_writer as pth
from tests.helpers.golden_files import Golden, relative_error
from tests.helpers.published_configs import make_config
from tests.helpers.random_variables import random_variables

ROOT = pathlib.Path(__file__).parents[2]
BUFFERS = ("relative_position_index", "attn_mask", "q_grid", "reference")


def run(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "dat_jax.conversion", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def write_yaml(path, settings):
    path.write_text(json.dumps({"MODEL": {"TYPE": "dat", "DAT": settings}, "DATA": {"IMG_SIZE": 384}}))  # JSON is YAML
    return str(path)


def nano(**settings):
    model = dat_jax.create_model("dat_pp_nano", num_classes=3, **settings)
    return model, random_variables(model, np.zeros((1, 48, 48, model.in_channels), np.float32))["params"]


@pytest.fixture(scope="module")
def nano_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    write_safetensors(path, to_official(*nano()))
    return path


def test_channels_and_statistics_round_trip(tmp_path):
    """The channels are those of the weights, and the statistics are in the metadata of the file."""
    model, params = nano(in_channels=12)
    options = {"image_dtype": "uint16", "mean": [7.0] * 12, "std": [5.0] * 12}
    export_model(tmp_path / "export", model=model, variables={"params": params}, options=options)
    convert_to_official(str(tmp_path / "export"), str(tmp_path / "w.safetensors"))
    convert_from_official(str(tmp_path / "w.safetensors"), str(tmp_path / "again"))
    classifier = inference.load(tmp_path / "again")
    assert str(classifier.image_format) == "12 channels of uint16"
    assert (classifier.options["mean"], classifier.options["std"]) == ((7.0,) * 12, (5.0,) * 12)
    jax.tree.map(np.testing.assert_array_equal, classifier.variables["params"], params)


@pytest.mark.parametrize(
    ("name", "suffix"), [pytest.param("pp_mini", "pth", marks=pytest.mark.slow), ("v1_mini", "safetensors")]
)
def test_published_weights_round_trip(name, suffix, tmp_path):
    golden = Golden(name, np.float32)
    weights, out = tmp_path / f"w.{suffix}", tmp_path / "export"
    (pth.write_pth if suffix == "pth" else write_safetensors)(weights, golden.state_dict)
    rows = convert_from_official(str(weights), str(out), yaml_file=write_yaml(tmp_path / "m.yaml", golden.config))
    assert rows["classes"] == "10"

    model, variables = dat_jax.load_pretrained(out)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, golden.images)
    assert relative_error(logits, golden.arrays["logits"]) < 1e-5

    back = tmp_path / "back.safetensors"
    assert convert_to_official(str(out), str(back))["checksum"] == rows["checksum"]
    expected = {key: array for key, array in golden.state_dict.items() if not key.endswith(BUFFERS)}
    restored = load_file(back)
    assert set(restored) == set(expected)
    for key, array in expected.items():
        assert restored[key].dtype == array.dtype
        np.testing.assert_array_equal(restored[key], array)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "export", "m.yaml", weights.name]


@pytest.mark.slow
def test_command_recognizes_the_model_and_prints_what_it_wrote(nano_file, tmp_path):
    result = run(nano_file, tmp_path / "export")
    assert (result.returncode, result.stderr) == (0, "")
    for word in ("dat_pp_nano", f"{sum(a.size for a in jax.tree.leaves(nano()[1])):,}", str(tmp_path / "export")):
        assert word in result.stdout
    checksum = json.loads((tmp_path / "export" / "model.json").read_text())["checksum"]
    assert re.fullmatch("[0-9a-f]{64}", checksum)
    assert checksum in result.stdout
    model, variables = dat_jax.load_pretrained(tmp_path / "export")
    expected_model, expected_params = nano()
    assert model == expected_model
    assert all(map(np.array_equal, jax.tree.leaves(variables["params"]), jax.tree.leaves(expected_params)))

    result = run(tmp_path / "export", tmp_path / "back.safetensors")
    assert (result.returncode, result.stderr) == (0, "")
    assert checksum in result.stdout
    back, expected = load_file(tmp_path / "back.safetensors"), load_file(nano_file)
    assert back.keys() == expected.keys()
    assert all(np.array_equal(back[name], array) for name, array in expected.items())


def test_class_names_and_inference_options_return(tmp_path):
    model, params = nano()
    names, options = ("cat", "äé", "line, with comma"), {"image_size": 48, "resize": 60}
    export_model(tmp_path / "export", model=model, variables={"params": params}, classes=names, options=options)
    file = tmp_path / "w.safetensors"
    convert_to_official(str(tmp_path / "export"), str(file))
    rows = convert_from_official(str(file), str(tmp_path / "again"), model="dat_pp_nano")
    assert "äé" in rows["class names"]
    _, description = load_export(tmp_path / "again")
    assert (tuple(description["classes"]), description["options"]) == (names, options)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("dat_jax.class_names", '["cat"]', "records 1 class names, expected 3"),
        ("dat_jax.class_names", "cat", "JSON list as dat_jax.class_names"),
        ("dat_jax.options", "[1]", "JSON object as dat_jax.options"),
    ],
)
def test_unusable_metadata_is_refused(key, text, message, tmp_path):
    write_safetensors(tmp_path / "w.safetensors", to_official(*nano()), metadata={key: text})
    with pytest.raises(UserError, match=message):
        convert_from_official(str(tmp_path / "w.safetensors"), str(tmp_path / "out"), model="dat_pp_nano")
    assert not (tmp_path / "out").exists()


def test_fixed_kernels_of_slide_attention_are_written(tmp_path):
    model, params = nano(stages=("E", "D", "X", "E"))
    export_model(tmp_path / "export", model=model, variables={"params": params})
    convert_to_official(str(tmp_path / "export"), str(tmp_path / "w.safetensors"))
    weights = read_weights(tmp_path / "w.safetensors")
    kernels = {name for name in weights if name.endswith("dep_conv.weight")}
    assert kernels == {"stages.0.attns.0.dep_conv.weight", "stages.3.attns.0.dep_conv.weight"}
    for name in kernels:
        assert weights[name].shape == weights[name.replace("dep_conv", "dep_conv1")].shape
        for channel, kernel in enumerate(weights[name][:, 0]):
            tap = channel % 9
            assert (kernel.sum(), kernel[tap // 3, tap % 3]) == (1, 1)


@pytest.mark.slow
def test_half_precision_weights_become_float32(tmp_path):
    model, params = nano()
    weights = {name: array.astype(np.float16) for name, array in to_official(model, params).items()}
    write_safetensors(tmp_path / "w.safetensors", weights)
    convert_from_official(str(tmp_path / "w.safetensors"), str(tmp_path / "export"), model="dat_pp_nano")
    _, variables = dat_jax.load_pretrained(tmp_path / "export")
    bias = variables["params"]["cls_head"]["bias"]
    np.testing.assert_array_equal(bias, weights["cls_head.bias"].astype(np.float32))
    assert bias.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpoints_of_any_precision_become_the_same_float32_numbers(dtype, legacy, tmp_path):
    model, params = nano()
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    weights = {f"module.{name}": array.astype(dtype) for name, array in to_official(model, params).items()}
    pth.write_checkpoint(tmp_path / "w.ckpt", {"state_dict": weights}, legacy=legacy)
    convert_from_official(str(tmp_path / "w.ckpt"), str(tmp_path / "export"), model="dat_pp_nano")
    _, variables = dat_jax.load_pretrained(tmp_path / "export")
    expected = {name.removeprefix("module."): array.astype(np.float32) for name, array in weights.items()}
    loaded = to_official(model, variables["params"])
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.slow
def test_raw_or_averaged_weights_are_chosen_and_reported(tmp_path):
    model, params = nano()
    raw = {f"module.{name}": array.astype(np.float32) for name, array in to_official(model, params).items()}
    averaged = {name: 0.5 * array for name, array in raw.items()}
    pth.write_checkpoint(tmp_path / "w.pth.tar", {"epoch": 3, "state_dict": raw, "state_dict_ema": averaged})
    for which, expected, source in (
        ("auto", raw, "state_dict (raw); weights=ema takes state_dict_ema"),
        ("raw", raw, "state_dict (raw); weights=ema takes state_dict_ema"),
        ("ema", averaged, "state_dict_ema (averaged); weights=raw takes state_dict"),
    ):
        rows = convert_from_official(
            str(tmp_path / "w.pth.tar"), str(tmp_path / which), model="dat_pp_nano", which=which
        )
        assert rows["taken from"] == source
        _, variables = dat_jax.load_pretrained(tmp_path / which)
        bias = np.asarray(variables["params"]["cls_head"]["bias"])
        np.testing.assert_array_equal(bias, expected["module.cls_head.bias"])
    result = run(tmp_path / "w.pth.tar", tmp_path / "out", "--model=dat_pp_nano", "--weights=ema")
    assert (result.returncode, result.stderr) == (0, "")
    assert source in result.stdout


def test_error_names_the_weights_without_the_common_prefix(tmp_path):
    model, params = nano()
    weights = {f"model.{name}": array for name, array in to_official(model, params).items()}
    pth.write_checkpoint(tmp_path / "w.ckpt", {"state_dict": weights | {"loss.weight": np.ones(3, np.float32)}})
    with pytest.raises(
        UserError, match=r"w\.ckpt \(names start with 'model\.' except loss\.weight\) has names or shapes of no"
    ):
        convert_from_official(str(tmp_path / "w.ckpt"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("retinanet", marks=pytest.mark.slow),
        "mask_rcnn",
        pytest.param("cascade_mask_rcnn", marks=pytest.mark.slow),
    ],
)
def test_detector_round_trip(name, tmp_path):
    """Kind, number of classes and widths come from the weights. Counters of BatchNorm are ignored."""
    width = {} if name == "retinanet" else {"width": 16}
    detector = dat_jax.create_detector(name, backbone="dat_pp_nano", num_classes=3, features=8, **width)
    rng = np.random.default_rng(0)
    shapes = detectors.detector_shapes(detector)
    weights = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    counters = {f"{key[:-11]}num_batches_tracked": np.array(7) for key in shapes if key.endswith("running_var")}
    assert bool(counters) == (name == "cascade_mask_rcnn")
    pth.write_pth(tmp_path / "w.pth", weights | counters)
    rows = convert_from_official(str(tmp_path / "w.pth"), str(tmp_path / "export"))
    assert (rows["model"], rows["classes"]) == (f"{name} on dat_pp_nano", "3")
    model, variables = dat_jax.load_pretrained(tmp_path / "export")
    assert model == detector
    assert set(variables) == ({"params", "batch_stats"} if counters else {"params"})
    trained = sum(array.size for key, array in weights.items() if not key.endswith(("running_mean", "running_var")))
    assert rows["parameters"] == f"{trained:,}"

    back = convert_to_official(str(tmp_path / "export"), str(tmp_path / "back.safetensors"))
    assert back["checksum"] == rows["checksum"]
    restored = load_file(tmp_path / "back.safetensors")
    assert restored.keys() == weights.keys() | counters.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(restored[key], array, err_msg=key)


def test_weights_of_an_unknown_detector_are_refused(tmp_path):
    detector = dat_jax.create_detector("mask_rcnn", backbone="dat_pp_nano", num_classes=3, features=8, width=16)
    shapes = detectors.detector_shapes(detector)
    weights = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    weights["roi_head.bbox_head.fc_reg.weight"] = np.zeros((4, 16), np.float32)  # one box for all classes
    write_safetensors(tmp_path / "w.safetensors", weights)
    files = str(tmp_path / "w.safetensors"), str(tmp_path / "out")
    with pytest.raises(UserError, match="no known detector: expected RetinaNet, Mask R-CNN or Cascade Mask R-CNN on a"):
        convert_from_official(*files)
    message = (
        r"mask_rcnn on dat_pp_nano: .* mis-shaped: roi_head.bbox_head.fc_reg.weight expected \(12, 16\), got \(4, 16\)"
    )
    with pytest.raises(UserError, match=message):
        convert_from_official(*files, model="dat_pp_nano")
    with pytest.raises(
        UserError, match=r"weights of a detector: expected a Python configuration \(.py\) as --yaml, got some"
    ):
        convert_from_official(*files, yaml_file="some.yaml")
    assert not (tmp_path / "out").exists()


def test_python_configuration_sets_detector_and_inference_options(tmp_path):
    """The file sets what the weights do not determine: anchors, box coders and thresholds."""
    config = make_config("retinanet_tiny")
    config["backbone"] |= {"dim_stem": 32, "dims": [32, 64, 128, 192], "heads": [1, 2, 4, 6], "groups": [1, 1, 2, 3]}
    config["backbone"] |= {"stage_spec": [["N"], ["N"], ["N"], ["N"]], "depths": [1, 1, 1, 1]}
    config["neck"] |= {"in_channels": [32, 64, 128, 192], "out_channels": 8}
    config["bbox_head"] |= {"in_channels": 8, "feat_channels": 8, "num_classes": 3, "stacked_convs": 1}
    config["bbox_head"]["bbox_coder"]["target_stds"] = [0.5, 0.5, 1.0, 1.0]
    config["test_cfg"]["score_thr"] = 0.2
    (tmp_path / "c.py").write_text(f"model = {config!r}\n")
    detector = detectors.detector_from_official(config)
    rng = np.random.default_rng(0)
    shapes = detectors.detector_shapes(detector)
    weights = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    write_safetensors(tmp_path / "w.safetensors", weights)
    files = str(tmp_path / "w.safetensors"), str(tmp_path / "export")
    rows = convert_from_official(*files, yaml_file=str(tmp_path / "c.py"))
    assert rows["model"] == str(tmp_path / "c.py")
    model, _ = dat_jax.load_pretrained(tmp_path / "export")
    assert model == detector
    assert (model.depth, model.anchor_stds) == (1, (0.5, 0.5, 1.0, 1.0))
    assert inference.load(tmp_path / "export").options["score_threshold"] == 0.2

    (tmp_path / "s.py").write_text(f"model = {make_config('semfpn_tiny')!r}\n")
    with pytest.raises(
        UserError, match="s.py does not describe a supported detector: type: expected one of 'RetinaNet'"
    ):
        convert_from_official(files[0], str(tmp_path / "out"), yaml_file=str(tmp_path / "s.py"))
    (tmp_path / "d.py").write_text(f"model = {config | {'surprise': 1}!r}\n")
    with pytest.raises(UserError, match=r"d.py does not describe a supported detector: Unknown keys .*\['surprise'\]"):
        convert_from_official(files[0], str(tmp_path / "out"), yaml_file=str(tmp_path / "d.py"))


def test_yaml_file_sets_the_image_size(nano_file, tmp_path):
    settings = {"img_size": 48, "num_classes": 3, "dim_stem": 32, "dims": [32, 64, 128, 192], "depths": [2, 2, 1, 1]}
    settings |= {"stage_spec": [["N", "D"], ["N", "D"], ["D"], ["D"]], "heads": [1, 2, 4, 6], "groups": [1, 1, 2, 3]}
    settings |= {
        "use_pes": [True] * 4,
        "strides": [2, 1, 1, 1],
        "offset_range_factor": [-1] * 4,
        "ksizes": [5, 3, 3, 3],
    }
    settings |= {"nat_ksizes": [7, 5, 3, 3], "use_lpus": [True] * 4, "use_dwc_mlps": [True] * 4}
    config = {
        "MODEL": {"DAT": {**settings, "use_conv_patches": True}},
        "DATA": {"IMG_SIZE": 64},
        "TEST": {"CROP": False},
    }
    (tmp_path / "m.yaml").write_text(json.dumps(config))
    convert_from_official(str(nano_file), str(tmp_path / "export"), yaml_file=str(tmp_path / "m.yaml"))
    options = inference.load(tmp_path / "export").options
    assert (options["image_size"], options["resize"]) == (64, 64)


GOOD_YAML = {
    "heads": [1, 2, 4, 6],
    "stage_spec": [["N"], ["N"], ["N"], ["N"]],
    "depths": [1, 1, 1, 1],
    "dims": [32, 64, 128, 192],
}


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (
            "{nano}",
            dict(model="dat_pp_tiny"),
            r"dat_pp_tiny: The weights do not fit this model \(\d+ unknown, .*\)\. \d+ unknown: stages",
        ),
        ("{nano}", dict(model="dat_tinny"), "Unknown model 'dat_tinny', did you mean 'dat_tiny'"),
        (
            "{nano}",
            dict(yaml_file="{tmp}/keys.yaml"),
            r"Unknown keys in the published configuration: \['MODEL.DAT.img_sise'\]",
        ),
        ("{nano}", dict(yaml_file="{tmp}/other.yaml"), "other.yaml: The weights do not fit this model"),
        ("{nano}", dict(yaml_file="{tmp}/short.yaml"), "short.yaml does not describe a model"),
        ("{nano}", dict(yaml_file="{tmp}/empty.yaml"), r"empty.yaml: expected a mapping MODEL\.DAT"),
        ("{nano}", dict(yaml_file="{tmp}/broken.yaml"), "broken.yaml cannot be read: while parsing"),
        ("{nano}", dict(yaml_file="{tmp}/none.yaml"), "none.yaml cannot be read: No such file"),
        ("{nano}", dict(yaml_file="{tmp}/c.py"), "weights of a classifier: expected a YAML file as --yaml, got .*c.py"),
        (
            "{tmp}/other.safetensors",
            {},
            "no known model; set --yaml=FILE.* or set --model=NAME, one of dat_pp_tiny, .*nano",
        ),
        ("{tmp}/cut.safetensors", {}, "cut.safetensors is damaged"),
        ("{tmp}/none.pth", {}, "There is no file"),
    ],
)
def test_invalid_inputs_are_refused_and_nothing_is_written(weights, options, message, nano_file, tmp_path):
    write_yaml(tmp_path / "keys.yaml", {**GOOD_YAML, "img_sise": 3})
    write_yaml(tmp_path / "other.yaml", GOOD_YAML)
    write_yaml(tmp_path / "short.yaml", {**GOOD_YAML, "use_pes": [True]})
    (tmp_path / "empty.yaml").write_text("MODEL:\n  TYPE: dat\n")
    (tmp_path / "broken.yaml").write_text("MODEL: [dat\n")
    write_safetensors(tmp_path / "other.safetensors", {"cls_norm.norm.weight": np.ones(192, np.float32)})
    (tmp_path / "cut.safetensors").write_bytes(nano_file.read_bytes()[:-1])
    before = sorted(tmp_path.iterdir())
    options = {key: value.format(tmp=tmp_path) for key, value in options.items()}
    with pytest.raises(UserError, match=message) as info:
        convert_from_official(weights.format(nano=nano_file, tmp=tmp_path), str(tmp_path / "out"), **options)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1000
    assert sorted(tmp_path.iterdir()) == before


def test_existing_paths_are_not_overwritten(nano_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="out exists"):
        convert_from_official(str(nano_file), str(out))
    assert not list(out.iterdir())
    convert_from_official(str(nano_file), str(tmp_path / "export"))
    (tmp_path / "w.safetensors").write_text("precious")
    with pytest.raises(UserError, match="w.safetensors exists"):
        convert_to_official(str(tmp_path / "export"), str(tmp_path / "w.safetensors"))
    assert (tmp_path / "w.safetensors").read_text() == "precious"
    with pytest.raises(UserError, match=r"end in \.safetensors if WEIGHTS is a folder, got .*w\.pth"):
        convert_to_official(str(tmp_path / "export"), str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match="OUT must be the name of a new folder if WEIGHTS is a file"):
        convert_from_official(str(nano_file), str(tmp_path / "new.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"WEIGHTS OUT \[--model=NAME \| --yaml=FILE\] .*\[--weights=auto\|ema\|raw\], got nothing\."),
        (["a", "b", "c"], "WEIGHTS OUT .*, got a b c"),
        (["a.pth", "b", "--model=x", "--yaml=y"], "WEIGHTS OUT .*, got a.pth b"),
        (["a.pth", "b", "--modle=x"], "Unknown command line flag 'modle'"),
        (
            ["{tmp}", "{tmp}/b.safetensors", "--model=dat_tiny"],
            "--model, --yaml and --weights are for a file of weights",
        ),
        (
            ["{tmp}", "{tmp}/b.safetensors", "--weights=ema"],
            "--model, --yaml and --weights are for a file of weights",
        ),
        (["a.pth", "b", "--weights=best"], "Flags: flag --weights=best: value should be one of <auto|ema|raw>"),
        (["{tmp}", "{tmp}/b.safetensors"], "model.json"),
        (["{tmp}/evil.pth", "{tmp}/out"], r"evil.pth would run code when PyTorch loads it \(it names os.system\)"),
        (["{tmp}/damaged", "{tmp}/b.safetensors"], "damaged.*: cls_head/kernel cannot be read"),
    ],
)
def test_command_line_errors_are_one_sentence(arguments, message, tmp_path):
    pth.write_archive(tmp_path / "evil.pth", pth.call("os", "system", pth.text(f"touch {tmp_path / 'ran'}")), {})
    if "{tmp}/damaged" in arguments:
        model, params = nano()
        export_model(tmp_path / "damaged", model=model, variables={"params": params})
        chunk = tmp_path / "damaged" / "params" / "cls_head.kernel" / "0.0"
        chunk.write_bytes(chunk.read_bytes()[:-20])
    before = sorted(tmp_path.iterdir())
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == 1
    assert re.search(message, result.stderr)
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before
