"""Checkpoints of a run: state, data position and a digest of every array. The only file that imports orbax."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
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
