"""Two processes of four virtual devices each, on one machine: the same run as one process of eight."""

import functools
import re
import signal
import time

import pytest

from dat_jax import storage
from dat_jax.errors import UserError
from dat_jax.parallel import multihost
from dat_jax.training.monitoring.metrics import read_metrics
from experiments.soak import processes as soak
from tests.helpers import few_detections
from tests.helpers.xla_flags import fast_compilation_flags

pytestmark = pytest.mark.slow

XLA_FLAGS = " ".join(fast_compilation_flags())


def start(workdir, *, processes, values=None, folders=None):
    return soak.start(
        "tests/helpers/tiny_config.py",
        workdir,
        values={"log_every": 1, "checkpoint.every": 4, **(values or {})},
        processes=processes,
        xla_flags=XLA_FLAGS,
        folders=folders,
    )


finish = functools.partial(soak.finish, seconds=400)


def series(workdir):
    return read_metrics(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process."""
    directory = tmp_path_factory.mktemp("whole")
    finish(start(directory, processes=1))
    return directory


@pytest.mark.parametrize("mesh", [{"mesh.fsdp": 4}, {"mesh.slices": 2, "mesh.fsdp": 2}], ids=["processes", "slices"])
def test_two_processes_give_the_losses_and_the_evaluation_of_one(whole, tmp_path, mesh):
    first, second = finish(start(tmp_path, processes=2, values=mesh))
    assert "Result" in first
    assert "step" not in second  # one of them speaks
    got, wanted = series(tmp_path), series(whole)
    assert list(got["train/loss"]) == list(range(1, 21))
    for name in ("train/loss", "eval/loss", "train/grad_norm"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5)
    assert got["eval/top1"] == wanted["eval/top1"]


def test_a_signal_to_one_process_ends_both_at_one_step_and_one_process_goes_on(whole, tmp_path):
    running = start(tmp_path, processes=2, values={"checkpoint.every": 0, "epochs": 40, "schedule.warmup_epochs": 10.0})
    while not (tmp_path / "metrics.jsonl").exists() or len(series(tmp_path).get("train/loss", ())) < 3:
        assert all(process.poll() is None for process in running), finish(running)
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    first, _ = finish(running)
    step = int(re.search(r"Ended by a signal to another process at step (\d+)\.", first)[1])
    assert str(step) in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    values = {"epochs": step // 10 + 1, "schedule.warmup_epochs": 10.0}
    (printed,) = finish(start(tmp_path, processes=1, values=values))
    assert f"Resumed at step {step} of" in printed
    assert max(series(tmp_path)["train/loss"]) == 10 * (step // 10 + 1)


def make_folders(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    return folders


def test_processes_without_a_common_disk_share_a_bucket(whole, bucket, tmp_path):
    folders = make_folders(tmp_path)
    values = {"mesh.fsdp": 2, "compilation_cache": ""}
    finish(start(f"{bucket}/run", processes=2, values={**values, "epochs": 1}, folders=folders))
    first, _ = finish(start(f"{bucket}/run", processes=2, values=values, folders=folders))
    assert "Resumed at step 10 of 20." in first
    got, wanted = series(storage.fetch(f"{bucket}/run")), series(whole)
    assert list(got["train/loss"]) == list(range(1, 21))
    assert got["train/loss"][1] == pytest.approx(wanted["train/loss"][1], rel=1e-5)
    assert got["eval/top1"][20] == wanted["eval/top1"][20]
    assert not [path for folder in folders for path in folder.rglob("*") if "checkpoint" in path.name]


def test_work_directories_that_are_not_shared_are_refused_at_the_start(tmp_path):
    running = start("run", processes=2, folders=make_folders(tmp_path), values={"compilation_cache": ""})
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [1, 1]
    for text in printed:
        assert "error: The processes of the run do not share run: each of them has a folder of this name." in text
        assert "step 1/" not in text


def test_processes_that_are_named_in_part_are_refused():
    with pytest.raises(UserError, match="not given: JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        multihost.start(coordinator_address="localhost:1", environment={})
    with pytest.raises(UserError, match="an index below it, got 2 and 2"):
        multihost.start(coordinator_address="localhost:1", num_processes=2, process_id=2, environment={})
    multihost.start(environment={})
    multihost.start(mode="off", environment={"SLURM_STEP_NUM_TASKS": "8"})


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"MEGASCALE_NUM_SLICES": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JOBSET_NAME": "a", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_schedulers_are_recognised(environment, several):
    assert multihost.in_a_cluster(environment) == several


def test_two_processes_evaluate_images_of_many_sizes_once(tmp_path):
    """A segmentor: batches of one size at a time, each process its rows of them, BatchNorm over both."""
    for count in (1, 2):
        running = soak.start(
            "tests/helpers/tiny_segmentation.py",
            tmp_path / str(count),
            values={"log_every": 1},
            processes=count,
            xla_flags=XLA_FLAGS,
        )
        finish(running)
    one, two = (series(tmp_path / str(count)) for count in (1, 2))
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
    assert two["eval/images"] == one["eval/images"] == {6: 21, 12: 21}
    for name in ("eval/mIoU", "eval/aAcc"):
        assert two[name] == pytest.approx(one[name], abs=0.1)


def test_two_processes_detect_as_one(tmp_path):
    """A cascade: NMS, samples and BatchNorm over both, each process the detections of its own images."""
    for count in (1, 2):
        running = soak.start(
            "tests/helpers/few_detections.py:cascade_mask_rcnn",
            tmp_path / str(count),
            values={"log_every": 1, "steps": 4},
            processes=count,
            xla_flags=XLA_FLAGS,
        )
        finish(running)
    one, two = (series(tmp_path / str(count)) for count in (1, 2))
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-3)
    assert two["eval/images"] == one["eval/images"] == {4: few_detections.IMAGES}
    for name in ("eval/bbox/AP50", "eval/segm/AP50", "eval/bbox/AR100"):
        assert two[name] == pytest.approx(one[name], abs=0.5)
