"""Writer of torch.save files from pickle opcodes, without PyTorch. It can also write files that torch.save would not."""

import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
MAGIC_NUMBER, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def write_pth(path: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
    """Write the zip archive of {"model": weights}."""
    write_checkpoint(path, {"model": weights})


def write_checkpoint(path: pathlib.Path, content, *, legacy: bool = False) -> None:
    """Write a file of nested dictionaries of arrays, integers, text, and opcodes (bytes)."""
    storages: dict[str, np.ndarray] = {}
    opcodes = _encode(content, storages)
    if legacy:
        write_legacy(path, opcodes, storages)
    else:
        write_archive(path, opcodes, {key: array.tobytes() for key, array in storages.items()})


def write_archive(
    path: pathlib.Path,
    content: bytes,
    storages: dict[str, bytes],
    *,
    order: str = "little",
    root: str = "archive",
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write a zip archive, the format since PyTorch 1.6, with the opcodes of one object."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr(f"{root}/byteorder", order)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", "3\n")
        archive.writestr(f"{root}/.data/serialization_id", "0" * 40)


def write_legacy(path: pathlib.Path, content: bytes, storages: dict[str, np.ndarray]) -> None:
    """Write a file in the format from before PyTorch 1.6 with the opcodes of one object."""
    information = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with path.open("wb") as file:
        for value in (MAGIC_NUMBER, PROTOCOL, information):
            file.write(pickle.dumps(value, protocol=2))
        file.write(b"\x80\x02" + content + b".")
        file.write(pickle.dumps(list(storages), protocol=2))
        for array in storages.values():
            file.write(struct.pack("<q", array.size) + array.tobytes())


def _encode(value, storages: dict[str, np.ndarray]) -> bytes:
    """Opcodes of a value. Arrays are added to ``storages``."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.ndarray):
        key = str(len(storages))
        storages[key] = value
        return tensor(value.dtype.name, value.shape, key=key, count=value.size)
    if isinstance(value, Mapping):
        return mapping({key: _encode(item, storages) for key, item in value.items()})
    return text(value) if isinstance(value, str) else integer(value)


def tensor(dtype: str, size, *, key: str, count: int, offset: int = 0, stride=None) -> bytes:
    """Opcodes of a tensor that is a view of a storage, contiguous by default. ``stride`` counts values, not bytes."""
    arguments = (integer(offset), *_layout(size, stride), b"\x89", call("collections", "OrderedDict"))
    return call("torch._utils", "_rebuild_tensor_v2", storage(STORAGES[dtype], key=key, count=count), *arguments)


def storage(kind: str, *, key: str, count: int, module: str = "torch", view: bytes = b"") -> bytes:
    """Opcodes of the persistent id of a storage. ``view`` is its sixth part, in files from before PyTorch 1.6."""
    return _tuple(text("storage"), name(module, kind), text(key), text("cuda:0"), integer(count), view) + b"Q"


def _layout(size, stride) -> tuple[bytes, bytes]:
    if stride is None:
        stride = [int(np.prod(size[axis + 1 :])) for axis in range(len(size))]
    return integers(size), integers(stride)


def integers(numbers) -> bytes:
    """Opcodes of a tuple of integers."""
    return _tuple(*map(integer, numbers))


def call(module: str, function: str, *arguments: bytes) -> bytes:
    """Opcodes of a call of a function by name."""
    return name(module, function) + _tuple(*arguments) + b"R"


def mapping(items: dict[str, bytes]) -> bytes:
    """Opcodes of a dictionary whose values are opcodes."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def text(value: str) -> bytes:
    """Opcodes of a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    """Opcodes of a 32-bit integer."""
    return b"J" + struct.pack("<i", value)


def name(module: str, attribute: str) -> bytes:
    """Opcodes of a class or function by name."""
    return f"c{module}\n{attribute}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"
