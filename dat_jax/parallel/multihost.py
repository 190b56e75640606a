"""Runs of several processes: how the processes connect, and how they synchronize and agree."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dat_jax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TIMEOUT_SECONDS = 300  # for all processes to connect


def start(
    *,
    mode: str = "auto",
    coordinator_address: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Connect the processes of a run. Call it before any other function of jax. A single process returns at once.

    The address, number and index come from the arguments, or from the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Without any of them, jax detects a TPU pod, SLURM, Open MPI and a Kubernetes JobSet.

    Args:
      mode: "auto" connects if the arguments, the variables or a scheduler specify several processes. "on" always connects,
        and lets jax detect the processes, as on the virtual machines of a TPU pod, where no variable is set. "off" never
        connects.
      coordinator_address: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      environment: environment variables.

    Raises:
      UserError: only some of the three values are known, a value is invalid, or the other processes did not connect.
    """
    if mode == "off":
        return
    arguments = dict(zip(_VARIABLES, (coordinator_address or None, num_processes, process_id), strict=True))
    values = {name: environment.get(name) if value is None else value for name, value in arguments.items()}
    options: dict[str, Any] = {}  # arguments of several types
    if any(value is not None for value in values.values()):
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise UserError(
                f"A run of several processes needs {', '.join(_VARIABLES)}, or the flags of the same names; not given: "
                f"{', '.join(missing)}."
            )
        address, *numbers = map(str, values.values())
        if not all(number.isdigit() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise UserError(
                "A run of several processes needs their number and an index below it, got "
                f"{numbers[0]} and {numbers[1]}."
            )
        options = dict(coordinator_address=address, num_processes=int(numbers[0]), process_id=int(numbers[1]))
        if options["num_processes"] == 1:
            return
    elif mode == "auto" and not in_a_cluster(environment):
        return
    # training.preemption handles SIGTERM, and stops all processes at the same step; jax's service would take the signal.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options, initialization_timeout=_TIMEOUT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"The processes of the run did not connect: {str(error).splitlines()[0]}") from error


def in_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the variables of a scheduler show that this is one of several processes."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    counts = (
        environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    )
    jobset = "JOBSET_NAME" in environment and "JOB_COMPLETION_INDEX" in environment
    return len(hosts) > 1 or any(count.isdigit() and int(count) > 1 for count in counts) or jobset


def everywhere(value: bool) -> bool:
    """Whether ``value`` is true in all processes. All of them must call it."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def broadcast_text(text: str) -> str:
    """The text of process 0. All processes must call it, with texts of the same number of bytes."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    values = multihost_utils.broadcast_one_to_all(np.frombuffer(text.encode(), np.uint8))
    return bytes(np.asarray(values, np.uint8)).decode()


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order. All processes must call it."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array(len(encoded))))
    padded = np.zeros(max(*lengths, 1), np.uint8)
    padded[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def wait(name: str) -> None:
    """Wait until all processes have called this function with the same name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def check_started() -> None:
    """Check that the processes are connected if jax sees the devices of several ones.

    Raises:
      UserError: they are not connected.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"jax sees the devices of {jax.process_count()} processes that are not connected: start all of them with "
            "--distributed=on."
        )
