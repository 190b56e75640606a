"""Selection of the weights in a checkpoint, and their names without prefixes."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from dat_jax.conversion import read_checkpoint, write_safetensors
from dat_jax.conversion.selection import describe_partial_prefix, strip_prefixes
from dat_jax.errors import UserError
from tests.helpers import pth_writer as pth

RAW = {
    "patch_proj.0.weight": np.arange(6).reshape(3, 2),
    "stages.0.attns.0.rpb": np.array(7),
    "cls_head.bias": np.arange(3),
}
AVERAGED = {name: np.asarray(10 + array) for name, array in RAW.items()}

DTYPES = [np.dtype(name) for name in ("float16", "float32", "float64")] + [np.dtype(ml_dtypes.bfloat16)]
PREFIXES = [
    *("", "module.", "_orig_mod.", "backbone.", "encoder.", "student.", "model.", "net."),
    *("module._orig_mod.", "_orig_mod.module.", "student.backbone.", "module.student.backbone.", "model.encoder."),
    *("_orig_mod.module.backbone.", "backbone._orig_mod.", "module.module."),
]
# Name -> (raw, averaged) -> content of a checkpoint, and the place of the raw and averaged weights (None: it has none).
WRAPPERS = {
    "bare": (lambda raw, _: raw, "top level", None),
    "model": (lambda raw, _: {"model": raw, "epoch": 3, "optimizer": {"state": {}}}, "model", None),
    "state_dict": (lambda raw, _: {"state_dict": raw}, "state_dict", None),
    "model_state": (lambda raw, _: {"model_state": raw}, "model_state", None),
    "model_state_dict": (lambda raw, _: {"model_state_dict": raw}, "model_state_dict", None),
    "net": (lambda raw, _: {"net": raw, "acc": 95}, "net", None),
    "deepspeed": (lambda raw, _: {"module": raw, "ds_version": "0.14"}, "module", None),
    "nested": (lambda raw, _: {"model": {"state_dict": {"module": raw}}}, "model.state_dict.module", None),
    "model_ema": (lambda raw, ema: {"model_ema": ema, "model": raw}, "model", "model_ema"),
    "timm": (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, "state_dict", "state_dict_ema"),
    "ema of an object": (lambda raw, ema: {"net": raw, "ema": {"module": ema, "decay": 1}}, "net", "ema.module"),
    "ema state_dict": (lambda raw, ema: {"model": raw, "ema": {"state_dict": ema}}, "model", "ema.state_dict"),
    "ema_state_dict": (lambda raw, ema: {"model": raw, "ema_state_dict": ema}, "model", "ema_state_dict"),
    "only ema": (lambda _, ema: {"model_ema": ema, "rng_state": np.zeros(3, np.uint8)}, None, "model_ema"),
    "dino": (lambda raw, ema: {"student": raw, "teacher": ema}, "student", "teacher"),
    # The next two swap them: averaged weights are in the usual place.
    "mmengine": (
        lambda raw, ema: {
            "state_dict": ema,
            "ema_state_dict": {"steps": np.array(3), **{f"module.{name}": array for name, array in raw.items()}},
            "message_hub": {"log_scalars": {}},
        },
        "ema_state_dict",
        "state_dict",
    ),
    "lightning": (
        lambda raw, ema: {
            "state_dict": ema,
            "current_model_state": raw,
            "averaging_state": {"n_averaged": np.array(3)},
        },
        "current_model_state",
        "state_dict",
    ),
}
FILES = ["zip", "legacy", "safetensors"]


def write(path, content, kind="zip"):
    if kind == "safetensors":
        write_safetensors(path, content)
    else:
        pth.write_checkpoint(path, content, legacy=kind == "legacy")
    return path


def convert(arrays, prefix="", dtype=np.float32):
    return {f"{prefix}{name}": array.astype(dtype) for name, array in arrays.items()}


def assert_same(weights, expected, dtype=np.float32):
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        assert (weights[name].dtype, weights[name].shape) == (dtype, array.shape)
        assert weights[name].tobytes() == array.astype(dtype).tobytes()


def assert_refused(path, message, **options):
    with pytest.raises(UserError, match=message) as info:
        read_checkpoint(path, **options)
    assert "\n" not in str(info.value)
    assert str(info.value).endswith(".")
    assert len(str(info.value)) < 800


@pytest.mark.parametrize(
    ("wrapper", "kind"), [*itertools.product(WRAPPERS, ["zip", "legacy"]), ("bare", "safetensors")]
)
def test_weights_in_every_wrapper_with_every_prefix_and_dtype(wrapper, kind, tmp_path):
    """17 wrappers x 16 prefixes x 4 dtypes x 3 kinds of files x raw, averaged, auto; .safetensors are always bare."""
    wrap, raw_place, ema_place = WRAPPERS[wrapper]
    for number, (prefix, dtype) in enumerate(itertools.product(PREFIXES, DTYPES)):
        content = wrap(convert(RAW, prefix, dtype), convert(AVERAGED, prefix, dtype))
        path = write(tmp_path / f"{number}.any", content, kind)
        for weights, place, expected, others in (
            ("raw", raw_place, RAW, "averaged"),
            ("ema", ema_place, AVERAGED, "raw"),
        ):
            if place is None:
                assert_refused(path, f"has no .* weights, only {others}.* ones .*; its keys are ", weights=weights)
            else:
                checkpoint = read_checkpoint(path, weights=weights)
                assert_same(checkpoint.weights, expected, dtype)
                assert checkpoint.source.split(" (")[0] == place
        swapped = wrapper in ("mmengine", "lightning", "only ema")
        assert_same(read_checkpoint(path).weights, AVERAGED if swapped else RAW, dtype)


@pytest.mark.parametrize(
    ("wrapper", "weights", "source"),
    [
        ("model", "auto", "model"),
        ("only ema", "auto", "model_ema (averaged)"),
        ("timm", "auto", "state_dict (raw); weights=ema takes state_dict_ema"),
        ("timm", "ema", "state_dict_ema (averaged); weights=raw takes state_dict"),
        ("mmengine", "auto", "state_dict (averaged); weights=raw takes ema_state_dict"),
        ("dino", "auto", "student (raw); weights=ema takes teacher"),
    ],
)
def test_source_names_the_selected_weights_and_the_others(wrapper, weights, source, tmp_path):
    content = WRAPPERS[wrapper][0](convert(RAW), convert(AVERAGED))
    assert read_checkpoint(write(tmp_path / "w", content), weights=weights).source == source


def test_error_for_missing_kind_of_weights_lists_the_keys(tmp_path):
    path = write(tmp_path / "w.pth", {"epoch": 3, "model": convert(RAW)})
    message = r"w.pth has no averaged \(EMA\) weights, only raw ones \(model\); its keys are epoch, model\.$"
    assert_refused(path, message, weights="ema")
    path = write(tmp_path / "v.pth", {"model_ema": convert(AVERAGED)})
    message = r"has no raw weights, only averaged \(EMA\) ones \(model_ema\); its keys are model_ema\.$"
    assert_refused(path, message, weights="raw")
    assert_refused(path, r"weights must be one of auto, ema, raw, got best\.", weights="best")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("outer", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize(("raw", "averaged"), [("student.", "teacher."), ("model.", "ema_model."), ("", "ema.module.")])
def test_raw_and_averaged_weights_in_one_state_dict_are_separated_by_prefix(raw, averaged, outer, kind, tmp_path):
    content = convert(RAW, outer + raw) | convert(AVERAGED, outer + averaged)
    others = {} if kind == "safetensors" else {"epoch": 3, "args": pth.call("argparse", "Namespace")}
    path = write(tmp_path / "w", content | others, kind)
    assert_same(read_checkpoint(path).weights, RAW)
    assert_same(read_checkpoint(path, weights="raw").weights, RAW)
    assert_same(read_checkpoint(path, weights="ema").weights, AVERAGED)
    assert read_checkpoint(path).source == f"top level (raw); weights=ema takes top level, {averaged.split('.')[0]}.*"


@pytest.mark.parametrize("prefix", ["teacher.", "module.teacher.", "model_ema.module."])
def test_only_averaged_weights_in_one_state_dict(prefix, tmp_path):
    path = write(tmp_path / "w", {"state_dict": convert(AVERAGED, prefix)})
    assert_same(read_checkpoint(path).weights, AVERAGED)
    assert_same(read_checkpoint(path, weights="ema").weights, AVERAGED)
    assert_refused(path, "has no raw weights", weights="raw")


def test_averaged_weights_of_mmcv_are_not_guessed(tmp_path):
    """The set of weights that MMCV's EMAHook leaves under the usual names depends on the runner."""
    buffers = {f"ema_{name.replace('.', '_')}": array for name, array in convert(RAW).items()}
    statistics = {"norm.running_mean": np.ones(2, np.float32)}
    path = write(tmp_path / "w", {"meta": {}, "state_dict": convert(AVERAGED) | buffers | statistics})
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.weights, AVERAGED | statistics)
    assert checkpoint.source == "state_dict, names without ema_ (averaged if MMCV's EpochBasedRunner saved them)"
    for weights in ("ema", "raw"):
        assert_refused(path, "with IterBasedRunner those under ema_", weights=weights)


def test_prefixes_of_very_long_names_are_not_removed(tmp_path):
    """Removing prefixes one by one would take time quadratic in the length of the name."""
    name = "module." * 100_000 + "w"
    assert list(read_checkpoint(write(tmp_path / "w", {name: np.ones(2, np.float32)})).weights) == [name]


@pytest.mark.parametrize(
    "head", ["decode_head.conv_seg.bias", "neck.lateral_convs.0.conv.bias", "bbox_head.retina_cls.bias"]
)
@pytest.mark.parametrize("outer", ["", "module.", "_orig_mod.", "model._orig_mod."])
def test_segmentors_and_detectors_keep_their_backbone(head, outer, tmp_path):
    names = [*(f"backbone.{name}" for name in RAW), head]
    content = {f"{outer}{name}": np.ones(2, np.float32) for name in names}
    assert list(read_checkpoint(write(tmp_path / "w", {"state_dict": content})).weights) == names


def test_wrappers_around_parts_of_a_model_are_removed(tmp_path):
    content = {"backbone._orig_mod.a": np.ones(2), "decode_head._fsdp_wrapped_module.b": np.ones(2)}
    assert set(read_checkpoint(write(tmp_path / "w", content)).weights) == {"backbone.a", "decode_head.b"}


def test_prefix_that_some_names_lack_is_kept_and_no_name_is_lost():
    for names in (["module.a", "module.b", "a"], ["model.a", "criterion.weight"], ["module.", "module.a"]):
        assert list(strip_prefixes(dict.fromkeys(names, 0))) == names
    collision = ["_orig_mod.a", "a"]
    assert list(strip_prefixes(dict.fromkeys(collision, 0))) == collision
    names = ["model.a", "model.b", "model.c", "loss.w"]
    assert describe_partial_prefix(names) == "names start with 'model.' except loss.w"
    assert describe_partial_prefix([*names, "model.d", "x"]) == "names start with 'model.' except loss.w and 1 more"
    assert (
        describe_partial_prefix(["model.a"]) == describe_partial_prefix(["a", "b"]) == describe_partial_prefix([]) == ""
    )


TENSOR = pth.tensor("float32", (6,), key="0", count=6)
MODULE = pth.name("timm.models", "Dat") + b")\x81" + pth.mapping({"_modules": b"}"}) + b"b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MODULE, "holds an object of timm.models.Dat, not a state dict; if you trust it, load it with PyTorch"),
        (pth.mapping({"ema": MODULE}), r"an object of timm.models.Dat under ema, not a state dict"),
        (
            pth.mapping({"w": pth.call("torch._utils", "_rebuild_qtensor", b"N")}),
            r"w needs torch\._utils\._rebuild_qtensor",
        ),
        (
            pth.mapping({"model": pth.mapping({"w": pth.call("torch._utils", "_rebuild_sparse_tensor")})}),
            "w needs torch",
        ),
        (
            pth.mapping({"w": pth.call("quant", "Packed", TENSOR), "v": TENSOR}),
            "w needs quant.Packed; if you trust the file, load it with PyTorch",
        ),
        (
            pth.mapping({"a": pth.integer(3), "b": pth.call("argparse", "Namespace")}),
            r"are a, b \(argparse.Namespace\)\.$",
        ),
        (pth.mapping({"a\n\x1b[31m" + "x" * 999: pth.integer(3)}), r"keys are a\\n\\x1b\[31mx+\.\.\.\.$"),
        (b"N", "holds no weights by name: expected a mapping, got a value of the type NoneType"),
        (b"]", "got a value of the type list"),
        (TENSOR, "got a tensor without a name"),
    ],
)
def test_files_without_weights_are_refused_with_their_content(content, message, tmp_path):
    pth.write_archive(tmp_path / "w.pth", content, {"0": bytes(24)})
    assert_refused(tmp_path / "w.pth", message)


def test_mapping_that_contains_itself(tmp_path):
    items = pth.text("model") + b"h\x00" + pth.text("state_dict") + b"h\x00" + pth.text("ema") + b"h\x00"
    pth.write_archive(tmp_path / "w.pth", b"}q\x00(" + items + b"u", {})
    assert_refused(tmp_path / "w.pth", "holds no weights")
