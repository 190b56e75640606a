"""Weights in files: PyTorch's .pth, read without PyTorch, and .safetensors, read and written."""

import math
import os
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save

from dat_jax.appearing import appearing
from dat_jax.errors import UserError

SUFFIXES = (".pth", ".pt", ".safetensors")
_WEIGHT_KEYS = ("model", "state_dict", "model_ema")  # where a training checkpoint has them, best first


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights of a file, by name.

    A .pth or .pt file is PyTorch's zip archive: a pickle, and the bytes of each storage. It is read here by an unpickler
    of our own: a conversion should not need gigabytes of PyTorch, and nothing that a pickle names is ever called. Names
    that weights and training checkpoints have stand for harmless values, all others are refused. The weights are what
    is under "model" or "state_dict", else "model_ema", else the mapping itself; what is no tensor is passed over, and a
    "module." before all names is taken off.

    Args:
      path: ends in .pth, .pt or .safetensors.

    Returns:
      Name -> array, of the file's dtypes (bfloat16 as ml_dtypes has it), each with memory of its own.

    Raises:
      UserError: there is no such file, it is damaged, holds no weights, or names what could run code.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"Weights want a file that ends in {', '.join(SUFFIXES)}, got {path}.")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else _read_archive(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{path} is damaged: {reason.rstrip('.')}.") from error
    if not weights:
        raise UserError(f"{path} holds no weights.")
    if all(name.startswith("module.") for name in weights):  # of PyTorch's DistributedDataParallel
        weights = {name.removeprefix("module."): array for name, array in weights.items()}
    return weights


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name. The file appears when it is whole.

    Raises:
      UserError: the file exists already, or cannot be written.
    """
    # safetensors takes the memory as it lies, and its own files are for their owner alone.
    with appearing(path) as unfinished:
        unfinished.write_bytes(save({name: np.asarray(array, order="C") for name, array in arrays.items()}))


_DTYPES = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")},
    **{name: np.dtype(name) for name in ("uint64", "uint32", "uint16", "bool")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_UNTYPED = "untyped"
_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
}
# What training checkpoints hold beside tensors. None of it is looked at.
_INERT = {
    *(("yacs.config", "CfgNode"), ("argparse", "Namespace"), ("torch", "device")),
    *(("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype")),
    ("_codecs", "encode"),  # pickle's way to write the bytes of a numpy scalar
    *(("__builtin__", "set"), ("builtins", "set")),  # in a CfgNode
}
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # PyTorch's magic number, before 1.6


class _Storage(NamedTuple):
    key: str
    dtype: str  # or _UNTYPED
    count: int  # of numbers, or of bytes


class _Tensor(NamedTuple):
    """A tensor that is not read yet: checkpoints hold more of them, of an optimizer, than anyone asks for."""

    storage: _Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert(dict):
    """Stands for an object that nobody looks at; takes whatever a pickle gives it and does nothing."""

    def __init__(self, *_, **__):
        super().__init__()

    def __setstate__(self, _):
        pass


class _Unpickler(pickle.Unpickler):
    """Gives the names in a pickle meanings of our own. What they stand for is made anew for each file, so that one that
    writes to it, as a pickle can, changes nothing that the next one sees.
    """

    def __init__(self, file, path):
        super().__init__(file)
        self._path = path
        self._meanings: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: _Tensor(
                storage, storage.dtype, offset, size, stride
            ),
            ("torch._utils", "_rebuild_tensor_v3"): lambda storage, offset, size, stride, _, __, dtype, *___: _Tensor(
                storage, dtype, offset, size, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.storage", "UntypedStorage"): _UNTYPED,
            **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
            **{("torch", dtype): dtype for dtype in _DTYPES},
            **{name: type("_Inert", (_Inert,), {}) for name in _INERT},
        }

    def find_class(self, module, name):
        if (module, name) not in self._meanings:
            raise UserError(f"{self._path} would run code (names {module}.{name}); refused.")
        return self._meanings[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage" or dtype not in (*_DTYPES, _UNTYPED) or not isinstance(key, str) or not _are_counts(count):
            raise ValueError("a storage of an unknown kind")
        return _Storage(key, dtype, count)


def _read_archive(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The weights of a .pth file."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(len(_LEGACY_START)) == _LEGACY_START:
                raise UserError(f"{path} is in PyTorch's format from before 1.6; load and save it with a newer one.")
        raise UserError(f"{path} is not a .pth file, or not all of one: no zip archive.")
    with zipfile.ZipFile(path) as archive:
        roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError(f"{path} is a zip archive without weights: it wants one data.pkl, and has {len(roots)}.")

        def read(entry: str) -> bytes:
            try:
                return archive.read(f"{roots[0]}/{entry}")
            except KeyError:
                raise UserError(f"{path} is damaged: it lacks {roots[0]}/{entry}.") from None

        with archive.open(f"{roots[0]}/data.pkl") as file:
            content = _Unpickler(file, path).load()
        has_order = f"{roots[0]}/byteorder" in archive.namelist()  # PyTorch before 2.1 did not say
        order = {b"little": "<", b"big": ">"}[read("byteorder") if has_order else b"little"]
        return _materialize(_find_tensors(content, path), read, order)


def _find_tensors(content, path) -> dict[str, _Tensor]:
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights by name, but a {type(content).__name__}.")
    for candidate in (*(content.get(key) for key in _WEIGHT_KEYS), content):
        if isinstance(candidate, Mapping):
            tensors = {name: value for name, value in candidate.items() if isinstance(value, _Tensor)}
            if tensors:
                return {str(name): tensor for name, tensor in tensors.items()}
    raise UserError(
        f"{path} holds no weights, neither under {', '.join(_WEIGHT_KEYS)} nor as it is; "
        f"its keys are {', '.join(map(str, list(content)[:10])) or 'none'}."
    )


def _materialize(tensors: dict[str, _Tensor], read: Callable, order: str) -> dict[str, np.ndarray]:
    storages: dict[str, bytes] = {}  # tensors may share one
    arrays = {}
    for name, tensor in tensors.items():
        key = tensor.storage.key
        if key not in storages:
            storages[key] = read(f"data/{key}")
        try:
            arrays[name] = _view(tensor, storages[key], order)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return arrays


def _view(tensor: _Tensor, data: bytes, order: str) -> np.ndarray:
    """The tensor in C order, copied out of its storage's bytes."""
    storage, name, offset, size, stride = tensor
    if name not in _DTYPES or not _are_counts(offset, *size, *stride) or len(size) != len(stride):
        raise ValueError("is no tensor")
    dtype = _DTYPES[name]
    count = storage.count // (dtype.itemsize if storage.dtype == _UNTYPED else 1)
    if len(data) < count * dtype.itemsize:
        raise ValueError(f"wants {count * dtype.itemsize} bytes, its storage has {len(data)}")
    numbers = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numbers > count or (numbers and last >= count):
        raise ValueError(f"reaches beyond the {count} numbers of its storage")
    if not numbers:
        return np.empty(size, dtype)
    flat = np.frombuffer(data, dtype, count=count)
    if order == ">":
        flat = flat.byteswap()
    strides = [step * dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat[offset:], size, strides, writeable=False).copy(order="C")


def _are_counts(*numbers) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
