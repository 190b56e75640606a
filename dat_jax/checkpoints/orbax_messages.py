"""Errors and log messages of Orbax, in a form that can be shown to users."""

import contextlib
import logging
from collections.abc import Iterator

ORBAX_ERRORS = (
    ValueError,
    OSError,
    KeyError,
    TypeError,
    RuntimeError,
)  # raised by Orbax and TensorStore for damaged data


def describe_error(error: Exception) -> str:
    """The first line of an error of Orbax, without the TensorStore specification that follows, and without a period."""
    text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return text.split(" [tensorstore_spec")[0].rstrip(".")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Context without warnings of Orbax about intended settings: a read-only folder, or a single process that writes."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
