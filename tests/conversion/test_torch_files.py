"""Reader of torch.save files: recorded files of PyTorch and training programs, the old format, and tensor layouts."""

import io
import pathlib
import pickle
import random
import struct
import tarfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dat_jax.conversion import read_checkpoint, read_weights
from dat_jax.errors import UserError
from tests.helpers import pth_writer as pth
from tests.helpers.golden_files import DIRECTORY

NUMBERS = np.arange(6, dtype=np.float32)
DATA = NUMBERS.tobytes()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Files that PyTorch and other programs wrote, see tests/golden/make_torch_files.py."""
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(DIRECTORY / "torch_files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def names_of_recorded_files():
    with tarfile.open(DIRECTORY / "torch_files.tar.xz") as archive:
        names = archive.getnames()
    return [name for name in names if f"{name}.npz" in names], [name for name in names if "refused/" in name]


READ, REFUSED = names_of_recorded_files()


def read_expected(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(f"{path}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return {
        name.removesuffix(":bfloat16"): array.astype(ml_dtypes.bfloat16) if name.endswith(":bfloat16") else array
        for name, array in arrays.items()
    }


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        assert (weights[name].dtype, weights[name].shape) == (array.dtype, array.shape), name
        assert weights[name].tobytes() == array.tobytes(), name
        assert weights[name].flags.c_contiguous, name


def assert_refused(path, message):
    with pytest.raises(UserError, match=message) as info:
        read_weights(path)
    assert "\n" not in str(info.value)
    assert str(info.value).endswith(".")


@pytest.mark.parametrize("name", READ)
def test_recorded_files_are_read_exactly(name, recorded):
    expected = read_expected(recorded / name)
    choices = {key.split("/")[0] for key in expected if key.startswith(("raw/", "ema/"))}
    for choice in choices:
        part = {key[4:]: array for key, array in expected.items() if key.startswith(choice)}
        if name.startswith("mmengine"):  # a whole segmentor
            assert {key.split(".")[0] for key in part} == {"backbone", "decode_head"}
        assert_same(read_weights(recorded / name, weights=choice), part)
    if not choices:
        assert_same(read_weights(recorded / name), expected)
        assert_same(read_weights(recorded / name, weights="raw"), expected)


def test_recorded_files_are_complete():
    assert len(READ) == 17
    assert len(REFUSED) == 11
    assert {pathlib.Path(name).suffix for name in READ} == {".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.pth",
            "holds an object of torch.nn.modules.container.Sequential, not a state dict; if you trust it, load it with PyTorch",
        ),
        (
            "model_in_dict.pth",
            r"Sequential under model, not a state dict; .*torch.save\(model.state_dict\(\), 'weights.pth'\)",
        ),
        (
            "quantized.pth",
            "w needs torch._utils._rebuild_qtensor; if you trust the file, load it with PyTorch and save",
        ),
        ("sparse.pth", "w needs torch._utils._rebuild_sparse_tensor; "),
        ("meta.pth", "w needs torch._utils._rebuild_meta_tensor_no_storage; "),
        (
            "float8.pth",
            "w has the dtype float8_e4m3fn; expected one of float64, .*, bfloat16; convert them with PyTorch",
        ),
        ("float8.safetensors", "w has the dtype F8_E4M3; expected one of F64, .*, BOOL; convert them with PyTorch"),
        ("complex.pth", "w has the dtype complex64; expected one of float64"),
        ("tensor.pth", "expected a mapping, got a tensor without a name"),
        ("no_tensors.pth", "its keys are epoch, arrays"),
        (
            "script.pt",
            r"is a TorchScript archive, not a state dict; load it with torch.jit.load and save its weights with",
        ),
    ],
)
def test_recorded_files_without_readable_weights_are_refused(name, message, recorded):
    assert f"refused/{name}" in REFUSED
    assert_refused(recorded / "refused" / name, message)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 0.8, 0.95, 0.999])
def test_partial_downloads_are_refused(part, legacy, tmp_path):
    arrays = {f"w{index}": np.full(50, index, np.float32) for index in range(20)}
    pth.write_checkpoint(tmp_path / "whole", {"model": arrays}, legacy=legacy)
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(data[: int(part * len(data))])
    assert_refused(tmp_path / "cut", "is damaged: ")
    if part > 0.5:
        assert_refused(tmp_path / "cut", "download it again")


@pytest.mark.parametrize("root", ["archive", "dat_tiny", "with space/and.dot"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_recompressed_archives_with_any_root(root, compression, tmp_path):
    content = pth.mapping({"w": pth.tensor("float32", (6,), key="0", count=6)})
    pth.write_archive(tmp_path / "w", content, {"0": DATA}, root=root, compression=compression)
    assert_same(read_weights(tmp_path / "w"), {"w": NUMBERS})


def read_one(path, opcodes):
    pth.write_archive(path, pth.mapping({"w": opcodes}), {"0": DATA})
    return read_weights(path)["w"]


def arguments(storage, size=(2, 3), stride=(3, 1), offset=0):
    return storage, pth.integer(offset), pth.integers(size), pth.integers(stride)


FLOATS = pth.storage("FloatStorage", key="0", count=6)
CUDA = pth.storage("FloatStorage", key="0", count=6, module="torch.cuda")
UNTYPED = pth.storage("UntypedStorage", key="0", count=24, module="torch.storage")
V2 = pth.call("torch._utils", "_rebuild_tensor_v2", *arguments(FLOATS), b"\x88", b"}")
STATE = pth.mapping({"note": pth.text("x")})


@pytest.mark.parametrize(
    "opcodes",
    [
        V2,
        pth.call("torch._utils", "_rebuild_tensor", *arguments(FLOATS)),
        pth.call("torch._utils", "_rebuild_tensor_v2", *arguments(FLOATS), b"\x88", b"}", b"N"),
        pth.call(
            "torch._utils", "_rebuild_tensor_v3", *arguments(UNTYPED), b"\x88", b"}", pth.name("torch", "float32")
        ),
        pth.call("torch._utils", "_rebuild_parameter", V2, b"\x88", b"}"),
        pth.call("torch._utils", "_rebuild_parameter_with_state", V2, b"\x88", b"}", STATE),
        pth.call("torch.nn.parameter", "Parameter", V2, b"\x88"),
        pth.name("torch.nn.parameter", "Parameter") + b"(" + V2 + b"\x88t\x81",  # NEWOBJ
        b"(" + pth.name("torch.nn.parameter", "Parameter") + V2 + b"\x88o",  # OBJ
        V2 + STATE + b"b",  # BUILD sets attributes
        pth.call("torch._utils", "_rebuild_tensor", *arguments(CUDA)),
    ],
)
def test_rebuild_functions_of_tensors(opcodes, tmp_path):
    np.testing.assert_array_equal(read_one(tmp_path / "w", opcodes), NUMBERS.reshape(2, 3))


@pytest.mark.parametrize("dtype", [*pth.STORAGES])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_dtype(dtype, legacy, tmp_path):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.ones((), dtype), "c": np.ones((0, 3), dtype)}
    pth.write_checkpoint(tmp_path / "w", arrays, legacy=legacy)
    assert_same(read_weights(tmp_path / "w"), arrays)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int16"])
def test_big_endian_archives(dtype, tmp_path):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    numbers = NUMBERS.astype(dtype)
    content = pth.mapping({"w": pth.tensor(dtype.name, (6,), key="0", count=6)})
    pth.write_archive(tmp_path / "w", content, {"0": numbers.byteswap().tobytes()}, order="big")
    assert_same(read_weights(tmp_path / "w"), {"w": numbers})
    pth.write_archive(tmp_path / "v", content, {"0": numbers.tobytes()}, order="middle")
    assert_refused(tmp_path / "v", "expected the byte order little or big")


def test_storages_of_views_in_old_files(tmp_path):
    """PyTorch before 0.4 identified a storage inside another one by its offset there."""
    view = b"(" + pth.text("1") + pth.integer(2) + pth.integer(4) + b"t"
    storage = pth.storage("FloatStorage", key="0", count=6, view=view)
    tensor = pth.call("torch._utils", "_rebuild_tensor", *arguments(storage, (2,), (1,), 1))
    pth.write_legacy(tmp_path / "w", pth.mapping({"w": tensor}), {"0": NUMBERS})
    assert read_weights(tmp_path / "w")["w"].tolist() == [3, 4]
    tensor = pth.call("torch._utils", "_rebuild_tensor", *arguments(storage, (2,), (1,), 3))
    pth.write_legacy(tmp_path / "w", pth.mapping({"w": tensor}), {"0": NUMBERS})
    assert_refused(tmp_path / "w", "w reaches beyond the 6 numbers of its storage")


def test_ordered_dictionaries_of_python_2(tmp_path):
    pairs = b"](](" + pth.text("w") + V2 + b"ee"
    content = pth.name("collections", "OrderedDict") + pairs + b"\x85R"
    pth.write_archive(tmp_path / "w", content, {"0": DATA})
    np.testing.assert_array_equal(read_weights(tmp_path / "w")["w"], NUMBERS.reshape(2, 3))


def write_legacy_parts(path, *, protocol=1001, content=None, keys=("0",), count=6, data=DATA):
    content = pth.mapping({"w": pth.tensor("float32", (6,), key="0", count=6)}) if content is None else content
    parts = [pickle.dumps(value, protocol=2) for value in (pth.MAGIC_NUMBER, protocol, {})]
    parts += [b"\x80\x02" + content + b".", pickle.dumps(list(keys), protocol=2), struct.pack("<q", count), data]
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(protocol=1000), "expected the protocol version 1001"),
        (dict(keys=["1"]), "its list of storages does not match its tensors"),
        (dict(keys=[3]), "its list of storages does not match its tensors"),
        (dict(keys=[]), "w: its storage 0 is missing or has another size"),
        (dict(keys=["0", "0"]), "it ends before its storage 0 is complete; download it again"),
        (dict(count=7), "expected 6 numbers in its storage 0, got 7"),
        (dict(count=-1), "expected 6 numbers in its storage 0, got 18,446,744,073,709,551,615"),
        (dict(data=DATA[:-1]), "it ends before its storage 0 is complete; download it again"),
        (dict(content=b"}"), "its list of storages does not match its tensors"),
    ],
)
def test_old_files_with_inconsistent_parts_are_refused(parts, message, tmp_path):
    assert_same(read_weights(write_legacy_parts(tmp_path / "good")), {"w": NUMBERS})
    assert_refused(write_legacy_parts(tmp_path / "w", **parts), message)


@pytest.mark.parametrize("name", ["legacy_protocol4.pth.tar", "mmengine.pth", "lightning_ema.ckpt"])
def test_recorded_files_with_changed_bytes_are_read_or_refused(name, recorded, tmp_path):
    rng, data, refusals = random.Random(0), (recorded / name).read_bytes(), []
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            place = rng.randrange(len(changed))
            changed[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        (tmp_path / "w").write_bytes(changed)
        try:
            weights = read_weights(tmp_path / "w")
        except UserError as error:
            refusals.append(str(error))
        else:
            assert sum(array.nbytes for array in weights.values()) < 10**6
    assert len(refusals) > 50
    assert all(message.isprintable() and message.endswith(".") for message in refusals)


def test_pickle_without_the_magic_number_is_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": 3}))
    assert_refused(tmp_path / "w.pkl", "is a pickle that torch.save did not write; if you trust it, load it")


def test_storage_of_another_size_is_refused(tmp_path):
    content = pth.mapping({"w": pth.tensor("float32", (6,), key="0", count=6)})
    for size in (0, 23, 100):
        pth.write_archive(tmp_path / "w", content, {"0": bytes(size)})
        assert_refused(tmp_path / "w", rf"w: expected 24 bytes in archive/data/0, got {size}\.")


def test_views_of_one_storage_cannot_exceed_the_memory_limit(tmp_path):
    """Without the limit a file of 1 MB would become 2 GB."""
    count = 250_000
    views = {f"w{index}": pth.tensor("float32", (count,), key="0", count=count) for index in range(2000)}
    pth.write_archive(tmp_path / "w", pth.mapping(views), {"0": bytes(4 * count)})
    assert (
        peak_of(lambda: assert_refused(tmp_path / "w", "its tensors would take 2,000,000,000 bytes, more than")) < 20e6
    )
    few = dict(list(views.items())[:10])
    pth.write_archive(tmp_path / "w", pth.mapping(few), {"0": bytes(4 * count)})
    assert len(read_weights(tmp_path / "w")) == 10


def test_expanded_tensor_repeats_its_values(tmp_path):
    tensor = pth.tensor("float32", (3, 2), key="0", count=2, stride=(0, 1))
    pth.write_archive(tmp_path / "w", pth.mapping({"w": tensor}), {"0": np.float32([1, 2]).tobytes()})
    np.testing.assert_array_equal(read_weights(tmp_path / "w")["w"], [[1, 2]] * 3)


@pytest.mark.parametrize(("metadata", "readable"), [({}, True), ({"neg": b"\x88"}, False)])
def test_lazily_negated_view_is_refused(metadata, readable, tmp_path):
    arguments = (
        pth.integer(0),
        pth.integers((2,)),
        pth.integers((1,)),
        b"\x89",
        pth.call("collections", "OrderedDict"),
    )
    storage = pth.storage("FloatStorage", key="0", count=2)
    tensor = pth.call("torch._utils", "_rebuild_tensor_v2", storage, *arguments, pth.mapping(metadata))
    pth.write_archive(tmp_path / "w", pth.mapping({"w": tensor}), {"0": np.float32([1, 2]).tobytes()})
    if readable:
        np.testing.assert_array_equal(read_weights(tmp_path / "w")["w"], [1, 2])
    else:
        assert_refused(tmp_path / "w", "w needs torch._utils._rebuild_tensor_v2")


def test_sizes_with_millions_of_bits_are_refused_quickly(tmp_path):
    """Computing their product would take minutes."""
    million_bytes = b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6
    sizes = b"(" + million_bytes + b"q\x00" + b"h\x00" * 31 + b"t"
    arguments = (pth.integer(0), sizes, pth.integers((1,) * 32), b"\x89", pth.call("collections", "OrderedDict"))
    tensor = pth.call("torch._utils", "_rebuild_tensor_v2", pth.storage("FloatStorage", key="0", count=2), *arguments)
    pth.write_archive(tmp_path / "w", pth.mapping({"w": tensor}), {"0": bytes(8)})
    assert_refused(tmp_path / "w", "w has no valid shape")


def test_size_of_decompressed_archives_is_limited(tmp_path):
    count = 30_000_000
    with zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED) as archive:
        content = pth.mapping({"w": pth.tensor("float32", (count,), key="0", count=count)})
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/data/0", bytes(4 * count))
    assert (tmp_path / "w").stat().st_size < 200_000
    assert peak_of(lambda: assert_refused(tmp_path / "w", "its tensors would take 120,000,000 bytes")) < 5e6


def test_pickle_larger_than_the_limit_is_not_decompressed(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as entry:
        for _ in range(130):
            entry.write(bytes(1 << 20))
    (tmp_path / "w").write_bytes(buffer.getvalue())
    message = "expected at most 16,777,216 bytes in archive/data.pkl, got 136,314,880"
    assert peak_of(lambda: assert_refused(tmp_path / "w", message)) < 5e6


def peak_of(function) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(2**31 - 1, 0), (0, 2**31 - 1)])
def test_empty_tensors_with_huge_sides(size, tmp_path):
    opcodes = pth.call("torch._utils", "_rebuild_tensor", *arguments(FLOATS, size, (1,) * len(size)))
    assert read_one(tmp_path / "w", opcodes).shape == size


def test_checkpoint_reports_its_source(tmp_path):
    pth.write_pth(tmp_path / "w", {"w": NUMBERS})
    checkpoint = read_checkpoint(tmp_path / "w")
    assert checkpoint.source == "model"
    assert_same(checkpoint.weights, {"w": NUMBERS})
