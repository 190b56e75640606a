"""Runs started by their command line, as one process or several on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 8  # virtual ones, of all processes together


def start(
    config: str,
    workdir: pathlib.Path,
    *,
    values: dict[str, object],
    processes: int = 1,
    devices: int = DEVICES,
    xla_flags: str = "",
) -> list[subprocess.Popen]:
    """The processes of a run on virtual CPU devices, with what they print as one text stream each.

    Args:
      config: file of configs/, from the project's root.
      workdir: of the run.
      values: of keys of the configuration.
      processes: how many; they meet at a free port of this machine.
      devices: of all processes together.
      xla_flags: more of them.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    flags = f"{xla_flags} --xla_force_host_platform_device_count={devices // processes}"
    command = [sys.executable, "-u", "-m", "dat_jax.main", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in values.items()]
    if processes > 1:
        command += [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            [*command, *([f"--process_id={index}"] if processes > 1 else [])],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def finish(running: list[subprocess.Popen], *, seconds: float) -> list[str]:
    """What they printed.

    Raises:
      RuntimeError: one ended with another status than 0, or did not end in time; with what was printed.
    """
    try:
        printed = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    statuses = [process.returncode for process in running]
    if any(statuses):
        raise RuntimeError(f"ended with {statuses}:\n" + "\n".join(printed))
    return printed
