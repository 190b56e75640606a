"""Reader of torch.save files without PyTorch: zip archives, and the format from before PyTorch 1.6."""

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dat_jax.conversion.pickles import MAX_BYTES, Global, Object, read_pickle
from dat_jax.errors import UserError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of the format from before PyTorch 1.6
_PROTOCOL = 1001
# Arrays may take this many times the size of their file, or the minimum below if that is more: weights may share a storage,
# and archives may be compressed.
_MAX_GROWTH, _MIN_LIMIT = 16, 16 << 20
_MAX_AXES = 32

_DTYPES = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")},
    **{name: np.dtype(name) for name in ("uint64", "uint32", "uint16", "bool")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_UNTYPED = "untyped"
# Class of a storage -> dtype of its numbers, and their size in bytes.
_STORAGES = {
    **{"DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2)},
    **{"BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4)},
    **{"ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1)},
    **{"BoolStorage": ("bool", 1), "UntypedStorage": (_UNTYPED, 1), "_UntypedStorage": (_UNTYPED, 1)},
    **{"ComplexFloatStorage": ("complex64", 8), "ComplexDoubleStorage": ("complex128", 16)},
    **{"QInt8Storage": ("qint8", 1), "QUInt8Storage": ("quint8", 1), "QInt32Storage": ("qint32", 4)},
    **{"QUInt4x2Storage": ("quint4x2", 1), "QUInt2x4Storage": ("quint2x4", 1)},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The memory of one or more tensors.

    Attributes:
      key: name of the storage in the file.
      dtype: name of a dtype, or ``_UNTYPED``.
      count: number of values, or of bytes if the storage is untyped.
      item_bytes: size of a value.
      start: first value of a storage that is a view of another one.
    """

    key: str
    dtype: str
    count: int
    item_bytes: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.count * self.item_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage, which is read later: most tensors of a training checkpoint belong to the optimizer."""

    storage: Storage
    dtype: Any
    offset: Any
    size: Any
    stride: Any


class TorchFile(NamedTuple):
    """An open file of torch.save.

    Attributes:
      content: the saved object.
      read_storage: storage -> its bytes.
      byte_order: "<" or ">".
    """

    content: Any
    read_storage: Callable[[Storage], bytes]
    byte_order: str


@contextlib.contextmanager
def open_archive(path: pathlib.Path) -> Iterator[TorchFile]:
    """Open a zip archive as torch.save writes it since PyTorch 1.6: a pickle, and an entry per storage."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        _refuse_other_archives(path, names, roots)
        root = roots[0]

        def read(entry: str, smallest: int, largest: int) -> bytes:
            try:
                size = archive.getinfo(root + entry).file_size
            except KeyError:
                raise UserError(f"{path} is damaged: it lacks {show(root + entry)}.") from None
            if not smallest <= size <= largest:
                limits = f"{smallest:,}" if smallest else f"at most {largest:,}"
                raise ValueError(f"expected {limits} bytes in {show(root + entry)}, got {size:,}")
            return archive.read(root + entry)

        order = "<"  # PyTorch before 2.1 does not record the byte order
        if f"{root}byteorder" in names:
            order = {b"little": "<", b"big": ">"}.get(read("byteorder", 0, 64).strip(), "")
            if not order:
                raise ValueError("expected the byte order little or big")
        content = _read_object(io.BytesIO(read("data.pkl", 0, min(MAX_BYTES, _get_limit(path.stat().st_size)))))
        # The recorded count of a storage leaves out trailing bytes that do not fill a whole number.
        yield TorchFile(content, lambda s: read(f"data/{s.key}", s.nbytes, s.nbytes + 15), order)


def _refuse_other_archives(path: pathlib.Path, names: list[str], roots: list[str]) -> None:
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(
            f"{path} is a TorchScript archive, not a state dict; load it with torch.jit.load and save its weights with "
            "torch.save(model.state_dict(), 'weights.pth')."
        )
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is a NumPy .npz file; expected a file of torch.save or a .safetensors file.")
    if len(roots) != 1:
        raise UserError(
            f"{path} is a zip archive that torch.save did not write (expected one data.pkl, got {len(roots)}); if the "
            "weights are inside, unpack it and name the file of weights."
        )


@contextlib.contextmanager
def open_legacy(path: pathlib.Path) -> Iterator[TorchFile]:
    """Open a file from before PyTorch 1.6: five pickles, and for every storage its count and its bytes."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(min(path.stat().st_size, MAX_BYTES)))
        if _read_object(stream) != MAGIC_NUMBER:
            raise UserError(
                f"{path} is a pickle that torch.save did not write; if you trust it, load it and save only the weights with "
                "torch.save or as .safetensors."
            )
        protocol = _read_object(stream)
        if protocol != _PROTOCOL:
            raise ValueError(f"expected the protocol version {_PROTOCOL}")
        _read_object(stream)  # byte order and type sizes of the machine; storages are little-endian regardless
        storages: dict[str, Storage] = {}
        content = _read_object(stream, storages)
        places = _find_storages(file, _read_object(stream), storages, start=stream.tell())
        del stream  # frees up to MAX_BYTES

        def read(storage: Storage) -> bytes:
            if places.get(storage.key, (0, 0))[1] != storage.nbytes:
                raise ValueError(f"its storage {show(storage.key)} is missing or has another size")
            file.seek(places[storage.key][0])
            return file.read(storage.nbytes)

        yield TorchFile(content, read, "<")


def _find_storages(file, keys: Any, storages: dict[str, Storage], *, start: int) -> dict[str, tuple[int, int]]:
    """Key -> position and number of bytes of every storage in a file from before PyTorch 1.6."""
    size = os.fstat(file.fileno()).st_size
    places = {}
    for key in keys if isinstance(keys, list) else [None]:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise ValueError("its list of storages does not match its tensors")
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        start += 8 + storage.nbytes
        if start > size:
            raise ValueError(f"it ends before its storage {show(key)} is complete; download it again")
        if count != storage.count:
            raise ValueError(f"expected {storage.count:,} numbers in its storage {show(key)}, got {count:,}")
        places[key] = (start - storage.nbytes, storage.nbytes)
    return places


def _read_object(stream: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """The object of a pickle, with a ``Tensor`` for each tensor. Storages are added to ``storages`` by key."""

    def load_persistent(pid):
        storage = _name_storage(pid)
        if storages is not None and isinstance(storage, Storage):
            storages[storage.key] = storage
        return storage

    return read_pickle(stream, construct=_construct, load_persistent=load_persistent)


def _name_storage(pid: Any) -> Storage | Object:
    """The storage of a persistent id: ("storage", class, key, device, count), and in old files the location of a view."""
    if len(pid) > 6:
        raise ValueError
    kind, maker, *rest = pid
    if not isinstance(maker, Global):
        raise TypeError
    if kind == "module":  # the class of a pickled model, in old files
        return Object(maker, tuple(rest))
    key, _, count, *view = rest
    dtype, item_bytes = _STORAGES[maker.name]
    start = view[0][1] if view and view[0] else 0
    if kind != "storage" or not isinstance(key, str) or not _are_counts(count, start):
        raise ValueError
    return Storage(key, dtype, count, item_bytes, start)


def _construct(maker: Global, arguments: Any) -> Any:
    """A ``Tensor`` if the call rebuilds one with strides, else an ``Object``."""
    if maker.module in ("torch._utils", "torch._tensor", "torch", "torch.nn.parameter", "torch.nn"):
        match maker.name, arguments:
            case "_rebuild_tensor_v2", (Storage(), _, _, _, _, _, metadata, *_) if metadata:
                return Object(maker, arguments)  # PyTorch would still apply the metadata, such as a negation
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (Storage() as storage, offset, size, stride, *_):
                return Tensor(storage, storage.dtype, offset, size, stride)
            case "_rebuild_tensor_v3", (Storage() as storage, offset, size, stride, _, _, dtype, *_):
                return Tensor(storage, dtype.name, offset, size, stride)
            case "_rebuild_parameter" | "_rebuild_parameter_with_state" | "Parameter" | "Buffer", (
                Tensor() as data,
                *_,
            ):
                return data
            case "_rebuild_from_type_v2", (Global(), Global("torch" | "torch._tensor", "Tensor"), _, _):
                # A tensor with attributes.
                return _construct(arguments[0], arguments[2])
            case "_rebuild_from_type_v2", (Global(), Global(_, "Parameter" | "Buffer"), _, _):
                return _construct(arguments[0], arguments[2])
            case "Size", (tuple() | list() as size,):
                return size
    return Object(maker, arguments)


def load_tensors(tensors: Mapping[str, Tensor], file: TorchFile, *, file_bytes: int) -> dict[str, np.ndarray]:
    """Read tensors as arrays in C order that do not share memory. A storage is read once and freed after its last tensor.

    Args:
      tensors: name -> tensor.
      file: the open file.
      file_bytes: size of the file, which limits the memory of the arrays.

    Raises:
      ValueError: a tensor does not fit its storage, a storage is missing, or the arrays would take too much memory.
    """
    total, sharing = 0, defaultdict(list)
    for name, tensor in tensors.items():
        total += _check_view(show(name), tensor)
        sharing[tensor.storage].append(name)
    total = max(total, sum(storage.nbytes for storage in sharing))
    limit = _get_limit(file_bytes)
    if total > limit:
        raise ValueError(
            f"its tensors would take {total:,} bytes, more than the limit of {limit:,} for a file of its size"
        )
    arrays: dict[str, np.ndarray] = {}
    for storage, names in sharing.items():
        try:
            data = file.read_storage(storage)
        except ValueError as error:
            raise ValueError(f"{show(names[0])}: {error}") from error
        for name in names:
            arrays[name] = _view(show(name), tensors[name], data, file.byte_order)
    return {name: arrays[name] for name in tensors}


def _get_limit(file_bytes: int) -> int:
    return max(_MAX_GROWTH * file_bytes, _MIN_LIMIT)


def _check_view(name: str, tensor: Tensor) -> int:
    """Size of a tensor in bytes, after a check that its view lies within its storage."""
    storage, offset, size, stride = tensor.storage, tensor.offset, tensor.size, tensor.stride
    dtype = _get_dtype(name, tensor)
    if not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise ValueError(f"{name} has no valid shape")
    if not _are_counts(offset, *size, *stride) or len(size) != len(stride) or len(size) > _MAX_AXES:
        raise ValueError(f"{name} has no valid shape")
    count = storage.nbytes // dtype.itemsize
    numbers = math.prod(size)
    last = storage.start + offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # A view may repeat numbers, as expand() does. Its bytes count toward the limit of the file.
    if (numbers and last >= count) or max(size, default=0) >= 2**48:
        raise ValueError(f"{name} reaches beyond the {count:,} numbers of its storage")
    return numbers * dtype.itemsize


class UnsupportedError(ValueError):
    """Weights of a kind that is not supported."""


def _get_dtype(name: str, tensor: Tensor) -> np.dtype:
    dtype = _DTYPES.get(tensor.dtype) if isinstance(tensor.dtype, str) else None
    if dtype is None:
        known = ", ".join(_DTYPES)
        raise UnsupportedError(f"{name} has the dtype {show(str(tensor.dtype))}; expected one of {known}")
    return dtype


def _view(name: str, tensor: Tensor, data: bytes, order: str) -> np.ndarray:
    dtype, size = _get_dtype(name, tensor), tuple(tensor.size)
    if not math.prod(size):
        return np.empty(size, dtype)
    flat = np.frombuffer(data, dtype, count=len(data) // dtype.itemsize)
    if order == ">":
        flat = flat.byteswap()
    strides = [step * dtype.itemsize for step in tensor.stride]
    start = tensor.storage.start + tensor.offset
    return np.lib.stride_tricks.as_strided(flat[start:], size, strides, writeable=False).copy(order="C")


def _are_counts(*numbers) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def show(value: Any, limit: int = 100) -> str:
    """Text from a file for an error message: printable, on one line and at most ``limit`` characters long.

    Values of other types are shown as the name of their type, because the text of nested tuples that share items can be
    exponentially longer than the file.
    """
    text = str(value) if isinstance(value, str | Global | Exception) else type(value).__name__
    text = text[: 2 * limit].encode("unicode_escape", "backslashreplace").decode("ascii")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
