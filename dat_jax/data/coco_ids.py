"""Category and image ids of COCO files, so that results of a detector have the ids of its data.

A run records the ids of its categories in the file ``CATEGORIES`` of the work directory, as the list "categories" of a COCO
file: [{"id", "name"}, ...].
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from dat_jax.data.coco_json import read_ids
from dat_jax.errors import UserError, name_some

CATEGORIES = "categories.json"


def format_categories(category_ids: Sequence[int], class_names: Sequence[str]) -> str:
    """Format the content of the file ``CATEGORIES``."""
    entries = [{"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def read_category_ids(file: str | os.PathLike, class_names: Sequence[str]) -> tuple[int, ...] | None:
    """Read the category ids of a model's classes from the file ``CATEGORIES``.

    Args:
      file: the file.
      class_names: names of the K classes of the model. Categories are matched by name; if the names are others or are not
        unique, by their order.

    Returns:
      K category ids, or None if there is no file.

    Raises:
      UserError: the file cannot be read, is damaged, or does not have K categories.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        numbers, names = [int(entry["id"]) for entry in entries], [str(entry["name"]) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: expected a list of categories with id and name.") from error
    if len(numbers) != len(class_names):
        raise UserError(f"{path}: expected {len(class_names)} categories, got {len(numbers)}.")
    return match_categories(dict(zip(numbers, names, strict=True)), class_names) or tuple(numbers)


def match_categories(categories: Mapping[int, str], class_names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the category id of every class by its name, or None if a name is missing or not unique."""
    numbers = {name: number for number, name in categories.items()}
    if (
        len(numbers) < len(categories)
        or len(set(class_names)) < len(class_names)
        or not set(class_names) <= set(numbers)
    ):
        return None
    return tuple(numbers[name] for name in class_names)


def find_image_ids(annotations: str | os.PathLike, images: Sequence[pathlib.Path]) -> tuple[list[int], dict[int, str]]:
    """Find the ids of image files in a COCO file.

    Args:
      annotations: the COCO file, with or without annotations.
      images: paths of image files. A path is the image whose "file_name" it ends with; the longest one if there are several.

    Returns:
      The ids of the images, and the categories of the file, {category id: name}.

    Raises:
      UserError: the file cannot be read, an image is not in it, or two images have the same id.
    """
    listed, categories = read_ids(str(annotations))
    numbers = {pathlib.PurePath(name).parts: number for name, number in listed.items()}
    image_ids: dict[int, pathlib.Path] = {}
    missing = []
    for image in images:
        parts = image.absolute().parts
        number = next((numbers[parts[k:]] for k in range(len(parts)) if parts[k:] in numbers), None)
        if number is None:
            missing.append(str(image))
        elif number in image_ids:
            raise UserError(f"{annotations} has one image for two files: {image_ids[number]} and {image}.")
        else:
            image_ids[number] = image
    if missing:
        raise UserError(f"These images are not in {annotations}: {name_some(missing)}.")
    return list(image_ids), categories
