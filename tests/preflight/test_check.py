"""python -m dat_jax.check: what it prints, that it leaves nothing behind, and each failure that it finds."""

import dataclasses
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from dat_jax import check as tool
from dat_jax import storage
from dat_jax.errors import UserError
from dat_jax.parallel import multihost, sharding
from dat_jax.preflight import command, measurements, phases
from dat_jax.preflight.phases import PHASES, Session
from dat_jax.training import loop
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config
from tests.helpers.logs import collect_logs
from tests.helpers.small_mesh import make_small_mesh


@pytest.fixture(autouse=True)
def small_mesh(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", make_small_mesh)


def make_config(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict({"compilation_cache": "", **values})
    return config.lock()


def check(workdir, *, only=None, config=None, **options):
    """The problems of a check of some parts."""
    skip = [] if only is None else [name for name in PHASES if name not in only]
    return command.check(config or make_config(), str(workdir), seconds=0.2, skip=skip, **options)


def test_a_run_without_problems(tmp_path, capsys):
    assert check(tmp_path / "new" / "run") == []
    printed = capsys.readouterr().out
    for name in PHASES:
        assert f"Checking: {name}\n" in printed
    for row in (
        "devices",
        "a file of 32 MiB",
        "examples read",
        "images/s loaded",
        "memory needed by a device",
        "a step",
    ):
        assert f"\n  {row} " in printed
    estimate = printed.partition("Estimate\n")[2]
    for row in ("steps/s", "time to the end", "device-hours", "limited by"):
        assert f"  {row} " in estimate
    assert "No problem was found" in estimate
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_is_there_is_not_disturbed(tmp_path, capsys):
    loop.train(make_config(epochs=1), str(tmp_path), quiet=True)
    before = read_files(tmp_path)
    assert check(tmp_path, only=("devices", "storage", "data")) == []
    assert "to be resumed at step 10" in capsys.readouterr().out
    check(tmp_path, config=make_config(epochs=1))
    printed = capsys.readouterr().out
    assert "from the checkpoint of step 10" in printed
    assert "has done all its steps" in printed
    (problem,) = check(
        tmp_path, only=("storage", "data"), config=make_config(**{"model.dim_stem": 32, "model.dims": (32,)})
    )
    assert problem.startswith("data: The checkpoint is of another model: model.dim_stem 16, now 32")
    assert read_files(tmp_path) == before
    state = max((tmp_path / "checkpoints" / "10" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    problem = check(tmp_path, only=("storage", "data", "input", "compilation", "steps"))[-1]
    assert problem.startswith(f"steps: The checkpoint {tmp_path / 'checkpoints' / '10'} is damaged")


def read_files(directory):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_bucket_is_left_as_it_was(bucket, capsys):
    assert check(f"{bucket}/runs/1") == []
    assert f"work directory     {bucket}/runs/1" in capsys.readouterr().out
    assert storage.list_objects(storage.as_path(f"{bucket}/runs")) == []


# Failures


def test_other_devices_than_expected(tmp_path):
    (problem,) = check(tmp_path, only=("devices",), expected_devices=256)
    assert problem.startswith("devices: Expected 256 devices, and jax found 8")


def describe_devices(**changes):
    values = {"devices": 4, "kind": "TPU v5 lite", "versions": "jax 0.10", "configuration": "abc"}
    return phases.describe_devices(make_session(), [values, values, {**values, **changes}])


def make_session(**attributes):
    session = Session(make_config(), "runs/1", None, seconds=1, expected_devices=None)
    for name, value in attributes.items():
        setattr(session, name, value)
    return session


def test_processes_that_differ():
    assert describe_devices().rows["devices"] == "12 x TPU v5 lite"
    assert describe_devices().problems == []
    assert describe_devices(devices=3).problems == ["The processes have different numbers of devices: 4, 3."]
    (problem,) = describe_devices(kind="cpu").problems
    assert "kinds of devices: TPU v5 lite, cpu" in problem
    (problem,) = describe_devices(versions="jax 0.9").problems
    assert "versions: jax 0.10, jax 0.9" in problem
    assert len(describe_devices(configuration="def").problems) == 1


def test_a_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (problem,) = check(tmp_path / "file" / "run", only=("storage",))
    assert problem.startswith(f"storage: The folder {tmp_path / 'file' / 'run'} cannot be written")


def test_storage_that_changes_what_it_stores(tmp_path, monkeypatch):
    copy = shutil.copyfile

    def damage(source, target):
        copy(source, target)
        with target.open("r+b") as file:
            file.write(b"damaged")

    monkeypatch.setattr(shutil, "copyfile", damage)
    (problem,) = check(tmp_path, only=("storage",))
    assert problem == f"storage: A file that was written to {tmp_path} has another content when it is read."
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_a_file(tmp_path):
    (tmp_path / "checkpoints").touch()
    (problem,) = check(tmp_path, only=("storage",))
    assert (
        problem == f"storage: {tmp_path / 'checkpoints'} is a file: expected the folder of the checkpoints, or nothing."
    )


def test_initial_weights_that_are_not_there(tmp_path):
    (problem,) = check(tmp_path, only=("storage", "data"), config=make_config(init_from=str(tmp_path / "weights")))
    assert problem.startswith("data: config.init_from: Expected a folder of weights")
    assert str(tmp_path / "weights") in problem


def test_a_folder_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(command.shutil, "rmtree", fail)
    with collect_logs() as messages:
        check(tmp_path, only=("devices",))
        check(tmp_path, only=("storage",))
    (message,) = messages
    assert ".check-" in message
    assert message.endswith("could not be removed: Device or resource busy. Please delete it.")


def test_signals_during_the_removal_are_ignored(tmp_path, monkeypatch):
    remove = command._remove_scratch

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        remove(*arguments)

    monkeypatch.setattr(command, "_remove_scratch", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert check(tmp_path / "run", only=("storage",)) == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.iterdir()) == []


def write_images(directory, *, damaged=0):
    for split in ("train", "val"):
        for name in ("left", "right"):
            (directory / split / name).mkdir(parents=True)
            for index in range(8):
                path = directory / split / name / f"{index}.jpg"
                Image.fromarray(np.full((40, 40, 3), 20 * index, np.uint8)).save(path)
                if index < damaged:
                    path.write_bytes(path.read_bytes()[:200])


def test_data_that_are_not_there(tmp_path, capsys):
    config = make_config(**{"data.directory": str(tmp_path / "nothing")})
    (problem,) = command.check(config, str(tmp_path / "run"), seconds=0.2)
    assert problem.startswith("data: There is no directory")
    printed = capsys.readouterr().out
    assert "steps: not checked, because it needs input, compilation" in printed
    assert "There is no estimate, because it needs input, steps, checkpoint." in printed
    assert printed.count("PROBLEM: data: There is no directory") == 2  # where it was found, and at the end
    assert "1 problem found" in printed


def test_damaged_images(tmp_path):
    write_images(tmp_path / "data", damaged=1)
    config = make_config(**{"data.directory": str(tmp_path / "data"), "data.max_damaged": 0.5})
    (problem,) = check(tmp_path / "run", only=("data",), config=config)
    assert problem.startswith("data: 4 of the examples that were read are damaged")
    assert "0.jpg" in problem


def test_images_of_which_none_can_be_read(tmp_path):
    write_images(tmp_path / "data", damaged=8)
    config = make_config(**{"data.directory": str(tmp_path / "data")})
    problems = check(tmp_path / "run", only=("data", "input"), config=config)
    assert [problem.partition(":")[0] for problem in problems] == ["data", "input"]


def test_processes_that_see_other_data():
    trainer = Trainer(make_config())
    values = {"train": 160, "validation": 50, "damaged": []}
    assert phases.describe_data(make_session(trainer=trainer), [values, values]).problems == []
    (problem,) = phases.describe_data(make_session(trainer=trainer), [values, {**values, "train": 100}]).problems
    assert "different numbers of training and validation images: 160 and 50, 100 and 50" in problem


def test_a_batch_that_cannot_be_split(tmp_path):
    problems = check(tmp_path, only=("data",), config=make_config(batch_size=15, accumulate_steps=2))
    assert "config.batch_size 15 is not a multiple of 2" in problems[0]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: 20G of 16G", "does not fit in the memory of a device: RESOURCE_EXHAUSTED: 20G of 16G"),
        ("INTERNAL: no kernel\nmore", "cannot be compiled: INTERNAL: no kernel"),
    ],
)
def test_a_step_that_cannot_be_compiled(tmp_path, monkeypatch, message, expected):
    class Refused:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(measurements, "step_function", lambda *_: (Refused(), (), 1))
    problems = check(tmp_path, only=("data", "compilation"))
    assert problems[-1].endswith(expected)


def test_a_step_that_needs_all_the_memory():
    values = [{"compile_seconds": 1.0, "peak": 15 * 2**30, "available": 16 * 2**30, "choices": "none"}]
    outcome = phases.describe_compilation(make_session(), values)
    assert outcome.rows["memory needed by a device"] == "15.00 GiB of 16.00 GiB"
    assert outcome.problems == []
    (problem,) = phases.describe_compilation(make_session(), [{**values[0], "peak": 17 * 2**30}]).problems
    assert "--config.accumulate_steps=2" in problem
    assert phases.describe_compilation(make_session(), [{**values[0], "available": None}]).problems == []


def test_a_loss_that_is_not_finite():
    session = make_session(trainer=Trainer(make_config()))
    assert phases.describe_steps(session, [{"step_seconds": 0.5, "loss": 2.0}]).problems == []
    (problem,) = phases.describe_steps(session, [{"step_seconds": 0.5, "loss": float("nan")}]).problems
    assert problem == "The loss after four steps is nan."


def test_memory_that_is_exhausted_by_a_step_or_an_evaluation():
    trainer = Trainer(make_config())
    batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in trainer.task.example_batch(16).items()}

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    step = measurements.CompiledStep(run=fail, seconds=1.0, peak=1, available=None)
    with pytest.raises(UserError, match="training step fails on the devices: RESOURCE_EXHAUSTED"):
        measurements.time_steps(trainer, step, trainer.initialize(), batch)
    trainer.objective = dataclasses.replace(trainer.objective, predict=fail)
    with pytest.raises(UserError, match="evaluation fails on the devices: RESOURCE_EXHAUSTED"):
        measurements.time_prediction(trainer, trainer.abstract_state.eval_variables)


def test_a_checkpoint_that_cannot_be_saved(tmp_path, monkeypatch):
    trainer = Trainer(make_config())

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", fail)
    with pytest.raises(UserError, match="checkpoint cannot be saved"):
        measurements.measure_checkpoint(trainer, trainer.initialize(), tmp_path)


def test_a_disk_that_is_too_small_for_the_checkpoints():
    storage = {"free": 10 * 2**20, "checkpoints": 0}
    session = make_session(values={"storage": [storage]})
    values = [{"size": 2**20, "save_seconds": 1.0, "restore_seconds": 1.0}]
    assert phases.describe_checkpoint(session, values).problems == []
    (problem,) = phases.describe_checkpoint(session, [{**values[0], "size": 3 * 2**20}]).problems
    assert "has 10.00 MiB free, and the run needs up to 12.00 MiB for 4 more checkpoints" in problem
    session = make_session(values={"storage": [{**storage, "checkpoints": 3}]})
    assert phases.describe_checkpoint(session, [{**values[0], "size": 3 * 2**20}]).problems == []


@pytest.mark.slow
def test_algorithms_that_are_wrong_on_a_device(monkeypatch):
    trainer = Trainer(make_config())
    batch = next(trainer.train_batches(start_step=0))
    batch = {name: batch[name] for name in trainer.task.example_batch(1)}
    loss, gradient = measurements.compare_algorithms(trainer, batch)
    assert max(loss, gradient) < 1e-5
    make_objective = trainer.task.make_objective

    def make_wrong(**settings):
        objective = make_objective(**settings)
        if settings.get("implementation") == "plain":
            return objective
        wrong = lambda *arguments: (1.01 * objective.loss(*arguments)[0], *objective.loss(*arguments)[1:])  # noqa: E731
        return dataclasses.replace(objective, loss=wrong)

    monkeypatch.setattr(trainer.task, "make_objective", make_wrong)
    wrong_loss, wrong_gradient = measurements.compare_algorithms(trainer, batch)
    assert wrong_loss == pytest.approx(0.01, rel=1e-3)
    assert wrong_gradient == pytest.approx(0.01, rel=1e-3)
    (problem,) = phases.describe_algorithms(make_session(), [{"loss": wrong_loss, "gradient": wrong_gradient}]).problems
    assert "--config.model.implementation=plain" in problem
    assert phases.describe_algorithms(make_session(), [{"loss": loss, "gradient": gradient}]).problems == []
    assert phases.describe_algorithms(make_session(), [{"loss": 0.0, "gradient": float("nan")}]).problems != []


def test_a_failure_of_one_process_is_named(tmp_path, monkeypatch):
    def gather(text):
        return [text, '{"values": {}, "failure": "There is no directory /data."}']

    monkeypatch.setattr(multihost, "gather_texts", gather)
    assert check(tmp_path, only=("devices",)) == ["devices: process 1 of 2: There is no directory /data."]


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--skip: there is no step; choose from devices, .*, algorithms"):
        command.check(make_config(), str(tmp_path), skip=["step"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--config=quickstart"], 1, "Expected --config=CONFIG --workdir=DIR"),
        (["runs/1", "--config=quickstart", "--workdir=runs/1"], 1, "Unexpected argument runs/1"),
        (["--config=quickstart", "--workdir=s3://bucket/run"], 1, "cannot be a work directory"),
    ],
)
def test_wrong_arguments(arguments, status, message, capsys):
    values = flags.FlagValues()
    tool.define_flags(values)
    rest = values(["check", *arguments])
    with pytest.raises(SystemExit) as end:
        tool.main(rest, values)
    assert end.value.code == status
    assert message in capsys.readouterr().err


def test_the_status_says_whether_a_problem_was_found(tmp_path, capsys):
    values = flags.FlagValues()
    tool.define_flags(values)
    skip = ",".join(name for name in PHASES if name != "devices")
    rest = values(["check", "--config=quickstart", f"--workdir={tmp_path}", f"--skip={skip}", "--devices=8"])
    tool.main(rest, values)
    values.devices = 7
    with pytest.raises(SystemExit) as end:
        tool.main(rest, values)
    assert end.value.code == 1
    assert "PROBLEM: devices: Expected 7 devices" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
