"""Stand-ins for the programs that the recipes of docs/launch call, and for the hosts of a TPU slice."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

from tests.helpers.documents import ROOT

LAUNCH = ROOT / "docs" / "launch"
# Commands of documents that tests/test_launch.py executes.
LAUNCH_PROGRAMS = r"(docs/launch/\w+\.sh|docker|gcloud|kubectl|sbatch|xpk) "
_RECORD = 'for word in "$@"; do printf "%s\\0" "$word"; done >> {calls}; echo >> {calls}\n'
# Runs a command as `gcloud compute tpus tpu-vm ssh --worker=WORKER --command=COMMAND` does, on each host with its own home.
_GCLOUD = """
for word in "$@"; do
  case $word in
  --worker=all) hosts="{hosts}/0 {hosts}/1" ;;
  --worker=*) hosts="{hosts}/${{word#--worker=}}" ;;
  --command=*) command=${{word#--command=}} ;;
  esac
done
if [[ $4 == ssh ]]; then
  for host in $hosts; do (cd "$host" && HOME=$host bash -c "$command"); done
fi
"""
# In place of the Python of a host: runs until SIGTERM, or ends with the first of the statuses that are left in a file.
_PYTHON = """
trap 'touch "$HOME/saved"; exit 0' TERM
printf "%s\\n" $$ >> "$HOME/processes"
if [[ -s $HOME/statuses ]]; then
  status=$(head --lines=1 "$HOME/statuses")
  sed --in-place 1d "$HOME/statuses"
  exit "$status"
fi
while :; do sleep 0.05; done
"""


class Machines:
    """A folder of stand-ins that come first in PATH, and two hosts of a TPU slice as folders.

    Args:
      root: an empty folder.
    """

    def __init__(self, root: pathlib.Path):
        self._root = root
        self._programs = root / "programs"
        self._programs.mkdir()
        self.hosts = [root / "hosts" / str(index) for index in range(2)]
        for host in self.hosts:
            shutil.copytree(LAUNCH, host / "dat_jax" / "docs" / "launch")
            python = host / "dat_jax" / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True)
            _write(python, _RECORD.format(calls='"$HOME/python.calls"') + _PYTHON)
        self.add("gcloud", _GCLOUD.format(hosts=root / "hosts"))

    def add(self, program: str, body: str = "") -> None:
        """Add a program that records its arguments and then runs a script of bash."""
        _write(self._programs / program, _RECORD.format(calls=self._root / f"{program}.calls") + body)

    def calls(self, program: str, *, host: pathlib.Path | None = None) -> list[list[str]]:
        """Arguments of each call of a program so far."""
        path = (host or self._root) / f"{program}.calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split("\0")[:-1] for line in lines]

    def run(self, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run a script of docs/launch."""
        return self.run_command(["bash", str(LAUNCH / name), *arguments], **variables)

    def run_command(self, command: list[str], *, cwd: pathlib.Path = ROOT, **options) -> subprocess.CompletedProcess:
        """Run a command; options in capitals are variables of its environment."""
        variables = {key: options.pop(key) for key in list(options) if key.isupper()}
        environment = {**os.environ, "PATH": f"{self._programs}:{os.environ['PATH']}", **variables}
        options = dict(capture_output=True, text=True) | options
        return subprocess.run(command, env=environment, cwd=cwd, timeout=60, check=False, **options)

    def processes(self, host: pathlib.Path) -> list[int]:
        """Process ids of the runs of a host so far."""
        path = host / "processes"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def end_all(self) -> None:
        """End what tests have left running: the loop of each host with its command, and commands without it."""
        for host in self.hosts:
            for kill in (os.killpg, os.kill):  # its process group, or itself if it has none yet
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    kill(int((host / "dat_jax.pid").read_text()), signal.SIGKILL)
            for pid in self.processes(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _write(path: pathlib.Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)


def wait_until(condition) -> None:
    """Wait until a function returns true, at most a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("The condition did not become true within a minute.")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and not been waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
