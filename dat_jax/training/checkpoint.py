"""Checkpoints of a run: state, data position and a digest of every array. Exports: weights alone, and what they are of.

The only file that imports orbax.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from dat_jax.errors import UserError

_WAY_OUT = "Without that folder the run goes on from the other checkpoint, if there is one beside it."


class Checkpoints:
    """Checkpoints in a folder: the newest and the best by a metric are kept.

    Use as a context manager: leaving it waits until what was saved is on disk.

    Args:
      directory: made if missing.
      metric: name of the metric, larger is better.
      read_only: for reading beside a run that writes: makes, saves and cleans up nothing.

    Raises:
      UserError: the folder cannot be written, or holds a step that is not a complete checkpoint.
    """

    def __init__(self, directory: pathlib.Path, *, metric: str, read_only: bool = False):
        def score(metrics):
            return metrics[metric]

        # max_to_keep with best_fn would delete the newest checkpoint, so what stays is said by policies.
        keep = policies.AnyPreservationPolicy(
            [policies.LatestN(n=1), policies.BestN(get_metric_fn=score, reverse=False, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=score,
            best_mode="max",
            preservation_policy=None if read_only else keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._directory = directory
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        try:
            if not read_only:
                _refuse_incomplete_steps(directory)
            self._manager = ocp.CheckpointManager(directory.absolute(), item_handlers=handlers, options=options)
        except OSError as error:
            raise UserError(f"The checkpoints in {directory} cannot be opened: {error.strerror}.") from error
        self._digests = jax.jit(compute_digests)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def save(self, state, *, data_position: dict[str, int], metrics: dict[str, float]) -> None:
        """Saves the state at its own step. Returns before all is on disk.

        Raises:
          UserError: the checkpoint was not taken, because a later step is there already.
        """
        step = int(state.step)
        meta = {"data_position": data_position, "digests": _named(self._digests(state))}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        if not self._manager.save(step, args=args, metrics=metrics):
            raise UserError(f"Step {step} was not saved: {self._directory} holds a later step.")

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self._complete_steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the best metric, or None."""
        steps = self._complete_steps()
        best = self._manager.best_step()
        return best if best in steps else max(steps, default=None)

    def restore(self, step: int, abstract_state) -> tuple[Any, dict[str, int]]:
        """The state and data position of a step.

        Args:
          step: one of the saved.
          abstract_state: ShapeDtypeStructs with shardings, which say where the arrays go.

        Raises:
          UserError: the checkpoint is of another model, or damaged; the arrays are named.
        """
        where = self._directory / str(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        try:
            self._check_structure(step, abstract_state)
            restored = self._manager.restore(step, args=args)
            state, meta = restored["state"], restored["meta"]
            saved, position = meta["digests"], meta["data_position"]
        except UserError:
            raise
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).split(" [tensorstore_spec")[0]
            raise UserError(f"The checkpoint {where} cannot be read: {reason}. {_WAY_OUT}") from error
        digests = _named(self._digests(state))
        damaged = [name for name, digest in saved.items() if digests.get(name) != digest]
        if damaged:
            raise UserError(
                f"The checkpoint {where} is damaged: {', '.join(damaged)} differ from what was saved. {_WAY_OUT}"
            )
        return state, position

    def _complete_steps(self) -> list[int]:
        """Steps with both items, on disk. An empty folder with a number for a name is none."""
        self._manager.wait_until_finished()
        return [step for step in self._manager.all_steps() if _is_complete(self._directory / str(step))]

    def _check_structure(self, step, abstract_state):
        saved = self._manager.item_metadata(step)["state"]
        saved = _shapes(saved.tree if hasattr(saved, "tree") else saved)
        wanted = _shapes(abstract_state)
        differing = [
            f"{name} is {saved.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"The checkpoint {self._directory / str(step)} is of another model or optimizer: "
                f"{'; '.join(differing[:3])}{more}. Take another workdir, or the configuration it was trained with."
            )


def _is_complete(path: pathlib.Path) -> bool:
    return all((path / item).is_dir() for item in ("state", "meta"))


def _refuse_incomplete_steps(directory: pathlib.Path) -> None:
    """Orbax takes any folder with a number for a checkpoint, and saves nothing before that step."""
    for path in sorted(directory.glob("*")):
        if path.name.isdigit() and not _is_complete(path):
            raise UserError(f"{path} is not a complete checkpoint and would hide others: move it away or delete it.")


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


def read_best_params(directory: str | os.PathLike, *, metric: str) -> tuple[dict[str, Any], int]:
    """The weights that the best checkpoint is evaluated with: the averaged ones where there are any.

    Args:
      directory: of the checkpoints. It is only read, and the optimizer's arrays in it are not.
      metric: name of the metric, larger is better.

    Returns:
      Parameters as nested dictionaries of numpy arrays, and the step they are of.

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
        saved = {name: digest for name, digest in saved.items() if name.startswith(f"{group}/")}
        params = _read_arrays(where / "state", names=saved, partial=True)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"The checkpoint {where} cannot be read: {_reason(error)}.") from error
    digests = _named(jax.jit(compute_digests)(params))
    damaged = [name for name, digest in saved.items() if digests.get(name) != digest]
    if damaged:
        raise UserError(f"The checkpoint {where} is damaged: {', '.join(damaged)} differ from what was saved.")
    return params[group], step


def save_export(directory: str | os.PathLike, *, params: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """Writes weights and what describes them into a new folder, which appears when it is whole.

    It holds params/, the arrays, and model.json: the description, and under "arrays" shape, dtype and checksum of every
    array by name, and under "checksum" that of all.

    Args:
      directory: must not exist.
      params: nested dictionaries of arrays; they may be on devices.
      description: what JSON can hold.

    Returns:
      ``checksum`` of the parameters.

    Raises:
      UserError: the folder exists already, or cannot be written.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists already and nothing is overwritten; name another folder.")
    arrays = {name: np.asarray(array) for name, array in flax.traverse_util.flatten_dict(params, sep="/").items()}
    records = {
        name: {"shape": array.shape, "dtype": array.dtype.name, "checksum": checksum({name: array})}
        for name, array in sorted(arrays.items())
    }
    manifest = {**description, "checksum": checksum(arrays), "arrays": records}
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        with _exporter() as writer:
            tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
            writer.save((unfinished / "params").absolute(), args=ocp.args.PyTreeSave(tree))
        (unfinished / "model.json").write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(directory)
    except (OSError, ValueError) as error:  # a full disk is a ValueError of tensorstore
        raise UserError(f"{directory} cannot be written: {_reason(error)}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest["checksum"]


def load_export(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ``save_export`` wrote.

    Returns:
      Parameters as nested dictionaries of numpy arrays, and the description, with "checksum" of all parameters.

    Raises:
      UserError: it is no export, or damaged; the arrays are named.
    """
    directory = pathlib.Path(directory)
    records = {}
    try:
        manifest = json.loads((directory / "model.json").read_text())
        records, wanted = manifest.pop("arrays"), manifest["checksum"]
        saved = {name: record["checksum"] for name, record in records.items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} is no export, or its model.json is damaged: {_reason(error)}.") from error
    try:
        params = _read_arrays(directory / "params", names=saved)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        # The message has the path of the array that could not be read: a folder by its name, with dots.
        named = [name for name in saved if re.search(rf"/params/{re.escape(name.replace('/', '.'))}[/.]", str(error))]
        what = f"{', '.join(named)} cannot be read" if named else _reason(error)
        raise UserError(f"The export {directory} is damaged: {what}.") from error
    arrays = flax.traverse_util.flatten_dict(params, sep="/")
    damaged = [name for name in saved if name not in arrays or checksum({name: arrays[name]}) != saved[name]]
    if damaged:
        raise UserError(f"The export {directory} is damaged: {', '.join(damaged)} differ from what was saved.")
    if checksum(arrays) != wanted:
        raise UserError(f"The export {directory} is damaged: its arrays together are not those that were saved.")
    return params, manifest


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes in the order of the names, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype.name}\n".encode())
        digest.update(np.asarray(array, order="C").reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _exporter():
    # One folder an array, so that a damaged one is known by its name.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))


def _read_arrays(directory: pathlib.Path, *, names, partial: bool = False) -> dict[str, Any]:
    """Arrays by name on the host, as nested dictionaries. ``partial`` leaves others that are there alone."""
    tree = flax.traverse_util.unflatten_dict({name: np.empty(0) for name in names}, sep="/")
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with _exporter() as reader:
        return reader.restore(
            directory.absolute(), args=ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=partial)
        )


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return text.split(" [tensorstore_spec")[0].rstrip(".")
