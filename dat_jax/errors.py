"""Errors caused by user input."""

import importlib.util

_EXTRAS = {  # extra of pyproject.toml -> modules of its packages
    "inference": ("PIL", "cv2", "matplotlib", "pycocotools"),
    "train": ("array_record", "grain", "mlxtend", "tensorboardX", "tensorflow_datasets"),
    "gcs": ("gcsfs",),
    "s3": ("s3fs",),
    "hub": ("huggingface_hub",),
}


class UserError(ValueError):
    """An error caused by user input, such as a setting, a path or a file. Commands print it without a traceback."""


def name_some(names: list[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def require_extra(extra: str) -> None:
    """Checks that the packages of an extra are installed, without importing them.

    Args:
      extra: a key of ``_EXTRAS``.

    Raises:
      UserError: names the first one that is missing and the command that installs the extra.
    """
    for module in _EXTRAS[extra]:
        if importlib.util.find_spec(module) is None:
            raise UserError(explain_missing_module(module))


def explain_missing_module(module: str | None) -> str | None:
    """A sentence with the command that installs a missing third-party module; None if no extra has it."""
    top = (module or "").partition(".")[0]
    for extra, modules in _EXTRAS.items():
        if top in modules:
            return f'The module {top} is not installed: pip install "dat-jax[{extra}]".'
    return None
