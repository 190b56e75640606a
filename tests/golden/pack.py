"""Pack a recorded .npz file: python -m tests.golden.pack RECORDED.npz PACKED.npz

The arrays stay the same to the bit, except that of the largest maps only every fourth row and column is kept. The
arrays of float16 become one, and those of float32 another, whose bytes are stored apart by their significance; gradient
norms become one JSON text; and each array is compressed by the method that makes it smallest. ``tests.helpers.golden_files.read``
unpacks.
"""

import bz2
import io
import json
import lzma
import pathlib
import sys
import zipfile
import zlib

import numpy as np

from tests.helpers.golden_files import read

_THINNED = ("stage0", "stage1", "stage2", "a.feat0", "a.feat1")
_METHODS = {
    zipfile.ZIP_STORED: lambda data: data,
    zipfile.ZIP_DEFLATED: lambda data: zlib.compress(data, 9),
    zipfile.ZIP_BZIP2: bz2.compress,
    zipfile.ZIP_LZMA: lzma.compress,
}


def pack(recorded: pathlib.Path, packed: pathlib.Path) -> None:
    """Read one file and write the other."""
    arrays = read(recorded)
    arrays = _join_floats(_join_norms(_thin_out(arrays)))
    with zipfile.ZipFile(packed, "w") as archive:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            data = buffer.getvalue()
            method = min(_METHODS, key=lambda method: len(_METHODS[method](data)))
            archive.writestr(zipfile.ZipInfo(f"{key}.npy"), data, compress_type=method)


def _thin_out(arrays):
    return {
        f"{key}_4" if key in _THINNED else key: array[:, :, ::4, ::4] if key in _THINNED else array
        for key, array in arrays.items()
    }


def _join_norms(arrays):
    norms = {key.removeprefix("gradnorm."): float(arrays[key]) for key in arrays if key.startswith("gradnorm.")}
    rest = {key: array for key, array in arrays.items() if not key.startswith("gradnorm.")}
    return rest | ({"gradnorm": np.array(json.dumps(norms))} if norms else {})


def _join_floats(arrays):
    for dtype in ("float16", "float32"):
        joined = {key: array for key, array in arrays.items() if array.dtype == dtype}
        if joined:
            numbers = np.concatenate([array.ravel() for array in joined.values()])
            planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
            arrays = {key: array for key, array in arrays.items() if key not in joined} | {
                f"{dtype}.index": np.array(json.dumps({key: array.shape for key, array in joined.items()})),
                **{f"{dtype}.byte{index}": plane for index, plane in enumerate(planes)},
            }
    return arrays


if __name__ == "__main__":
    pack(*map(pathlib.Path, sys.argv[1:]))
