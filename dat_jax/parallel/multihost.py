"""Several processes as one run: how they find each other, and how they agree on what each of them found."""

import os
from collections.abc import Mapping

import jax
import numpy as np

from dat_jax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TIMEOUT_SECONDS = 300  # to wait for the other processes when they start


def start(
    *,
    mode: str = "auto",
    coordinator_address: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the processes of a run, before anything else of jax is used; of a run of one process it does nothing.

    The address, number and index are those given, or those of the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or what jax finds on a TPU pod, under SLURM, Open MPI or in a Kubernetes JobSet.

    Args:
      mode: "auto" joins where one of these says that there are several processes, "on" leaves it to jax to find them, as on
        the virtual machines of a TPU pod, where no variable says so, and "off" is one process, whatever the variables say.
      coordinator_address: HOST:PORT of process 0.
      num_processes, process_id: how many, and which this is, from 0.
      environment: of variables.

    Raises:
      UserError: some but not all of the three are known, one is impossible, or the others did not come.
    """
    if mode == "off":
        return
    given = dict(zip(_VARIABLES, (coordinator_address or None, num_processes, process_id), strict=True))
    known = {name: environment.get(name) if value is None else value for name, value in given.items()}
    settings = {}
    if any(value is not None for value in known.values()):
        missing = [name for name, value in known.items() if value is None]
        if missing:
            raise UserError(
                f"A run of several processes wants {', '.join(_VARIABLES)} or the flags of these names; not given: "
                f"{', '.join(missing)}."
            )
        address, *numbers = known.values()
        if not all(str(number).isdigit() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise UserError(
                f"A run of several processes wants their number and an index below it, got {numbers[0]} and {numbers[1]}."
            )
        settings = dict(coordinator_address=address, num_processes=int(numbers[0]), process_id=int(numbers[1]))
        if settings["num_processes"] == 1:
            return
    elif mode == "auto" and not in_a_cluster(environment):
        return
    # The run has its own way to stop at the same step everywhere; jax's would take the signal away from it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**settings, initialization_timeout=_TIMEOUT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"The processes of the run did not find each other: {str(error).splitlines()[0]}") from error


def in_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler says that this is one process of several."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    counts = (
        environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    )
    jobset = "JOBSET_NAME" in environment and "JOB_COMPLETION_INDEX" in environment
    return len(hosts) > 1 or any(count.isdigit() and int(count) > 1 for count in counts) or jobset


def everywhere(value: bool) -> bool:
    """Whether it is true in all processes, which all have to ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def wait(name: str) -> None:
    """Until all processes are at the place of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def check_started() -> None:
    """Raises a UserError where devices of several processes are seen by processes that do not know each other."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"These are devices of {jax.process_count()} processes: start all of them with --distributed=on."
        )
