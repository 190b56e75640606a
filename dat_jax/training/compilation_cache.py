"""Compiled programs kept on disk, so that a run that starts again does not compile again."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Callable

import jax

from dat_jax.errors import UserError
from dat_jax.storage import check_writable


def enable(setting: str, *, note: Callable[[str], None]) -> pathlib.Path | None:
    """Has jax keep compiled programs on disk from now on, those that took more than jax's own threshold of a second.

    On CPU the programs are for this machine's processor. XLA writes its features into an entry and complains on the console
    where those of the machine that loads it differ; what jax makes of it varies by version: it compiles again, or runs
    instructions that the processor does not have. jax's key of an entry has the name of the platform ("cpu"), versions,
    flags and a fingerprint of the devices, which is not documented to tell processors apart, and a home directory may be
    shared by several machines. So on CPU entries lie in a folder for each set of features and jaxlib. Some Intel
    processors complain even about their own entries (jax issue 38445, seen up to 0.10.1) and compile every time.

    Args:
      setting: ``config.compilation_cache``: a directory, "auto" for the one that JAX_COMPILATION_CACHE_DIR names or else
        dat_jax in the user's cache directory, or "" for none.
      note: is told where the directory cannot be written; the run then compiles as usual.

    Returns:
      The directory that is used, if any.
    """
    if not setting or not jax.config.jax_enable_compilation_cache:  # the user's JAX_ENABLE_COMPILATION_CACHE=false
        return None
    if setting == "auto" and jax.config.jax_compilation_cache_dir:
        return pathlib.Path(jax.config.jax_compilation_cache_dir)
    directory = _default_directory() if setting == "auto" else pathlib.Path(setting).expanduser()
    if jax.default_backend() == "cpu":
        directory /= f"cpu-{_machine_digest()}"
    try:
        check_writable(directory)
    except UserError as error:
        note(f"Warning: compiled programs are not kept. {error}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def _default_directory() -> pathlib.Path:
    """As the XDG base directories say."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dat_jax"


def _machine_digest() -> str:
    """Of what a CPU's program depends on: processor, its features, jaxlib."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    described = [platform.machine(), platform.processor(), importlib.metadata.version("jaxlib"), *features]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
