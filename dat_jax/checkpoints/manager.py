"""Checkpoints of a run: a thin layer over Orbax's CheckpointManager that detects damage and survives failed saves.

With the state it stores metadata and a fingerprint of every array, and afterwards the SHA-256 of every file.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from dat_jax.checkpoints.directory import (
    find_best_step,
    find_complete_steps,
    read_meta,
    read_metrics,
    set_aside,
    set_aside_incomplete,
)
from dat_jax.checkpoints.integrity import (
    DamagedError,
    ManifestWriter,
    check_digests,
    check_manifest,
    compute_fingerprints,
    hash_json,
    join_path,
    name_leaves,
)
from dat_jax.checkpoints.orbax_messages import ORBAX_ERRORS, describe_error, quiet_orbax
from dat_jax.errors import UserError
from dat_jax.parallel import multihost
from dat_jax.storage import Path, as_path, is_in_bucket, os_errors

logger = logging.getLogger(__name__)


class Checkpoints:
    """Checkpoints of a run in a directory: the most recent ones, and the best one by a metric.

    A checkpoint is written in the background and counts as complete once its files are listed in a manifest with their
    digests. A damaged checkpoint, and the remains of an interrupted save, are moved to set_aside/ in the directory and never
    deleted. Save failures are logged and training continues.

    Use as a context manager: leaving it waits until everything is written. In a run of several processes, all of them must
    call the same methods.

    Attributes:
      directory: the directory.

    Args:
      directory: the directory, created if missing.
      metric: name of the metric that ranks checkpoints; larger is better.
      keep: number of recent checkpoints to keep; the best one is always kept.
      read_only: creates, saves and moves nothing, so that the checkpoints of a run can be read while it writes them.

    Raises:
      UserError: the directory cannot be opened.
    """

    def __init__(self, directory: Path, *, metric: str, keep: int = 2, read_only: bool = False):
        self.directory = as_path(directory)
        self._metric, self._keep, self._read_only = metric, keep, read_only
        self._compute_fingerprints = jax.jit(compute_fingerprints)
        self._step_being_saved: int | None = None
        self._manifest_writer: ManifestWriter | None = None  # of the step being saved, in the first process
        try:
            with os_errors(self.directory):
                if not read_only:
                    set_aside_incomplete(self.directory)
                self._manager: ocp.CheckpointManager | None = self._open()
        except OSError as error:
            raise UserError(f"The checkpoints in {self.directory} cannot be opened: {error.strerror}.") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def save(self, state: Any, *, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> bool:
        """Start to save the state under its own step, after the save before it has finished.

        Failures, also those of the save before it, are logged as warnings.

        Args:
          state: tree of arrays with an attribute ``step``.
          metadata: values that JSON can store.
          metrics: metrics of an evaluation of this state, if there was one.

        Returns:
          Whether the save was started.

        Raises:
          UserError: the directory has a checkpoint of a later step.
        """
        self.wait()
        step = int(state.step)
        if self._manager is None and not self._reopen():
            self._log_failure(step, "the directory cannot be opened")
            return False
        meta = {"metadata": metadata, "digests": self._fingerprint(state), "metrics": metrics or {}}
        meta["checksum"] = hash_json(meta)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            with os_errors(self.directory):
                started = self._open_manager.save(step, args=args, metrics=metrics)
        except ORBAX_ERRORS as error:
            self._log_failure(step, describe_error(error))
            self._reopen()
            return False
        if not started:
            raise UserError(f"Step {step} was not saved: {self.directory} has a checkpoint of a later step.")
        self._step_being_saved = step
        if jax.process_index() == 0:
            self._manifest_writer = ManifestWriter(self._path(step))
        return True

    def wait(self) -> None:
        """Wait until the save in progress is on disk, or has failed, which is logged as a warning."""
        step, self._step_being_saved = self._step_being_saved, None
        if step is None:
            return
        manifest_writer, self._manifest_writer = self._manifest_writer, None
        try:
            with os_errors(self.directory):
                self._open_manager.wait_until_finished()
                self._open_manager.check_for_errors()
            if manifest_writer is not None:
                manifest_writer.finish()
        except ORBAX_ERRORS as error:
            if manifest_writer is not None:
                manifest_writer.cancel()
            self._log_failure(step, describe_error(error))
            self._reopen()
        multihost.wait(f"step {step} saved")

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in ascending order.

        Raises:
          UserError: the directory cannot be read.
        """
        self.wait()
        with self._reading():
            return find_complete_steps(self.directory)

    def latest_step(self) -> int | None:
        """The latest step with a complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step with the best metric, the latest one of equals, or None without a complete checkpoint.

        If no checkpoint was evaluated, it is the latest step.

        Raises:
          UserError: the directory cannot be read.
        """
        self.wait()
        with self._reading():
            return find_best_step(self.directory, self._metric)

    def restore(
        self, step: int, abstract_state: Any, *, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Restore the state of a step.

        Args:
          step: a step with a complete checkpoint.
          abstract_state: dataclass of ShapeDtypeStructs with shardings, which determine the devices of the arrays. Fields
            without arrays that were unknown when the checkpoint was written keep their values.
          check: function of the metadata, called before the arrays are compared and read. It raises a UserError if the
            checkpoint does not belong to the run.

        Returns:
          The state, and the metadata that was saved with it.

        Raises:
          DamagedError: the checkpoint cannot be read, or differs from what was written; the files or arrays are named.
          UserError: it has arrays of other names or shapes, or ``check`` raised it.
        """
        name = f"The checkpoint {self._path(step)}"
        try:
            check_manifest(self._path(step))
            meta = read_meta(self._path(step))
            saved = {"meta": meta.pop("checksum"), "metrics": meta["metrics"]}
            actual = {"meta": hash_json(meta), "metrics": read_metrics(self._path(step))}
            check_digests(name, saved=saved, actual=actual)
            if check is not None:
                check(meta["metadata"])
            saved = self._read_structure(step, meta["digests"].keys())
            fields = _select_fields(abstract_state, saved)
            self._check_structure(step, fields, saved)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(fields))
            with os_errors(self.directory):
                state = dataclasses.replace(abstract_state, **self._open_manager.restore(step, args=args)["state"])
            fingerprints = self._fingerprint(state)
        except UserError:
            raise
        except (*ORBAX_ERRORS, AttributeError) as error:
            raise DamagedError(f"{name} cannot be read: {describe_error(error)}.") from error
        check_digests(name, saved=meta["digests"], actual=fingerprints)
        return state, meta["metadata"]

    def restore_newest(
        self,
        abstract_state: Any,
        *,
        first: int | None = None,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[Any, dict[str, Any]] | None:
        """Restore the newest intact checkpoint. Damaged ones are set aside, and logged as warnings.

        Args:
          abstract_state: see ``restore``.
          first: step to try before the newest one.
          check: see ``restore``.

        Returns:
          The state and the metadata, or None if no checkpoint is left.

        Raises:
          UserError: see ``restore``.
        """
        while steps := self.steps():
            step = first if first in steps else steps[-1]
            restored, error = None, None
            try:
                restored = self.restore(step, abstract_state, check=check)
            except DamagedError as caught:
                error = caught
            if multihost.everywhere(restored is not None):
                return restored
            del restored  # its memory is needed for the next one
            others = [other for other in steps if other != step]
            fallback = (
                f"the checkpoint of step {others[-1]} is used instead" if others else "there is no other checkpoint"
            )
            reason = error or f"The checkpoint {self._path(step)} is damaged for another process."
            try:
                target = set_aside(self._path(step))
            except OSError as caught:
                raise UserError(f"{reason} It cannot be moved to another folder: {caught.strerror}.") from caught
            logger.warning("%s It was moved to %s; %s.", reason, target, fallback)
            self._reopen()
        return None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"The checkpoints in {self.directory} cannot be read: {error.strerror}.") from error

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    @staticmethod
    def _absolute(path: Path) -> Path:
        """Orbax takes absolute paths only, which those of buckets are."""
        return path if is_in_bucket(path) else path.absolute()

    def _fingerprint(self, state: Any) -> dict[str, int]:
        return {name: int(value) for name, value in name_leaves(self._compute_fingerprints(state)).items()}

    def _open(self) -> ocp.CheckpointManager:
        def get_metric(metrics):
            return metrics[self._metric]

        # With best_fn, max_to_keep would delete the newest checkpoint, so preservation policies select what is kept.
        best = policies.BestN(get_metric_fn=get_metric, reverse=False, n=1, keep_checkpoints_without_metrics=False)
        keep = policies.AnyPreservationPolicy([policies.LatestN(n=self._keep), best])
        options = ocp.CheckpointManagerOptions(
            best_fn=get_metric,
            best_mode="max",
            preservation_policy=None if self._read_only else keep,
            # In a bucket, Orbax would take set_aside/ for the remains of a save and delete it.
            cleanup_tmp_directories=not self._read_only and not is_in_bucket(self.directory),
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            create=not self._read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        with quiet_orbax() if self._read_only else contextlib.nullcontext():
            directory: Any = self._absolute(self.directory)
            return ocp.CheckpointManager(directory, item_handlers=handlers, options=options)

    @property
    def _open_manager(self) -> ocp.CheckpointManager:
        assert self._manager is not None, "the directory could not be opened again after a failed save"
        return self._manager

    def _reopen(self) -> bool:
        """Open the directory again, without the remains of a failed save. Returns whether that succeeded."""
        old, self._manager = self._manager, None
        with contextlib.suppress(*ORBAX_ERRORS), os_errors(self.directory):
            if old is not None:
                old.close()
        with contextlib.suppress(*ORBAX_ERRORS), os_errors(self.directory):
            self._manager = self._open()
        return self._manager is not None

    def _log_failure(self, step: int, reason: str) -> None:
        try:
            complete = find_complete_steps(self.directory)
            if step in complete:  # such as the removal of an old one
                logger.warning("Step %d is saved, but what follows a save has failed: %s.", step, reason)
                return
            latest = max(complete, default=None)
            rest = "There is no checkpoint yet" if latest is None else f"The checkpoint of step {latest} is untouched"
        except OSError:
            rest = "Earlier checkpoints are untouched"
        logger.warning("Step %d could not be saved: %s. %s, and the next save will be tried.", step, reason, rest)

    def _read_structure(self, step: int, names: Collection[str]) -> Mapping[str, Any]:
        """Return the fields of the saved state, with the shapes of their arrays.

        Raises:
          DamagedError: the saved arrays are not those with the names that were written.
        """
        # Not the manager's metadata: after a save to a bucket, Orbax 0.12 refuses it in all processes but the first.
        state: Any = self._absolute(self._path(step)) / "state"
        saved: Any = ocp.StandardCheckpointHandler().metadata(state)
        saved = saved.tree if hasattr(saved, "tree") else saved
        name = f"The checkpoint {self._path(step)}"
        check_digests(name, saved=dict.fromkeys(names, True), actual=dict.fromkeys(name_leaves(saved), True))
        return saved

    def _check_structure(self, step: int, fields: Mapping[str, Any], saved_fields: Mapping[str, Any]) -> None:
        """Raise a UserError if the fields of a state have arrays of other names or shapes than those that were saved."""
        saved, expected = _get_shapes(saved_fields), _get_shapes(fields)
        differences = [
            f"{key}: expected {expected.get(key, 'nothing')}, got {saved.get(key, 'nothing')}"
            for key in sorted(saved.keys() | expected.keys())
            if saved.get(key) != expected.get(key)
        ]
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(
                f"The checkpoint {self._path(step)} is of another model or optimizer: {'; '.join(differences[:3])}{more}. "
                "Choose another --workdir, or the configuration of the checkpoint."
            )


def _select_fields(state: Any, saved_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a state by name, without those that have no arrays and are missing in the checkpoint."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name in saved_fields or jax.tree.leaves(value)}


def _get_shapes(tree: Any) -> dict[str, tuple[int, ...] | str]:
    """Shapes by name. States without arrays are listed too, since Orbax restores them by their position."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))
    return {join_path(path): tuple(node.shape) if jax.tree.leaves(node) else "no arrays" for path, node in nodes}
