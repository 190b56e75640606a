"""Reading manifest.json of an exported folder, and choosing one of its programs."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dat_jax.data.buckets import Shape, check_sizes, find_bucket
from dat_jax.errors import UserError
from dat_jax.models.dat import MIN_IMAGE_SIDE

MANIFEST = "manifest.json"
PROGRAM_SUFFIX = ".stablehlo"


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Read manifest.json and check its structure.

    Returns:
      Its content. "files" has the size and the digest of every file, and every program is described.

    Raises:
      UserError: the manifest is missing or damaged.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        for record in manifest["files"].values():
            _ = record["bytes"], record["sha256"]
        _check_programs(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = getattr(error, "strerror", None) or f"{MANIFEST} is damaged"
        raise UserError(f"{directory} is not a folder written by dat_jax.export, or is damaged: {reason}.") from error
    return manifest


def _check_programs(manifest: Mapping[str, Any]) -> None:
    """Raise a ValueError or the like unless the programs and their files fit together."""
    single, several = manifest.get("program"), manifest.get("programs") or []
    programs = list_programs(manifest)
    shapes = [get_image_shape(program) for program in programs]
    if not isinstance(several, list) or (single and several) or len(set(shapes)) < len(shapes):
        raise ValueError("Expected one program, or a list of programs of different buckets.")
    if any(program["bucket"] != list(shape) for program, shape in zip(several, shapes, strict=False)):
        raise ValueError("A bucket is not the shape of the images of its program.")
    described = sorted(program["file"] for program in programs)
    if not manifest["files"] or described != sorted(
        name for name in manifest["files"] if name.endswith(PROGRAM_SUFFIX)
    ):
        raise ValueError("The programs are not those of the files.")


def list_programs(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions of all programs of a manifest: those of buckets, or the one for images of one size."""
    return manifest.get("programs") or [program for program in [manifest.get("program")] if program]


def get_image_shape(program: Mapping[str, Any]) -> Shape:
    """Return (height, width) of the images of a program that a manifest describes; of a bucket if it has one."""
    _, height, width, _ = program["inputs"][0]["shape"]
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError(f"The shape of the images is {program['inputs'][0]['shape']}.")
    return height, width


def choose_program(directory: pathlib.Path, manifest: Mapping[str, Any], size: Shape | None) -> dict[str, Any]:
    """Return the description of the program for images of a size.

    Args:
      directory: the exported folder, for error messages.
      manifest: its manifest.
      size: (height, width) of an image in pixels, or None if there is only one program.

    Raises:
      UserError: there is no program for it, or the size is impossible.
    """
    programs = list_programs(manifest)
    if not programs:
        raise UserError(f"{directory} has no program: export with --formats=stablehlo.")
    by_shape = {get_image_shape(program): program for program in programs}
    if size is None:
        if len(programs) == 1:
            return programs[0]
        raise UserError(
            f"{directory} has programs for the buckets {list_shapes(list(by_shape))}: pass the size of the image."
        )
    (size,) = check_sizes([size], min_side=MIN_IMAGE_SIDE)
    if "bucket" not in programs[0] and size not in by_shape:
        raise UserError(
            f"{directory} has a program for images of {list_shapes(list(by_shape))} only, got a size of {list_shapes([size])}."
        )
    return by_shape[find_bucket(size, list(by_shape))]


def list_shapes(shapes: Sequence[Shape]) -> str:
    """Return shapes as text, such as "608x832,832x608"."""
    return ",".join(f"{height}x{width}" for height, width in shapes)
