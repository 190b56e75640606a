"""python -m dat_jax.check as its own processes: two of them together, and a signal."""

import contextlib
import functools
import signal

import pytest

from experiments.soak import processes
from tests.helpers.xla_flags import fast_compilation_flags

pytestmark = pytest.mark.slow

start = functools.partial(
    processes.start,
    "tests/helpers/tiny_config.py",
    module="dat_jax.check",
    xla_flags=" ".join(fast_compilation_flags()),
)


def test_two_processes_check_together_and_leave_nothing(tmp_path):
    values = {"mesh.fsdp": 4, "epochs": 40}
    running = start(tmp_path / "run", processes=2, values=values, flags=["--seconds=0.5", "--devices=8"])
    first, second = processes.finish(running, seconds=400)
    assert "8 x cpu" in first
    assert "MB in" in first  # the sum of the gradient
    assert "by the slowest process" in first
    assert "No problem was found" in first
    assert "Checking" not in second  # one of them speaks
    assert list(tmp_path.iterdir()) == []


def test_two_processes_without_a_common_folder(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    running = start("run", processes=2, values={}, flags=["--skip=data"], folders=folders)
    with pytest.raises(RuntimeError, match=r"status \[1, 1\]") as error:
        processes.finish(running, seconds=400)
    assert "storage: The processes of the run do not share" in str(error.value)
    assert not [path for folder in folders for path in folder.rglob(".check-*")]


def test_a_signal_leaves_nothing(tmp_path):
    (process,) = start(tmp_path / "run", values={}, flags=["--seconds=60"])
    assert process.stdout is not None
    with contextlib.closing(process.stdout):
        for line in process.stdout:
            if "Checking: input" in line:
                break
        assert list((tmp_path / "run").iterdir()) != []
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert (process.wait(60), "Traceback" in rest) == (143, False)
    assert list(tmp_path.iterdir()) == []
