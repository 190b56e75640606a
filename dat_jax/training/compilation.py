"""Compilation: the cache of compiled programs, and compiler options that differ between versions of jax."""

import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.errors import UserError
from dat_jax.storage import Path, as_path, check_writable, is_in_bucket

logger = logging.getLogger(__name__)


def known_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options that the installed compiler accepts, for ``jax.jit(..., compiler_options=...)``.

    XLA adds and removes options between releases, and a compilation with an unknown one fails. Every option here only
    affects speed or memory, so a version without it compiles the same function.

    Args:
      options: name -> value, as ``jax.jit`` takes them.

    Returns:
      The accepted ones, or None if there are none.
    """
    return {name: value for name, value in options.items() if _is_known(name, value)} or None


@functools.cache
def _is_known(name: str, value: object) -> bool:
    """Compiles a program without inputs with the option. It takes a few milliseconds."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={name: value})()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


def enable_cache(setting: str) -> Path | None:
    """Make jax keep compiled programs on disk, so that a run that is started again does not compile again.

    Programs that compile faster than jax's own threshold of one second are not kept. On CPU the programs are for the processor
    of this machine, and a home directory may be shared by several machines. XLA stores the processor's features with an entry
    and complains on the console if those of the loading machine differ; depending on the version of jax, it then compiles
    again or runs instructions that the processor does not have. The key of an entry is not documented to distinguish
    processors. So on CPU there is a folder for each set of features and each jaxlib. Some Intel processors complain about
    their own entries too (jax issue 38445, seen up to 0.10.1) and compile every time.

    Args:
      setting: ``config.compilation_cache``: a directory; "auto" for the one that JAX_COMPILATION_CACHE_DIR names, or else
        dat_jax in the user's cache directory; or "" to keep nothing.

    Returns:
      The directory in use, or None. A directory that cannot be written is logged as a warning.
    """
    options: Any = jax.config  # its attributes are defined at run time
    if not setting or not options.jax_enable_compilation_cache:  # JAX_ENABLE_COMPILATION_CACHE=false
        return None
    if setting == "auto" and options.jax_compilation_cache_dir:
        return as_path(options.jax_compilation_cache_dir)
    try:
        directory = _default_directory() if setting == "auto" else as_path(setting)
        directory = directory if is_in_bucket(directory) else directory.expanduser()
    except RuntimeError:  # a container's user without HOME and without an entry in /etc/passwd
        logger.warning("Compiled programs are not kept: there is no home directory. Set config.compilation_cache.")
        return None
    if jax.default_backend() == "cpu":
        directory /= f"cpu-{_machine_digest()}"
    try:
        check_writable(directory)
    except UserError as error:
        logger.warning("Compiled programs are not kept. %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory


def release_unused_memory() -> None:
    """Collect garbage, and return memory that this process has freed to the system.

    glibc keeps freed memory for later. After the compilation of a training step that is gigabytes, which the process would hold
    while it trains: 1.2 GB for dat_pp_tiny on a CPU. With other C libraries, only garbage is collected.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return
    trim(0)


def _default_directory() -> pathlib.Path:
    """Cache directory of the user, by the XDG base directory specification."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dat_jax"


def _machine_digest() -> str:
    """Digest of what a program for a CPU depends on: the processor, its features and jaxlib."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    described = [platform.machine(), platform.processor(), importlib.metadata.version("jaxlib"), *features]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
