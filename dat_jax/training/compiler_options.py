"""Options of the XLA compiler, which differ between the versions of jax that are supported."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp


def known_options(options: Mapping[str, object]) -> dict[str, object] | None:
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
