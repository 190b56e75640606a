"""Writes the .pth files that torch.save would, opcode by opcode, and ones that it would not."""

import pathlib
import struct
import zipfile

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def write_pth(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
    """{"model": weights}."""
    names = list(weights)
    items = {
        name: tensor(weights[name].dtype.name, weights[name].shape, key=str(index), count=weights[name].size)
        for index, name in enumerate(names)
    }
    storages = {str(index): weights[name].tobytes() for index, name in enumerate(names)}
    write_archive(path, mapping({"model": mapping(items)}), storages)


def write_archive(path: pathlib.Path, content: bytes, storages: dict[str, bytes], *, order: str = "little") -> None:
    """A zip archive around the opcodes of one object."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/byteorder", order)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def tensor(dtype: str, size, *, key: str, count: int, offset: int = 0, stride=None) -> bytes:
    """A view of a storage, contiguous unless strides (in numbers) are given."""
    if stride is None:
        stride = [int(np.prod(size[axis + 1 :])) for axis in range(len(size))]
    storage = _tuple(text("storage"), name("torch", STORAGES[dtype]), text(key), text("cpu"), integer(count)) + b"Q"
    sizes, strides = (_tuple(*map(integer, numbers)) for numbers in (size, stride))
    arguments = _tuple(storage, integer(offset), sizes, strides, b"\x89", name("collections", "OrderedDict") + b")R")
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def call(module: str, function: str, *arguments: bytes) -> bytes:
    return name(module, function) + _tuple(*arguments) + b"R"


def mapping(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"
