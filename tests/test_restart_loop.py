"""docs/launch/restart.sh, which repeats a command until it ends with status 0, with a stand-in for the command."""

import contextlib
import os
import re
import signal
import subprocess

import pytest

from tests.helpers.documents import ROOT
from tests.helpers.launch_stand_ins import LAUNCH, wait_until

pytestmark = pytest.mark.slow


def run_loop(machines, statuses, **variables):
    """restart.sh with a program that ends with these statuses, one after the other: its status, and the number of runs."""
    for host in machines.hosts[:1]:
        (host / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        command = ["bash", "docs/launch/restart.sh", ".venv/bin/python", "-m", "a b", "(c)"]
        result = machines.run_command(command, cwd=host / "dat_jax", HOME=str(host), **variables)
        runs = machines.calls("python", host=host)
        assert runs == [["-m", "a b", "(c)"]] * len(runs)
        return result, len(runs)


def test_a_crashed_command_is_restarted_until_it_ends_with_status_0(machines):
    result, runs = run_loop(machines, [1, 139, 0, 1], PAUSE_SECONDS="0")
    assert (result.returncode, runs) == (0, 3)
    assert "ended with status 139; restart 2 of 10 in 0 seconds" in result.stderr


def test_the_number_of_restarts_is_limited(machines):
    result, runs = run_loop(machines, [1, 1, 7, 1], PAUSE_SECONDS="0", MAX_RESTARTS="2")
    assert (result.returncode, runs) == (7, 3)


def test_a_loop_without_a_command_or_with_wrong_numbers_does_not_start(machines):
    for variables in (
        {"MAX_RESTARTS": "08"},
        {"MAX_RESTARTS": "10x"},
        {"PAUSE_SECONDS": "-1"},
        {"PAUSE_SECONDS": "1 1"},
    ):
        result, runs = run_loop(machines, [1, 1], **variables)
        assert (result.returncode, runs) == (2, 0)
        assert f"({next(iter(variables.values()))})" in result.stderr
    assert machines.run("restart.sh").returncode == 2


def test_ctrl_c_reaches_the_command_once(machines):
    """A terminal sends the signal to the whole process group of the script. A second signal would end a run without saving."""
    count = machines.hosts[0] / "dat_jax" / ".venv" / "bin" / "python"
    text = count.read_text()
    count.write_text(text.replace("exit 0' TERM", "sleep 0.5; exit 0' TERM\ntrap 'touch \"$HOME/again\"' INT"))
    with running_loop(machines, start_new_session=True) as (loop, host):
        os.killpg(loop.pid, signal.SIGINT)
        assert loop.wait(timeout=60) == 128 + signal.SIGTERM
        assert (host / "saved").exists()
        assert not (host / "again").exists()


def test_a_command_without_restarts_passes_its_status_on(machines):
    assert run_loop(machines, [7], MAX_RESTARTS="0")[0].returncode == 7


def _default_sigint():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def running_loop(machines, *, start_new_session=False, **variables):
    host = machines.hosts[0]
    command = ["bash", "docs/launch/restart.sh", ".venv/bin/python"]
    environment = {**os.environ, "HOME": str(host), **variables}
    # A shell ignores SIGINT in what it starts in the background, such as these tests, and bash would inherit that.
    options = dict(stderr=subprocess.PIPE, text=True, start_new_session=start_new_session, preexec_fn=_default_sigint)
    with subprocess.Popen(command, cwd=host / "dat_jax", env=environment, **options) as loop:
        try:
            wait_until(lambda: machines.processes(host))
            yield loop, host
        finally:
            loop.kill()


def test_a_signal_is_passed_on_and_the_saved_run_counts_as_unfinished(machines):
    with running_loop(machines) as (loop, host):
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(timeout=60) == 128 + signal.SIGTERM
        assert (host / "saved").exists()
        assert len(machines.processes(host)) == 1


def test_a_signal_during_the_pause_ends_the_loop(machines):
    (machines.hosts[0] / "statuses").write_text("3\n")
    with running_loop(machines, PAUSE_SECONDS="1000") as (loop, host):
        assert "restart 1 of 10 in 1000 seconds" in loop.stderr.readline()
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(timeout=60) == 3
        assert len(machines.processes(host)) == 1


def test_the_pause_is_longer_than_the_others_take_to_notice_a_dead_process():
    """The pages say after how many seconds jax notices it, and for how long processes wait for each other at the start."""
    pause = int(re.search(r"PAUSE_SECONDS:-(\d+)", (LAUNCH / "restart.sh").read_text())[1])
    page = (ROOT / "docs" / "many_hosts.md").read_text()
    noticed = int(re.search(r"the (\d+) seconds that jax needs to notice", page)[1])
    assert noticed < pause < 5 * 60
    assert f"PAUSE_SECONDS:-{pause}" in (LAUNCH / "tpu_pod.sh").read_text()
