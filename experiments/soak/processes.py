"""Start runs by their command line, as one process or several on this machine."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 8  # virtual devices of all processes together


def start(
    config: str,
    workdir: pathlib.Path | str,
    *,
    values: dict[str, object],
    processes: int = 1,
    devices: int = DEVICES,
    xla_flags: str = "",
    folders: Sequence[pathlib.Path] | None = None,
    module: str = "dat_jax.main",
    flags: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> list[subprocess.Popen]:
    """Start the processes of a run on virtual CPU devices. Each has its output as one text stream.

    Args:
      config: Configuration, as passed to ``--config``.
      workdir: Work directory of the run.
      values: Values of keys of the configuration.
      processes: Number of processes, which connect through a free port of this machine.
      devices: Number of devices of all processes together.
      xla_flags: Further XLA flags.
      folders: Working folder of each process, which also gets its temporary files; the root of the repository by default.
      module: Module that is run.
      flags: Further flags of it.
      variables: Further environment variables.
    """
    with socket.socket() as free_socket:
        free_socket.bind(("localhost", 0))
        port = free_socket.getsockname()[1]
    xla_flags += f" --xla_force_host_platform_device_count={devices // processes}"
    environment = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    environment |= variables or {}
    if folders:
        config, environment = str(ROOT / config), environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-u", "-m", module, f"--config={config}", f"--workdir={workdir}"]
    command += [*(f"--config.{key}={value}" for key, value in values.items()), *flags]
    if processes > 1:
        command += [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            [*command, *([f"--process_id={index}"] if processes > 1 else [])],
            cwd=folders[index] if folders else ROOT,
            env=environment | ({"TMPDIR": str(folders[index])} if folders else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def finish(running: list[subprocess.Popen], *, seconds: float) -> list[str]:
    """Wait for processes and return their outputs.

    Raises:
      RuntimeError: A process exited with a status other than 0. The message has the outputs.
      subprocess.TimeoutExpired: A process did not exit in time.
    """
    try:
        printed = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    statuses = [process.returncode for process in running]
    if any(statuses):
        raise RuntimeError(f"exited with status {statuses}:\n" + "\n".join(printed))
    return printed
