"""Recognition of the kind of a weights file by its first bytes, whatever its suffix."""

import pathlib
import re
import zipfile

from dat_jax.conversion.torch_files import show
from dat_jax.errors import UserError

_HEAD_BYTES = 4096
_MAX_HEADER = 100_000_000  # bytes of a .safetensors header, the limit of its library
_EXPECTED = "expected a file of torch.save or a .safetensors file"
# Pickle of torch.save's magic number with pickle protocols 0 and 1. Later protocols start with \x80.
_MAGIC_TEXT = b"L119547037146038801333356"
# First bytes of files that are not supported, and a phrase for what they are and what to do.
_UNSUPPORTED = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the weights; run git lfs pull to download them."),
    (
        rb"\s*(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|!--)",
        "is a web page, not the weights; open the link in a browser, as it may ask for a confirmation, and download the file.",
    ),
    (rb"\x1f\x8b", "is a gzip archive; unpack it and name the file of weights."),
    (
        rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!",
        "is a compressed archive; unpack it and name the file of weights.",
    ),
    (
        rb"(sys_info|pickle|tensors|storages|\./?)\x00(?s:.){240,260}ustar",
        "is in PyTorch's tar format from before 0.1.10; if you trust it, load it with PyTorch and save it again with "
        "torch.save.",
    ),
    (rb"(?s:.){257}ustar", "is a tar archive; unpack it and name the file of weights."),
    (rb"\x89HDF\r\n", f"is an HDF5 file, as Keras writes; {_EXPECTED}."),
    (rb"\x93NUMPY", f"is a NumPy .npy file; {_EXPECTED}."),
    (
        rb"\s*\{(?s:.)*\"weight_map\"",
        "is the index of a checkpoint in several files; load it with the library that wrote it, and save it as one file.",
    ),
    (rb"\s*[\{\[]", f"is a text file, probably JSON; {_EXPECTED}."),
    (rb"GGUF", f"is a GGUF file; {_EXPECTED}."),
    (rb"\x08[\x01-\x20][\x12\x1a\x2a\x3a\x42]", f"is a protobuf file, as of ONNX or TensorFlow; {_EXPECTED}."),
)
_TENSORFLOW_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # last bytes of the .index file of a TensorFlow checkpoint


def recognize(path: pathlib.Path) -> str:
    """Recognize the kind of a file.

    Args:
      path: the file.

    Returns:
      "archive" for the zip archives that torch.save writes since PyTorch 1.6, "legacy" for its earlier format, or
      "safetensors".

    Raises:
      UserError: the file is of another kind, which is named if it is known.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        size = file.seek(0, 2)
        file.seek(max(size - len(_TENSORFLOW_END), 0))
        end = file.read()
    if not head:
        raise UserError(f"{path} is empty; download it again.")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is damaged: its zip archive is incomplete, as after a partial download; download it again."
            )
        return "archive"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    for start, phrase in _UNSUPPORTED:
        if re.match(start, head, re.IGNORECASE):
            raise UserError(f"{path} {phrase}")
    if end == _TENSORFLOW_END:
        raise UserError(f"{path} is a TensorFlow checkpoint; {_EXPECTED}.")
    if head.startswith((b"\x80", _MAGIC_TEXT)):
        return "legacy"
    if zipfile.is_zipfile(path):
        return "archive"
    raise UserError(
        f"{path} is not a file of weights, or is damaged: {_EXPECTED}, got one that starts with {_quote(head)}."
    )


def _quote(head: bytes) -> str:
    return show(repr(head[:12])[1:])
