"""Runs in a bucket whose server fails, stalls, or is killed in the middle of an upload."""

import contextlib
import random
import re
import time

import pytest

from dat_jax import storage
from dat_jax.checkpoints.directory import find_complete_steps
from dat_jax.checkpoints.integrity import check_manifest
from dat_jax.training.monitoring.metrics import read_metrics
from experiments.soak import processes as soak
from experiments.soak.bucket_server import find_port, make_bucket
from tests.helpers.fault_proxy import run_proxy
from tests.helpers.xla_flags import fast_compilation_flags

pytestmark = pytest.mark.slow

CONFIG = "tests/helpers/tiny_config.py"


@contextlib.contextmanager
def make_proxy(bucket_server):
    port = find_port()
    with run_proxy(port, int(bucket_server.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def proxy(bucket_server):
    """A proxy in front of the storage server, for the programs of a test."""
    with make_proxy(bucket_server) as proxy:
        yield proxy


def start(workdir, proxy, **values):
    """Start a run that reaches its bucket through a proxy."""
    values = {"compilation_cache": "", "checkpoint.every": 5, **values}
    address = f"http://127.0.0.1:{proxy.server_port}"
    return soak.start(
        CONFIG,
        workdir,
        values=values,
        devices=1,
        xla_flags=" ".join(fast_compilation_flags()),
        variables={"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address},
    )


@pytest.fixture(scope="module", autouse=True)
def run_without_server(bucket_server):
    """A run for which every request fails from its second checkpoint on.

    It waits for minutes between the libraries' attempts. Therefore it starts before the first test, and the last one looks at it.
    """
    gone = []

    def fail(method, path):
        if "checkpoints%2F10" in path:
            gone.append(path)
        return "503" if gone else None

    make_bucket(bucket_server, "without-server")
    with make_proxy(bucket_server) as proxy:
        proxy.choose_fault = fail
        (running,) = start("gs://without-server/run", proxy, **{"checkpoint.every": 10})
        yield running
        running.kill()
        running.communicate()


def check(workdir, *, last):
    """Check that the last step is complete, every complete checkpoint is intact, and the metrics have every line."""
    directory = storage.as_path(workdir) / "checkpoints"
    steps = find_complete_steps(directory)
    assert steps[-1] == last
    for step in steps:
        check_manifest(directory / str(step))
    assert list(read_metrics(storage.fetch(workdir) / "metrics.jsonl")["train/loss"]) == list(range(5, last + 1, 5))


def test_some_requests_fail_and_some_are_slow(proxy, bucket):
    """Of all requests 5 % fail, and 2 % are answered after five seconds."""
    rng, failures = random.Random(0), ["503", "429", "cut", "lost"]

    def choose(method, path):
        draw = rng.random()
        return rng.choice(failures) if draw < 0.05 else "stall" if draw < 0.07 else None

    proxy.choose_fault = choose
    (printed,) = soak.finish(start(f"{bucket}/run", proxy), seconds=500)
    assert set(proxy.faults) == {*failures, "stall"}
    assert "step 20/20" in printed
    check(f"{bucket}/run", last=20)


def test_nothing_answers_for_a_while(proxy, bucket):
    begin = []

    def fail_for_a_while(method, path):
        if "checkpoints%2F10" in path and not begin:
            begin.append(time.monotonic())
        return "503" if begin and time.monotonic() < begin[0] + 60 else None

    proxy.choose_fault = fail_for_a_while
    (printed,) = soak.finish(start(f"{bucket}/run", proxy, epochs=3), seconds=500)
    assert proxy.faults
    assert re.search(r"Step 10 could not be saved: .*503.* The checkpoint of step 5 is untouched", printed)
    check(f"{bucket}/run", last=30)


def test_a_kill_in_the_middle_of_an_upload_leaves_nothing_that_is_taken_for_whole(proxy, bucket):
    workdir, kills = f"{bucket}/run", 0
    for step in (10, 15, 20):
        proxy.choose_fault = lambda method, path, step=step: (
            "stall" if f"checkpoints%2F{step}%2Fstate" in path and method == "POST" else None
        )
        proxy.faults.clear()
        (running,) = start(workdir, proxy)
        while not proxy.faults and running.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        running.kill()
        running.communicate()
        kills += bool(proxy.faults)
        complete = find_complete_steps(storage.as_path(workdir) / "checkpoints")
        assert step not in complete
        for other in complete:
            check_manifest(storage.as_path(workdir) / "checkpoints" / str(other))
    assert kills == 3
    proxy.choose_fault = lambda method, path: None
    (printed,) = soak.finish(start(workdir, proxy), seconds=500)
    assert "set_aside" in printed
    check(workdir, last=20)


def test_the_server_is_gone_for_good(run_without_server):
    printed, _ = run_without_server.communicate(timeout=900)
    assert "step 20/20" in printed
    assert re.search(r"[Ss]tep 10 could not be saved", printed)
    assert run_without_server.returncode != 0
