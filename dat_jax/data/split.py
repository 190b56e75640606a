"""Split one folder of classes into training and validation images.

Usage: python -m dat_jax.data.split FOLDER --output=DIR [--validation=FRACTION]

  python -m dat_jax.data.split flowers/all --output=/data/flowers
  python -m dat_jax.data.split flowers/all --output=/data/flowers --validation=0.1 --seed=1

FOLDER has one folder of images per class. DIR gets train/<class> and val/<class>, which `python -m dat_jax.main` reads with
--config.data.directory=DIR. Files are hard links where the file system allows it, and copies otherwise; FOLDER is only read.
Every class needs two images or more, and has at least one in each part.
"""

import os
import pathlib
import shutil

import numpy as np
from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.data.image_files import LeftOut, check_class_names, list_suffixes, scan_folder
from dat_jax.errors import UserError, name_some
from dat_jax.storage import atomic_path, check_local


def split_folder(folder: str, output: str, *, validation: float = 0.2, seed: int = 0) -> dict[str, int]:
    """Split folder/<class>/* at random into output/train/<class>/* and output/val/<class>/*, class by class.

    Args:
      folder: folder of class folders.
      output: folder to create.
      validation: fraction of the images of each class for validation, rounded, but at least one.
      seed: seed of the choice.

    Returns:
      Number of images, {"train": ..., "val": ...}.

    Raises:
      UserError: the fraction is not between 0 and 1, the seed is negative, there are no class folders, a class has an
        impossible name or fewer than two images, or ``output`` exists, lies in ``folder`` or cannot be written.
    """
    if not 0 < validation < 1:
        raise UserError(f"--validation must be between 0 and 1, got {validation}.")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, got {seed}.")
    check_local(folder, key="FOLDER")
    check_local(output, key="--output")
    if pathlib.Path(folder).resolve() in (pathlib.Path(output).resolve(), *pathlib.Path(output).resolve().parents):
        raise UserError(f"--output is {output}: expected a folder outside {folder}, which is only read.")
    root, left_out, files = scan_folder(folder, arrays=True), LeftOut(), {}
    left_out.add("images outside class folders", root.images)
    left_out.add_listing(root, subfolders=True)
    for name in root.folders:
        listing = scan_folder(os.path.join(folder, name), arrays=True)
        left_out.add_listing(listing, folder=name)
        files[name] = listing.images
    check_class_names(list(files), source=folder)
    left_out.log(folder, f"{sum(map(len, files.values())):,} images in {len(files):,} class folders")
    if not files:
        raise UserError(f"{folder} has no class folders: expected one folder of images per class.")
    small = [name for name, images in files.items() if len(images) < 2]
    if small:
        raise UserError(
            f"These class folders of {folder} have fewer than two images: {name_some(small)}. Images are files named "
            f"{list_suffixes(arrays=True)}."
        )
    counts = {"train": 0, "val": 0}
    with atomic_path(output) as temporary:
        for name, images in files.items():
            count = min(max(round(validation * len(images)), 1), len(images) - 1)
            order = np.random.default_rng((seed, *name.encode())).permutation(len(images))
            chosen = {images[index] for index in order[:count]}
            for image in images:
                part = "val" if image in chosen else "train"
                _link(pathlib.Path(folder, name, image), temporary / part / name / image)
                counts[part] += 1
    return counts


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("output", None, "Folder to create.", flag_values=values)
    flags.DEFINE_float("validation", 0.2, "Fraction of the images of each class for validation.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the choice.", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Check the arguments and call ``split_folder``."""
    if len(argv) != 2 or not values.output:
        fail(f"Expected FOLDER --output=DIR, got {' '.join(argv[1:]) or 'nothing'}.")
    try:
        counts = split_folder(argv[1], values.output, validation=values.validation, seed=values.seed)
    except UserError as error:
        fail(str(error))
    print(f"{values.output}: {counts['train']:,} images to train, {counts['val']:,} to validate")


_FLAGS = {"Output": ("output=DIR", "validation=FRACTION", "seed=N")}

if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_flags)
