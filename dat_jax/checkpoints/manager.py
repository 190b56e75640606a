"""Checkpoints of a run: state, data position and a digest of every array. Arrays by name, for exports.

The only file that imports orbax.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from dat_jax.checkpoints.integrity import MANIFEST, DamagedError, Listing, check_files
from dat_jax.errors import UserError, name_some
from dat_jax.parallel import multihost as distributed

logger = logging.getLogger(__name__)
SET_ASIDE = "set_aside"  # folder beside the checkpoints, for what is none any more
_UNREADABLE = (ValueError, OSError, KeyError, TypeError, RuntimeError)  # what orbax and tensorstore raise for damage


class Checkpoints:
    """Checkpoints in a folder: the newest ones, and the best one by a metric, are kept.

    A checkpoint appears when it is whole, and counts once its files are listed with their digests. One that is found
    damaged, and what a killed run left unfinished, is moved to set_aside/ beside the others and never deleted. What cannot
    be written is said, and the run may go on.

    Use as a context manager: leaving it waits until what was saved is on disk.

    Args:
      directory: made if missing.
      metric: name of the metric, larger is better.
      keep: how many of the newest stay.
      read_only: for reading beside a run that writes: makes, saves and moves nothing.

    Raises:
      UserError: the folder cannot be opened.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        metric: str,
        keep: int = 2,
        read_only: bool = False,
    ):
        self.directory = directory
        self._metric, self._keep, self._read_only = metric, keep, read_only
        self._digests = jax.jit(compute_digests)
        self._saving, self._listing = None, None  # the step that is being written, and who lists its files
        try:
            if not read_only:
                self._set_aside_unfinished()
            self._manager = self._open()
        except OSError as error:
            raise UserError(f"The checkpoints in {directory} cannot be opened: {error.strerror}.") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def save(self, state, *, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> bool:
        """Saves the state at its own step. Returns before all is on disk.

        What goes wrong, now or with what was begun before, is said and not raised.

        Args:
          state: with a ``step``.
          metadata: what JSON can hold.
          metrics: of an evaluation of this state, if there was one.

        Returns:
          Whether it was begun.

        Raises:
          UserError: a later step is there already.
        """
        self.wait()
        step = int(state.step)
        if self._manager is None and not self._reopen():
            self._say_not_saved(step, "the folder cannot be opened")
            return False
        meta = {"metadata": metadata, "digests": _named(self._digests(state)), "metrics": metrics or {}}
        meta["checksum"] = _json_checksum(meta)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            begun = self._manager.save(step, args=args, metrics=metrics)
        except _UNREADABLE as error:
            self._say_not_saved(step, first_reason(error))
            self._reopen()
            return False
        if not begun:
            raise UserError(f"Step {step} was not saved: {self.directory} holds a later step.")
        self._saving = step
        if jax.process_index() == 0:
            self._listing = Listing(self.directory / str(step))
        return True

    def wait(self) -> None:
        """Until what was begun is on disk, or it was said why it is not."""
        step, self._saving = self._saving, None
        if step is None:
            return
        listing, self._listing = self._listing, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if listing is not None:
                listing.finish()
        except _UNREADABLE as error:
            if listing is not None:
                listing.give_up()
            self._say_not_saved(step, first_reason(error))
            self._reopen()
        distributed.wait(f"step {step} saved")

    def steps(self) -> list[int]:
        """Those that are whole, by their folders; in order."""
        self.wait()
        return _complete_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the best metric, the newest of equals and where none was evaluated, or None."""
        steps = self.steps()
        scores = {step: (_read_metrics(self.directory / str(step)) or {}).get(self._metric) for step in steps}
        scored = [step for step in steps if scores[step] is not None]
        return max(scored, key=lambda step: (scores[step], step)) if scored else max(steps, default=None)

    def restore(self, step: int, abstract_state) -> tuple[Any, dict[str, Any]]:
        """The state of a step, and the metadata saved with it.

        Args:
          step: one of the saved.
          abstract_state: ShapeDtypeStructs with shardings, which say where the arrays go.

        Raises:
          DamagedError: it cannot be read, or its numbers are not those that were saved; the arrays are named.
          UserError: it is of another model.
        """
        where = self.directory / str(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        try:
            check_files(where)
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            if "digests" in meta and "checksum" not in meta:
                raise UserError(f"The checkpoint {where} was written by an earlier version, which had another format.")
            if meta.pop("checksum") != _json_checksum(meta) or meta["metrics"] != _read_metrics(where):
                raise DamagedError(f"The checkpoint {where} is damaged: meta differs from what was saved.")
            self._check_structure(step, abstract_state, set(meta["digests"]))
            state = self._manager.restore(step, args=args)["state"]
            digests = _named(self._digests(state))
        except UserError:
            raise
        except _UNREADABLE as error:
            raise DamagedError(f"The checkpoint {where} cannot be read: {first_reason(error)}.") from error
        damaged = [name for name, digest in meta["digests"].items() if digests.get(name) != digest]
        if damaged:
            raise DamagedError(f"The checkpoint {where} is damaged: {name_some(damaged)} differ from what was saved.")
        return state, meta["metadata"]

    def restore_newest(self, abstract_state, *, first: int | None = None) -> tuple[Any, dict[str, Any]] | None:
        """``restore`` of the newest whole checkpoint, or of ``first`` if that is whole; damaged ones are set aside.

        Returns:
          State and metadata, or None where no checkpoint is left.
        """
        while steps := self.steps():
            step = first if first in steps else steps[-1]
            found, error = None, None
            try:
                found = self.restore(step, abstract_state)
            except DamagedError as caught:
                error = caught
            if distributed.everywhere(found is not None):
                return found
            del found
            left = [other for other in steps if other != step]
            way_out = f"that of step {left[-1]} is used instead" if left else "there is no other"
            why = error or f"The checkpoint {self.directory / str(step)} is damaged for another process."
            place = self._set_aside(self.directory / str(step))
            logger.warning(f"{str(why).rstrip('.')}. It was moved to {place}, and {way_out}.")
            self._reopen()
        return None

    def _open(self):
        def score(metrics):
            return metrics[self._metric]

        # max_to_keep with best_fn would delete the newest checkpoint, so what stays is said by policies.
        best = policies.BestN(get_metric_fn=score, reverse=False, n=1, keep_checkpoints_without_metrics=False)
        keep = policies.AnyPreservationPolicy([policies.LatestN(n=self._keep), best])
        options = ocp.CheckpointManagerOptions(
            best_fn=score,
            best_mode="max",
            preservation_policy=None if self._read_only else keep,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            create=not self._read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        with _quiet_logger() if self._read_only else contextlib.nullcontext():
            return ocp.CheckpointManager(self.directory.absolute(), item_handlers=handlers, options=options)

    def _reopen(self) -> bool:
        """Anew, without what is left of a save that failed."""
        old, self._manager = self._manager, None
        with contextlib.suppress(*_UNREADABLE):
            if old is not None:
                old.close()
        with contextlib.suppress(*_UNREADABLE):
            self._manager = self._open()
        return self._manager is not None

    def _say_not_saved(self, step, reason):
        kept = max(_complete_steps(self.directory), default=None)
        kept = "There is no checkpoint yet" if kept is None else f"The checkpoint of step {kept} is untouched"
        logger.warning(f"Step {step} could not be saved: {reason}. {kept}, and the next one will be tried.")

    def _set_aside_unfinished(self):
        """Folders with a number that are no checkpoints, which orbax would take for some, and saves that were cut off."""
        complete = {str(step) for step in _complete_steps(self.directory)}
        for path in sorted(self.directory.glob("*")):
            number, _, rest = path.name.partition(".")
            if number.isdigit() and (rest or number not in complete):
                what = "is an unfinished save" if rest else "is not a complete checkpoint"
                logger.warning(f"{path} {what} and was moved to {self._set_aside(path)}.")
        distributed.wait("checkpoints set aside")

    def _set_aside(self, path: pathlib.Path) -> pathlib.Path:
        """Moved by the first process; where to."""
        folder = path.parent / SET_ASIDE
        place = next(
            place
            for count in itertools.count(1)
            if not (place := folder / (path.name if count == 1 else f"{path.name}-{count}")).exists()
        )
        distributed.wait(f"place for {path.name}")
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            path.rename(place)
        distributed.wait(f"{path.name} set aside")
        return place

    def _check_structure(self, step, abstract_state, saved_names):
        saved = self._manager.item_metadata(step)["state"]
        saved = _shapes(saved.tree if hasattr(saved, "tree") else saved)
        if set(saved) != saved_names:  # what is there is not even what was saved
            raise DamagedError(
                f"The checkpoint {self.directory / str(step)} is damaged: it lacks "
                f"{name_some(sorted(saved_names - set(saved))) or 'nothing, and has more than was saved'}."
            )
        wanted = _shapes(abstract_state)
        differing = [
            f"{name} is {saved.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"The checkpoint {self.directory / str(step)} is of another model or optimizer: "
                f"{'; '.join(differing[:3])}{more}. Take another workdir, or the configuration it was trained with."
            )


@contextlib.contextmanager
def _quiet_logger():
    """Orbax warns of what was asked for: that nothing but reading is possible, that one process has written."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _complete_steps(directory: pathlib.Path) -> list[int]:
    """Folders with a number for a name that hold what a checkpoint has. An empty one is none."""
    items = ("state", "meta", MANIFEST)
    found = [
        path for path in directory.glob("*") if path.name.isdigit() and all((path / item).exists() for item in items)
    ]
    return sorted(int(path.name) for path in found if _read_metrics(path) is not None)


def _read_metrics(path: pathlib.Path) -> dict[str, float] | None:
    """Of a checkpoint; {} where it was not evaluated, None where they are damaged."""
    try:
        if not (path / "metrics").exists():
            return {}
        metrics = json.loads((path / "metrics" / "metrics").read_text())
        return metrics if isinstance(metrics, dict) and all(map(_is_number, metrics.values())) else None
    except (OSError, ValueError):
        return None


def _is_number(value) -> bool:
    return isinstance(value, int | float)


def _json_checksum(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def compute_digests(tree):
    """A uint32 for every array, that changes if any one of its bits does (arrays of 2 or 4 bytes a number; others are
    taken as float32).

    The bits of every element, as unsigned integers, times an odd number that depends on the place, summed modulo 2^32.
    Computed where the arrays are, and independent of how they are split.
    """

    def digest(array):
        if array.dtype.itemsize not in (2, 4) or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = array.astype(jnp.float32)
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        return (bits * (place * jnp.uint32(2654435760) + jnp.uint32(1))).sum(dtype=jnp.uint32)

    return jax.tree.map(digest, tree)


def _path_name(path) -> str:
    """stages_0/proj/kernel: the same for attributes, dictionary keys and indices."""
    keys = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in path)
    return "/".join(str(key) for key in keys)


def _named(tree) -> dict[str, int]:
    return {_path_name(path): int(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {_path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def read_best_variables(directory: str | os.PathLike, *, metric: str) -> tuple[dict[str, Any], int]:
    """What the best checkpoint is evaluated with: its weights, the averaged ones where there are any, and model state.

    Args:
      directory: of the checkpoints. It is only read, and the optimizer's arrays in it are not.
      metric: name of the metric, larger is better.

    Returns:
      {"params", and the collections of the model state} as nested dictionaries of numpy arrays, and the step they are of.

    Raises:
      UserError: there is no complete checkpoint, or it is damaged; the arrays are named.
    """
    directory = pathlib.Path(directory)
    with Checkpoints(directory, metric=metric, read_only=True) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise UserError(f"There is no complete checkpoint in {directory}.")
    where = directory / str(step)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            saved = reader.restore((where / "meta").absolute())["digests"]
        group = "ema_params" if any(name.startswith("ema_params/") for name in saved) else "params"
        wanted = (f"{group}/", "model_state/")
        saved = {name: digest for name, digest in saved.items() if name.startswith(wanted)}
        arrays = read_arrays(where / "state", names=saved, partial=True)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"The checkpoint {where} cannot be read: {first_reason(error)}.") from error
    digests = _named(jax.jit(compute_digests)(arrays))
    damaged = [name for name, digest in saved.items() if digests.get(name) != digest]
    if damaged:
        raise UserError(f"The checkpoint {where} is damaged: {', '.join(damaged)} differ from what was saved.")
    return {"params": arrays[group], **arrays.get("model_state", {})}, step


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes in the order of the names, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype.name}\n".encode())
        digest.update(np.asarray(array, order="C").reshape(-1).view(np.uint8))
    return digest.hexdigest()


@contextlib.contextmanager
def _interrupted_afterwards():
    """Ctrl-C within is Ctrl-C at the end: threads of Orbax would go on writing into a folder that is being removed."""
    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    asked = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if asked:
        signal.raise_signal(signal.SIGINT)


def write_arrays(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name into a new folder.

    Raises:
      OSError: it cannot be written.
    """
    tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
    try:
        with _quiet_logger(), _exporter() as writer, _interrupted_afterwards():
            writer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree))
    except ValueError as error:  # what a full disk is to tensorstore
        raise OSError(first_reason(error)) from error


def _exporter():
    # One folder an array, so that a damaged one is known by its name.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))


def read_arrays(directory: pathlib.Path, *, names, partial: bool = False) -> dict[str, Any]:
    """Arrays by name on the host, as nested dictionaries. ``partial`` leaves others that are there alone."""
    tree = flax.traverse_util.unflatten_dict({name: np.empty(0) for name in names}, sep="/")
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with _exporter() as reader:
        return reader.restore(
            directory.absolute(), args=ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=partial)
        )


def first_reason(error: Exception) -> str:
    """What an error of Orbax says, without the specifications that follow."""
    text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return text.split(" [tensorstore_spec")[0].rstrip(".")
