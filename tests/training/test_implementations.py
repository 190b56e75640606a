"""Implementations of ops that a run chooses by measurement, with interpreted kernels."""

import jax
import pytest

from dat_jax.errors import UserError
from dat_jax.ops import calls, dispatch
from dat_jax.ops.triton import call as triton_kernels
from dat_jax.parallel import multihost, sharding
from dat_jax.training import implementations, loop
from dat_jax.training.implementations import choose_implementations
from dat_jax.training.trainer import Trainer
from dat_jax.tuning import choices as choices_module
from dat_jax.tuning import tune as tune_module
from dat_jax.tuning.measurement import Measurement
from tests.helpers import tiny_config, tiny_detection, tiny_segmentation
from tests.helpers.small_mesh import make_small_mesh

OPS = {
    *("grid_sample", "neighborhood_attention", "deformable_attention", "depthwise_conv"),
    *("neighborhood_branch", "deformable_branch", "norm_linear", "conv_mlp", "local_perception"),
}


class FakeMeasure:
    """Finds that the kernel is the fastest, or else the default, and counts the calls that it measures."""

    def __init__(self):
        self.calls = []

    def __call__(self, call, names):
        self.calls.append(call)
        seconds = {name: 1.0 + index for index, name in enumerate(names)}
        if "pallas" in names:
            seconds["pallas"] = 0.1
        return {name: Measurement(seconds=value, error=0.0) for name, value in seconds.items()}


@pytest.fixture
def measured(monkeypatch):
    fake = FakeMeasure()
    monkeypatch.setattr(
        implementations, "tune", lambda calls, known: tune_module.tune(calls, known=known, measure=fake)
    )
    with dispatch.interpreted_kernels():
        yield fake


@pytest.fixture
def make_trainer():
    def make(**settings):
        config = tiny_config.get_config().unlock()
        config.update(settings)
        return Trainer(config)

    return make


def count_kernels(trainer):
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in trainer.task.example_batch(trainer.config.batch_size).items()
    }
    return str(trainer.jitted_train_step.trace(trainer.abstract_state, batch).jaxpr).count("pallas_call")


def test_kernels_that_are_faster_are_in_the_step_and_are_chosen_once(tmp_path, measured, make_trainer, logs):
    trainer = make_trainer()
    calls = trainer.list_op_calls("train")
    assert {call.op for call in calls.values()} == OPS
    assert all(call.main_array[0][0] == 2 and call.differentiated for call in calls.values())  # 16 images, 8 devices
    described = choose_implementations(trainer, "train", cache=tmp_path)
    assert trainer.choices.keys() == calls.keys()
    assert len(measured.calls) == len(calls)
    assert count_kernels(trainer) > 0
    assert "1 x neighborhood_attention pallas" in described
    assert f"Implementations of ops: {described}." in "\n".join(logs)

    again = make_trainer()
    choose_implementations(again, "train", cache=tmp_path)
    assert again.choices == trainer.choices
    assert len(measured.calls) == len(calls)


def test_another_version_and_another_folder_measure_again(tmp_path, measured, make_trainer, monkeypatch):
    choose_implementations(make_trainer(), "train", cache=tmp_path)
    count = len(measured.calls)
    versions = choices_module.describe_versions()
    monkeypatch.setattr(choices_module, "describe_versions", lambda: {**versions, "jax": "99"})
    choose_implementations(make_trainer(), "train", cache=tmp_path)
    assert len(measured.calls) == 2 * count
    choose_implementations(make_trainer(), "train", cache=None)
    assert len(measured.calls) == 3 * count


@pytest.mark.parametrize(
    ("settings", "described"),
    [
        ({"tune": False}, "the defaults for cpu"),
        ({"model": {"implementation": "plain"}}, "plain, the value of config.model.implementation"),
        ({"model": {"implementation": "pallas"}}, "pallas, the value of config.model.implementation"),
    ],
)
def test_nothing_is_measured_where_it_is_not_wanted(tmp_path, measured, make_trainer, settings, described):
    trainer = make_trainer(**settings)
    assert choose_implementations(trainer, "train", cache=tmp_path) == described
    assert trainer.choices == {}
    assert measured.calls == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "Unknown implementation 'fast'; choose one of auto, plain, pallas, triton"),
        ("rows", "Unknown implementation 'rows'; choose one of"),  # of one op, not of all
        ("pallas", '"pallas" is for TPUs, but the program is compiled for cpu'),
        ("triton", '"triton" is for GPUs, but the program is compiled for cpu'),
    ],
)
def test_an_implementation_that_cannot_run_is_refused(make_trainer, name, message):
    with pytest.raises(UserError, match=f"config.model cannot be built: .*{message}"):
        make_trainer(model={"implementation": name})


def test_kernels_for_gpus_are_refused_if_jax_cannot_compile_them(make_trainer, monkeypatch):
    monkeypatch.setattr(triton_kernels, "plgpu", None)
    with dispatch.compiling_for("gpu"), pytest.raises(UserError, match="needs the Triton backend of Pallas"):
        make_trainer(model={"implementation": "triton"})


@pytest.mark.parametrize("name", ["plain", "pallas"])
def test_a_model_with_a_fixed_implementation_has_no_calls_to_choose_for(measured, make_trainer, name):
    assert make_trainer(model={"implementation": name}).list_op_calls("train") == {}


def test_choices_that_cannot_be_written_are_not_said_to_be_kept(tmp_path, measured, make_trainer, logs):
    (tmp_path / "file").write_text("")
    trainer = make_trainer()
    choose_implementations(trainer, "train", cache=tmp_path / "file")
    assert trainer.choices
    (compared,) = [line for line in logs if "Compared the implementations" in line]
    assert compared.endswith("; not kept.")


def test_nothing_is_measured_on_cpus(tmp_path, make_trainer):
    trainer = make_trainer()
    choose_implementations(trainer, "train", cache=tmp_path)
    assert trainer.choices == {}
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_that_fails_ends_with_the_defaults(tmp_path, measured, make_trainer, monkeypatch, logs):
    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(implementations, "tune", fail)
    trainer = make_trainer()
    choose_implementations(trainer, "train", cache=tmp_path)
    assert trainer.choices == {}
    assert count_kernels(trainer) == 0
    assert "could not be compared, so the defaults are used: no space" in "\n".join(logs)


def test_all_processes_take_the_choices_of_the_first(measured, make_trainer, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost, "gather_texts", lambda text: ['[{"a()": "pallas"}, "x"]', text])
    trainer = make_trainer()
    choose_implementations(trainer, "train", cache=None)
    assert trainer.choices == {"a()": "pallas"}
    assert measured.calls == []


def test_an_evaluation_has_choices_of_its_own(tmp_path, measured, make_trainer):
    trainer = make_trainer()
    choose_implementations(trainer, "eval", cache=tmp_path)
    assert trainer.choices
    assert not any(key.startswith("gradient of") for key in trainer.choices)


def trace_evaluation(trainer, monkeypatch):
    """Return the keys of the calls of ops in an evaluation as it runs."""
    keys, variables = set(), trainer.initialize().eval_variables
    real = calls.choose_call

    def record(op, function, batched, arguments):
        with (
            calls.recorded_calls(differentiated=False) as found,
            dispatch.split_batch(trainer.mesh, trainer.mesh.axis_names),
        ):
            choice = real(op, function, batched, arguments)
        keys.update(found)
        return choice

    for module in ("calls", "layers.mlp", "layers.norm_linear", "layers.local_perception", "attention.branches"):
        monkeypatch.setattr(f"dat_jax.ops.{module}.choose_call", record)
    trainer.choices = {"none": "of these"}
    trainer.evaluate(variables)
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("tiny", [tiny_config, tiny_segmentation, tiny_detection])
def test_the_calls_that_are_listed_are_those_of_an_evaluation(tiny, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", make_small_mesh)
    trainer = Trainer(tiny.get_config())
    listed = trainer.list_op_calls("eval").keys()
    assert trace_evaluation(trainer, monkeypatch) == listed


def test_a_detector_has_calls_for_every_shape_of_its_images():
    task = Trainer(tiny_detection.get_config()).task
    shapes = [batch["image"].shape[1:3] for batch in task.train_examples(2)]
    assert shapes == list(task._buckets())


@pytest.mark.slow
def test_a_run_with_chosen_kernels_has_the_losses_of_one_without(tmp_path, measured):
    config = tiny_config.get_config()
    config.steps, config.compilation_cache = 3, ""
    first = loop.train(config, str(tmp_path / "chosen"), quiet=True)
    assert {call.op for call in measured.calls} == OPS
    config.tune = False
    second = loop.train(config, str(tmp_path / "defaults"), quiet=True)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
