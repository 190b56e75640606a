"""Reading of weights files: files written by PyTorch, damaged ones, and malicious ones, which run no code."""

import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from dat_jax.conversion import read_weights, write_safetensors
from dat_jax.errors import UserError
from tests.helpers import pth_writer as pth
from tests.helpers.golden_files import DIRECTORY, Golden

DATA = np.arange(6, dtype=np.float32).tobytes()


def write(path, content: bytes, storages=None, **options):
    pth.write_archive(path, content, {"0": DATA} if storages is None else storages, **options)
    return path


def view(**changes) -> bytes:
    arguments = dict(dtype="float32", size=(2, 3), key="0", count=6)
    return pth.mapping({"w": pth.tensor(**{**arguments, **changes})})


def assert_refused(path, message):
    """The file is refused with one sentence."""
    with pytest.raises(UserError, match=message) as info:
        read_weights(path)
    assert "\n" not in str(info.value)
    assert str(info.value).endswith(".")


def test_file_written_by_pytorch_is_read_exactly():
    weights = read_weights(DIRECTORY / "torch_mini.pth")
    with np.load(DIRECTORY / "torch_mini.npz") as file:
        expected = {name: file[name] for name in file.files}
    expected["bfloat16"] = expected["bfloat16"].astype(ml_dtypes.bfloat16)
    assert set(weights) == set(expected)
    for name, array in expected.items():
        assert (weights[name].dtype, weights[name].shape) == (array.dtype, array.shape)
        assert weights[name].tobytes() == array.tobytes()
    weights["shared"][:] = 0  # arrays that share a storage in the file do not share memory
    np.testing.assert_array_equal(weights["shared_column"], expected["shared_column"])


@pytest.mark.parametrize("name", ["pp_mini", "v1_mini"])
def test_state_dict_round_trip_through_pth_and_safetensors(name, tmp_path):
    expected = Golden(name, np.float32).state_dict
    pth.write_pth(tmp_path / "w.pth", expected)
    write_safetensors(tmp_path / "w.safetensors", expected)
    for suffix in ("pth", "safetensors"):
        weights = read_weights(tmp_path / f"w.{suffix}")
        assert set(weights) == set(expected)
        for key, array in expected.items():
            assert weights[key].dtype == array.dtype
            np.testing.assert_array_equal(weights[key], array)


def test_safetensors_hold_any_layout_and_bfloat16(tmp_path):
    arrays = {
        "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "big_endian": np.arange(3, dtype=">f4"),
        "scalar": np.float64(0.5) * np.ones(()),
        "empty": np.zeros((0, 3), np.int64),
    }
    write_safetensors(tmp_path / "new" / "w.safetensors", arrays)
    weights = read_weights(tmp_path / "new" / "w.safetensors")
    assert set(weights) == set(arrays)
    for name, array in arrays.items():
        assert weights[name].dtype == array.dtype.newbyteorder("=")
        assert weights[name].shape == array.shape
        np.testing.assert_array_equal(weights[name], array)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_text("precious")
    with pytest.raises(UserError, match="w.safetensors exists"):
        write_safetensors(path, {"a": np.ones(2)})
    assert path.read_text() == "precious"
    with pytest.raises(UserError, match=r"x.safetensors cannot be written: Not a directory\."):
        write_safetensors(path / "x.safetensors", {"a": np.ones(2)})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("model", "state_dict", "model_ema"), "model"),
        (("model_ema", "state_dict"), "state_dict"),
        (("model_ema", "optimizer"), "model_ema"),
    ],
)
def test_key_of_the_weights(keys, expected, tmp_path):
    content = pth.mapping({key: pth.mapping({key: pth.tensor("float32", (6,), key="0", count=6)}) for key in keys})
    assert set(read_weights(write(tmp_path / "w.pth", content))) == {expected}


def test_bare_mapping_skips_other_values_and_removes_module_prefix(tmp_path):
    items = {f"module.{name}": pth.tensor("float32", (6,), key="0", count=6) for name in "ab"}
    weights = read_weights(write(tmp_path / "w.pt", pth.mapping({**items, "epoch": pth.integer(3)})))
    assert set(weights) == {"a", "b"}
    items["c"] = items["module.a"]
    assert set(read_weights(write(tmp_path / "v.pt", pth.mapping(items)))) == {"module.a", "module.b", "c"}


def test_configuration_in_a_training_checkpoint_is_skipped(tmp_path):
    state = pth.mapping({"__deprecated_keys__": pth.name("__builtin__", "set") + b"]\x85R"})
    config = pth.name("yacs.config", "CfgNode") + b")\x81(" + pth.text("MODEL") + pth.text("dat") + b"u" + state + b"b"
    content = pth.mapping({"config": config, "model": view()})
    assert set(read_weights(write(tmp_path / "w.pth", content))) == {"w"}


def test_big_endian_storages(tmp_path):
    data = np.arange(6, dtype=">f4").tobytes()
    weights = read_weights(write(tmp_path / "w.pth", view(), {"0": data}, order="big"))
    np.testing.assert_array_equal(weights["w"], np.arange(6).reshape(2, 3))
    assert weights["w"].dtype == np.float32


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    target, path = tmp_path / "ran", tmp_path / "w.pth"
    opcodes = pickle.dumps({"model": Evil(target)}, protocol=2)[2:-1]
    message = (
        rf"would run code when PyTorch loads it \(it names {os.system.__module__}\.system\) and is refused; get the"
    )
    assert_refused(write(path, opcodes), message)
    assert_refused(write(path, pth.call("os", "system", pth.text(f"touch {target}"))), r"names os\.system")
    assert_refused(write(path, pth.call("builtins", "eval", pth.text("1"))), r"names builtins\.eval")
    assert_refused(write(path, pth.call("torch.hub", "load", pth.text("x"))), r"names torch\.hub\.load")
    assert not target.exists()


def test_pickle_that_sets_an_attribute_has_no_effect_on_other_files(tmp_path):
    """Python's unpickler would set attributes of the class CfgNode here."""
    state = b"N" + pth.mapping({"update": pth.integer(1), "__init__": pth.integer(1)}) + b"\x86"
    content = pth.mapping({"a": pth.name("yacs.config", "CfgNode") + state + b"b", "model": view()})
    assert set(read_weights(write(tmp_path / "evil.pth", content))) == {"w"}
    test_configuration_in_a_training_checkpoint_is_skipped(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(offset=1), "w reaches beyond the 6 numbers of its storage"),
        (dict(stride=(3, 2)), "w reaches beyond the 6 numbers"),
        (dict(size=(3, 7), stride=(0, 1)), "w reaches beyond the 6 numbers"),
        (dict(offset=-1), "w has no valid shape"),
        (dict(stride=(-3, 1)), "w has no valid shape"),
        (dict(stride=(1,)), "w has no valid shape"),
        (dict(count=7), "w: expected 28 bytes in archive/data/0, got 24"),
        (dict(count=-6), "its pickle is malformed at byte"),
        (dict(key="1"), r"it lacks archive/data/1"),
    ],
)
def test_views_beyond_their_storage_are_refused(changes, message, tmp_path):
    assert_refused(write(tmp_path / "w.pth", view(**changes)), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pth.integer(3), "expected a mapping, got a value of the type int"),
        (pth.mapping({"epoch": pth.integer(3), "model": pth.mapping({})}), "its keys are epoch, model"),
        (b"", "is damaged"),
        (b"garbage", "is damaged"),
        (
            pth.call("torch._utils", "_rebuild_tensor_v2", pth.integer(3)),
            "holds an object of torch._utils._rebuild_tensor_v2, not a state dict",
        ),
        (pth.mapping({"w": pth.call("torch", "FloatStorage")}), r"its keys are w \(torch\.FloatStorage\)"),
    ],
)
def test_archives_without_weights_are_refused(content, message, tmp_path):
    assert_refused(write(tmp_path / "w.pth", content), message)


@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files_are_refused(suffix, part, tmp_path):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    arrays = {"a": np.arange(1000, dtype=np.float32), "b": np.ones((3, 2))}
    (pth.write_pth if suffix == "pth" else write_safetensors)(whole, arrays)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(part * len(data))])
    assert_refused(cut, "is damaged|is empty; download it again")


def test_changed_bytes_are_detected(tmp_path):
    path = write(tmp_path / "w.pth", view())
    data = path.read_bytes()
    assert data.count(DATA) == 1
    path.write_bytes(data.replace(DATA, DATA[:-1] + b"\x01"))
    assert_refused(path, "is damaged: Bad CRC-32")


def test_other_files_are_refused(tmp_path):
    assert_refused(tmp_path / "none.pth", r"There is no file .*none\.pth\.")
    assert_refused(tmp_path, "is a folder; expected a file of weights")
    write_safetensors(tmp_path / "none.safetensors", {})
    assert_refused(tmp_path / "none.safetensors", "holds no weights")


@pytest.mark.parametrize("header", [{"__metadata__": ["a"]}, {"w": [1]}, {"__metadata__": None, "w": None}])
def test_safetensors_headers_without_mappings_are_refused(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert_refused(tmp_path / "w.safetensors", "is damaged: ")


@pytest.mark.parametrize("name", ["n" * 5000, "nul\0.pth"])
def test_impossible_paths_are_refused(name, tmp_path):
    with pytest.raises(UserError):
        read_weights(tmp_path / name)
