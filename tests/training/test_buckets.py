"""Runs whose work directory is in a bucket, on a storage server of this machine."""

import logging

import jax
import numpy as np
import pytest

import dat_jax
from dat_jax import storage
from dat_jax.errors import UserError
from dat_jax.inference import load
from dat_jax.parallel import sharding
from dat_jax.training import loop
from dat_jax.training.monitoring.metrics import read_metrics
from dat_jax.training.workdir import WorkDirectory
from tests.helpers import tiny_config
from tests.helpers.small_mesh import make_small_mesh


def make_config(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict({"compilation_cache": "", **values})
    return config.lock()


def variables_of(path):
    return jax.tree.map(np.asarray, dat_jax.load(path)[1])


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_run_in_a_bucket_resumes_and_is_that_on_a_disk(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sharding, "make_mesh", make_small_mesh)
    workdir = f"{bucket}/runs/1"
    config = make_config(init_from="")
    with pytest.raises(KeyboardInterrupt):
        train_until(12, config, workdir)
    directory = storage.as_path(workdir)
    assert not list(tmp_path.iterdir())  # no folder called "gs:"
    names = storage.list_objects(directory)
    assert {"config.json", "classes.txt", "metrics.jsonl"} <= set(names)
    assert "checkpoints/10/files.json" in names
    result = loop.train(config, workdir, quiet=True)

    local = loop.train(config, str(tmp_path / "local"), quiet=True)
    assert result == local
    assert_same(variables_of(workdir), variables_of(tmp_path / "local"))
    got, wanted = (read_metrics(storage.fetch(path) / "metrics.jsonl") for path in (workdir, tmp_path / "local"))
    assert got["train/loss"] == wanted["train/loss"]
    names = storage.list_objects(directory)
    assert {"summary.md", "curves.png", "predictions.png"} <= set(names)
    assert any(name.startswith("tensorboard/") for name in names)
    assert f"--workdir={workdir}" in storage.fetch(f"{workdir}/summary.md").read_text()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_predicted_and_fine_tuned_from_there(bucket, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", make_small_mesh)
    workdir = f"{bucket}/runs/1"
    result = loop.train(make_config(), workdir, quiet=True)
    assert loop.evaluate(make_config(), workdir, quiet=True) == result
    image = np.zeros((40, 40, 3), np.uint8)
    np.testing.assert_array_equal(load(workdir)(image), load(storage.fetch(workdir))(image))
    further = loop.train(make_config(init_from=workdir, epochs=1), f"{bucket}/runs/2", quiet=True)
    assert further["top1"] > 80


def train_until(step, config, workdir):
    """Train, and end as if the process had been killed once this many steps are logged."""

    class Interrupted(logging.Handler):
        def emit(self, record):
            if record.msg.startswith("step %d/%d") and record.args[0] > step:
                raise KeyboardInterrupt

    logger, handler = logging.getLogger("dat_jax.training.loop"), Interrupted()
    logger.addHandler(handler)
    try:
        loop.train(config, workdir)
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    "workdir", ["gs://test-missing/run", "gs:/my-bucket/run", "http://my-bucket/run", "s3://my-bucket/run"]
)
def test_a_destination_that_cannot_be_written_is_refused_before_anything_is_compiled(
    bucket, workdir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dat_jax.training.trainer.Trainer.initialize", None)
    with pytest.raises(UserError, match=r"no bucket|did you mean|got the scheme http|cannot be a work dir"):
        loop.train(make_config(), workdir, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_second_run_in_a_work_directory_is_noticed(place, tmp_path, request):
    path = str(tmp_path / "run") if place == "disk" else f"{request.getfixturevalue('bucket')}/run"
    with WorkDirectory(path) as first, WorkDirectory(path) as second:
        first.open_for_writing()
        first.check_owner()
        second.open_for_writing()
        second.check_owner()
        with pytest.raises(UserError, match=r"Another run was started in .*/run \(.*, \d+, .*\)\."):
            first.check_owner()


def test_a_run_that_is_superseded_uploads_nothing_more(bucket):
    with WorkDirectory(f"{bucket}/run") as first:
        first.open_for_writing()
        (first.files / "metrics.jsonl").write_text("first\n")
        with WorkDirectory(f"{bucket}/run") as second:
            second.open_for_writing()
            (second.files / "metrics.jsonl").write_text("second\n")
    assert storage.fetch(f"{bucket}/run/metrics.jsonl").read_text() == "second\n"


@pytest.mark.parametrize("owner", ['{"run": "x"}', "[1]", "{"])
def test_damaged_owners_do_not_end_in_a_traceback(owner, tmp_path):
    with WorkDirectory(tmp_path) as directory:
        directory.open_for_writing()
        (tmp_path / ".run.json").write_text(owner)
        if "run" not in owner:
            directory.check_owner()
            return
        with pytest.raises(UserError, match="Another run was started"):
            directory.check_owner()
