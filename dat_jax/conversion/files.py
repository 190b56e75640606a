"""Files of weights: reading files of torch.save without PyTorch, and reading and writing .safetensors."""

import json
import os
import pathlib
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save

from dat_jax.conversion import file_kinds, selection, torch_files
from dat_jax.conversion.pickles import CodeError
from dat_jax.conversion.torch_files import UnsupportedError, show
from dat_jax.errors import UserError
from dat_jax.storage import atomic_path, fetch

SUFFIXES = (
    ".pth",
    ".pt",
    ".tar",
    ".bin",
    ".ckpt",
    ".safetensors",
)  # usual suffixes; files are recognized by their content
_SAFETENSORS_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
# Advice for weights of other dtypes.
_CONVERT = "convert them with PyTorch, for example with tensor.dequantize() or tensor.float(), and save them again"


class Checkpoint(NamedTuple):
    """Weights read from a file.

    Attributes:
      weights: name -> array.
      source: where in the file they were, such as "model" or "state_dict (raw); weights=ema takes state_dict_ema".
      metadata: metadata of a .safetensors file.
    """

    weights: dict[str, np.ndarray]
    source: str
    metadata: Mapping[str, str] = types.MappingProxyType({})


def read_weights(path: str | os.PathLike, *, weights: str = "auto") -> dict[str, np.ndarray]:
    """Read the weights of a file. ``read_checkpoint`` also returns where in the file they were.

    The file is recognized by its content: a file of torch.save (zip archive, or the format from before PyTorch 1.6) or
    a .safetensors file. Files of torch.save are read without PyTorch. Nothing that such a file names is imported or
    called: only tensors are built, and everything else in a training checkpoint is skipped, whatever its class.

    The weights are the tensors under one of the keys ``selection.RAW_KEYS`` or ``selection.EMA_KEYS``, which may be
    nested, or else those at the top level. Prefixes that wrappers put before all names (``selection.PREFIXES``) are
    removed.

    Args:
      path: the file, with any suffix.
      weights: which weights to take from a checkpoint that has both raw and averaged (EMA) ones. "auto" takes those in
        the usual place: under "model" or "state_dict" if there is one, student before teacher, and averaged weights
        only if there are no others. MMEngine and Lightning put averaged weights into the usual place. "ema" and "raw"
        take only averaged or only raw weights.

    Returns:
      Name -> array, with the dtypes of the file (bfloat16 from ml_dtypes). Arrays do not share memory.

    Raises:
      UserError: the file is missing, damaged or of another kind, has no such weights, or names a function that runs
        code.
    """
    return read_checkpoint(path, weights=weights).weights


def read_checkpoint(path: str | os.PathLike, *, weights: str = "auto") -> Checkpoint:
    """Read the weights of a file, and where in the file they were.

    Arguments and errors are those of ``read_weights``.
    """
    if weights not in selection.CHOICES:
        raise UserError(f"weights must be one of {', '.join(selection.CHOICES)}, got {show(str(weights))}.")
    path = fetch(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a file of weights.")
        if not path.is_file():
            raise UserError(f"There is no file {show(str(path), 400)}.")
        return _read(path, weights)
    except UserError:
        raise
    except CodeError as error:
        raise UserError(
            f"{path} would run code when PyTorch loads it (it names {show(error)}) and is refused; get the weights from a "
            "source that you trust, or as .safetensors."
        ) from error
    except UnsupportedError as error:
        raise UserError(f"{path} has weights that are not supported: {error}; {_CONVERT}.") from error
    except OSError as error:
        raise UserError(f"{show(str(path), 400)} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged file can raise anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{path} is damaged: {show(reason.rstrip('.'), 400)}.") from error


def _read(path: pathlib.Path, weights: str) -> Checkpoint:
    kind = file_kinds.recognize(path)
    if kind == "safetensors":
        metadata = _read_header(path)
        return Checkpoint(*selection.select_weights(load_file(path), weights=weights, path=path), metadata)
    with (torch_files.open_archive if kind == "archive" else torch_files.open_legacy)(path) as file:
        tensors, source = selection.select_weights(file.content, weights=weights, path=path)
        return Checkpoint(torch_files.load_tensors(tensors, file, file_bytes=path.stat().st_size), source)


def _read_header(path: pathlib.Path) -> dict[str, str]:
    """Metadata of a .safetensors file, after a check of the dtypes and the size that it declares.

    The safetensors library checks the rest.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    if len(header) < length:
        raise ValueError("it ends within its header; download it again")
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", None) or {}
    if not all(isinstance(entry, dict) for entry in (metadata, *entries.values())):
        raise ValueError("its header must have a mapping for each tensor")
    for name, entry in entries.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise UnsupportedError(
                f"{show(name)} has the dtype {show(entry['dtype'])}; expected one of {', '.join(_SAFETENSORS_DTYPES)}"
            )
    expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    size = path.stat().st_size
    if size < expected:
        raise ValueError(f"it has {size:,} of {expected:,} bytes; download it again")
    return dict(metadata)


def write_safetensors(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors file, atomically.

    Args:
      path: file to create.
      arrays: name -> array.
      metadata: text by key, which ``read_checkpoint`` returns.

    Raises:
      UserError: the file exists already, or cannot be written.
    """
    # The library writes arrays in their memory order, so they are made contiguous. Its own writer creates files that only the
    # owner may read.
    with atomic_path(path) as unfinished:
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        unfinished.write_bytes(save(contiguous, metadata=dict(metadata) if metadata else None))
