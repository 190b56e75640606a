"""Recognition of files by their content, and errors that name files of other kinds."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest

from dat_jax.conversion import read_weights, write_safetensors
from dat_jax.errors import UserError
from tests.helpers import pth_writer as pth

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
SUFFIXES = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt", ".safetensors", ".model", "")


@pytest.mark.parametrize("kind", ["archive", "legacy", "safetensors"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_suffix_does_not_matter(suffix, kind, tmp_path):
    path = tmp_path / f"w{suffix}"
    if kind == "safetensors":
        write_safetensors(path, WEIGHTS)
    else:
        pth.write_checkpoint(path, WEIGHTS, legacy=kind == "legacy")
    np.testing.assert_array_equal(read_weights(path)["a"], WEIGHTS["a"])


def make_tar(*names) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def make_zip(**entries) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def make_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def make_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 94371840\n"
INDEX = json.dumps({"metadata": {"total_size": 3}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty; download it again\."),
        (POINTER, r"is a Git LFS pointer, not the weights; run git lfs pull to download them\."),
        (
            b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning",
            "is a web page, not the weights; open the link",
        ),
        (b"\n  <HTML><head>", "is a web page"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied', "is a web page"),
        (gzip.compress(b"x" * 99), r"is a gzip archive; unpack it and name the file of weights\."),
        (bz2.compress(b"x" * 99), "is a compressed archive; unpack it"),
        (lzma.compress(b"x" * 99), "is a compressed archive; unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(30), "is a compressed archive; unpack it"),
        (
            make_tar("sys_info", "pickle", "tensors", "storages"),
            "is in PyTorch's tar format from before 0.1.10; if you trust it, load it with",
        ),
        (make_tar("weights/dat.pth"), "is a tar archive; unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file, as Keras writes; expected a file of torch.save or a"),
        (make_npy(), r"is a NumPy \.npy file; expected"),
        (make_npz(), r"is a NumPy \.npz file; expected"),
        (
            make_zip(**{"a/dat.pth": "x"}),
            r"torch.save did not write \(expected one data.pkl, got 0\); if the weights are inside",
        ),
        (make_zip(**{"a/data.pkl": "x", "b/data.pkl": "x"}), r"expected one data.pkl, got 2"),
        (make_zip(**{"a/data.pkl": "x", "a/constants.pkl": "x", "a/code/x.py": ""}), "is a TorchScript archive"),
        (make_zip(), r"expected one data.pkl, got 0"),
        (
            INDEX,
            "is the index of a checkpoint in several files; load it with the library that wrote it, and save it as one",
        ),
        (b'{"a": 1}', "is a text file, probably JSON"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "is a protobuf file, as of ONNX or TensorFlow"),
        (b"x" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "is a TensorFlow checkpoint"),
        (b"GGUF" + bytes(40), "is a GGUF file"),
        (b"some\ntext \x1b", r"not a file of weights, or is damaged: .* starts with 'some\\\\ntext \\\\x1b'\."),
        (bytes(1000), "is not a file of weights, or is damaged"),
        (make_zip(a="x" * 999)[:500], "is damaged: its zip archive is incomplete"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "data",
)
def test_other_kinds_of_files_are_refused_and_named(data, message, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as info:
        read_weights(path)
    assert "\n" not in str(info.value)
    assert str(info.value).endswith(".")
    assert str(info.value).startswith(str(path))


def header_of(**entries) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            header_of(a=dict(dtype="F32", shape=[2], data_offsets=[0, 8])) + bytes(7),
            "it has 76 of 77 bytes; download it again",
        ),
        ((10**7).to_bytes(8, "little") + b'{"a":', "it ends within its header; download it again"),
        (
            header_of(a=dict(dtype="F8_E5M2", shape=[2], data_offsets=[0, 2])) + bytes(2),
            "a has the dtype F8_E5M2; expected",
        ),
        (header_of(a=dict(dtype="C64", shape=[1], data_offsets=[0, 8])) + bytes(8), "a has the dtype C64; expected"),
        (header_of(a=3), "is damaged: "),
        (header_of(), "holds no weights"),
        (header_of(a=dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])), "bytes; download it again"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "data",
)
def test_safetensors_that_are_damaged_or_have_other_dtypes_are_refused(data, message, tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as info:
        read_weights(path)
    assert "\n" not in str(info.value)
