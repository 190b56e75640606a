"""Arrays by name, written to a folder and read from it with Orbax."""

import contextlib
import pathlib
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from dat_jax.checkpoints.orbax_messages import describe_error, quiet_orbax


def write_arrays(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a new folder, each into a folder of its own, so that a damaged one can be named.

    Args:
      directory: folder to create.
      arrays: name, with "/" between the levels of a tree -> array.

    Raises:
      OSError: the folder cannot be written.
    """
    try:
        with quiet_orbax(), _make_checkpointer() as checkpointer, _delayed_interrupt():
            checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(unflatten_dict(arrays, sep="/")))
    except ValueError as error:  # TensorStore's error for a full disk
        raise OSError(describe_error(error)) from error


def read_arrays(directory: pathlib.Path, *, names: Collection[str], partial: bool = False) -> dict[str, Any]:
    """Read arrays as nested dictionaries of numpy arrays.

    Args:
      directory: folder of ``write_arrays``, or the state of a checkpoint.
      names: names of the arrays, with "/" between the levels of the tree.
      partial: whether the folder may have more arrays, which are not read.

    Raises:
      Exception: one of ``ORBAX_ERRORS`` if an array is missing or cannot be read.
    """
    tree = unflatten_dict({name: np.empty(0) for name in names}, sep="/")
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=partial)
    with _make_checkpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), args=args)


def _make_checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))


@contextlib.contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Context that handles Ctrl-C at its end: Orbax's threads would continue to write into a folder that is being removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    interrupts = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if interrupts:
        signal.raise_signal(signal.SIGINT)
