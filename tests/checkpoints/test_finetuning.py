"""Runs that start from trained weights, and evaluation of weights and of further sets."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import dat_jax
from dat_jax.checkpoints.class_names import read_class_names
from dat_jax.checkpoints.exports import export_model
from dat_jax.checkpoints.loading import load_for_finetuning, load_pretrained
from dat_jax.checkpoints.restore import initialize_state
from dat_jax.data import sources
from dat_jax.errors import UserError
from dat_jax.training import loop
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config
from tests.helpers.logs import collect_logs


def with_values(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict(values)
    return config.lock()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work directory after two epochs with averaged weights, and what training returned."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, loop.train(with_values(ema_decay=0.5), str(directory))


@pytest.fixture
def three_classes(monkeypatch):
    """The data set "thirds": that of two classes with a third one that never occurs."""

    def load(split):
        source = tiny_config._load_halves(split)
        return dataclasses.replace(source, class_names=("left", "right", "neither"))

    monkeypatch.setitem(sources._SOURCES, "thirds", load)


@pytest.fixture
def rename(monkeypatch):
    """A function that gives the data set "halves" other class names, and other labels if its classes are reordered."""

    def rename(*names):
        def load(split):
            source = tiny_config._load_halves(split)
            labels = 1 - source.labels if names == ("right", "left") else source.labels
            return dataclasses.replace(source, labels=labels, class_names=names)

        monkeypatch.setitem(sources._SOURCES, "halves", load)

    return rename


@pytest.mark.slow
def test_renamed_classes_are_refused_by_resume_and_evaluation(finished, rename, tmp_path):
    rename("z_left", "right")
    for call in (loop.train, loop.evaluate):
        with pytest.raises(UserError, match="do not have left, .* do not have z_left"):
            call(with_values(ema_decay=0.5), str(finished[0]))
    with pytest.raises(UserError, match="do not have left, .* do not have z_left"):
        loop.evaluate(with_values(init_from=str(finished[0])), str(tmp_path / "nothing"))
    rename("right", "left")
    with pytest.raises(UserError, match="class 0 is 'left', now 'right'"):
        loop.train(with_values(ema_decay=0.5), str(finished[0]))
    assert (finished[0] / "classes.txt").read_text() == "left\nright\n"


@pytest.mark.slow
def test_predictions_have_the_names_of_the_checkpoint(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "classes.txt").write_text("other\nnames\n")
    assert read_class_names(tmp_path / "run", count=2) == ("left", "right")


@pytest.mark.slow
def test_the_classes_of_initial_weights_are_reordered_by_name(finished, rename, tmp_path):
    rename("right", "left")
    with collect_logs() as messages:
        result = loop.evaluate(with_values(init_from=str(finished[0])), str(tmp_path / "nothing"))
    assert result["top1"] == pytest.approx(finished[1]["top1"])
    assert any("reordered by name" in message for message in messages)


@pytest.mark.slow
def test_the_head_for_other_names_is_initialized(finished, rename):
    rename("cat", "dog")
    trainer = Trainer(with_values(init_from=str(finished[0])))
    with collect_logs() as messages:
        state = initialize_state(trainer.config, **loop._state_options(trainer))
    assert "do not have cat, dog" in messages[1]
    fresh = trainer.initialize().params["cls_head"]["kernel"]
    np.testing.assert_array_equal(state.params["cls_head"]["kernel"], fresh)


@pytest.mark.slow
def test_weights_without_a_work_directory_are_evaluated(finished, tmp_path):
    """An export of a run's best weights, and the run itself, give the accuracy of the run."""
    directory, result = finished
    model, variables = load_pretrained(directory)
    export_model(tmp_path / "export", model=model, variables=variables)
    for weights in (directory, tmp_path / "export"):
        got = loop.evaluate(with_values(init_from=str(weights)), str(tmp_path / "nothing"))
        assert got == result
    written = {path.name for path in (tmp_path / "nothing").iterdir()}
    assert written == {"per_class.csv", "confusion.csv", "confusion.png"}


@pytest.mark.slow
def test_a_run_starts_from_the_weights_with_a_new_head(finished, three_classes, tmp_path, capsys):
    config = with_values(**{"init_from": str(finished[0]), "data.name": "thirds", "epochs": 1, "ema_decay": 0.5})
    trainer = Trainer(config)
    with collect_logs() as messages:
        state = initialize_state(trainer.config, **loop._state_options(trainer))
    assert messages == [
        f"Starting from the weights of {finished[0]}.",
        "The head for 3 classes is initialized: the trained one is for 2.",
    ]
    _, variables = load_pretrained(finished[0])
    for name, wanted in variables["params"].items():
        for params in (state.params, state.ema_params):
            if name == "cls_head":
                assert params[name]["kernel"].shape == (16, 3)
            else:
                jax.tree.map(np.testing.assert_array_equal, params[name], wanted)
    result = loop.train(config, str(tmp_path))
    assert result["top1"] > 80  # as the weights that it began with
    assert "Starting from the weights of" in capsys.readouterr().out


@pytest.mark.slow
def test_a_work_directory_with_checkpoints_goes_before_the_weights(finished, tmp_path, capsys):
    loop.train(with_values(init_from=str(tmp_path / "nowhere"), ema_decay=0.5), str(finished[0]))
    assert "Resumed at step 20 of 20" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_the_head_are_taken(finished, tmp_path):
    (tmp_path / "rows.txt").write_text("1\n0\n")
    values = {"init_from": str(finished[0]), "init_head_rows": str(tmp_path / "rows.txt")}
    swapped = loop.evaluate(with_values(**values), str(tmp_path / "nothing"))
    assert swapped["top1"] == pytest.approx(100 - finished[1]["top1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "init_head_rows .* cannot be read"),
        ("a\nb\n", "init_head_rows .* cannot be read"),
        ("0\n", "a number for each of the 2 classes, got 1"),
        ("0\n7\n", "numbers from 0 to 1, got 0 to 7"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message, finished, tmp_path):
    if rows is not None:
        (tmp_path / "rows.txt").write_text(rows)
    values = {"init_from": str(finished[0]), "init_head_rows": str(tmp_path / "rows.txt")}
    with pytest.raises(UserError, match=message):
        loop.train(with_values(**values), str(tmp_path / "run"))


def test_missing_weights_are_reported_before_the_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", None)
    for call in (loop.train, loop.evaluate):
        with pytest.raises(UserError, match="Expected a folder of weights .* got .*nowhere"):
            call(with_values(init_from=str(tmp_path / "nowhere")), str(tmp_path))


def test_the_model_of_the_weights_is_named(tmp_path):
    model = dat_jax.create_model("dat_pp_nano", num_classes=2)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 48, 48, 3))),
    )
    export_model(tmp_path / "nano", model=model, variables=params)
    fresh = {"params": {"cls_head": {"kernel": np.zeros((7, 2), np.float32)}}}
    options = dict(fresh_variables=fresh, deformable_form="dat_pp")
    with pytest.raises(UserError, match=r"holds dat_pp_nano: set --config\.model\.name=dat_pp_nano"):
        load_for_finetuning(tmp_path / "nano", **options, model_name="dat_pp_tiny")
    with pytest.raises(UserError, match="and [0-9]+ more") as info:
        load_for_finetuning(tmp_path / "nano", **options, model_name="dat_pp_nano")
    assert len(str(info.value)) < 1000


@pytest.mark.slow
def test_weights_of_another_model_are_refused(finished, tmp_path):
    config = tiny_config.get_config(dim_stem=32, dims=(32,)).unlock()
    config.init_from = str(finished[0])
    with pytest.raises(UserError, match="These weights are of another model: .*: expected"):
        loop.train(config, str(tmp_path))
    with pytest.raises(UserError, match="Expected a folder of weights .* got .*nowhere"):
        loop.train(with_values(init_from=str(tmp_path / "nowhere")), str(tmp_path))


@pytest.mark.slow
def test_further_sets_are_evaluated_over_their_own_classes(finished, tmp_path):
    """A set with images of one class only: all of them are right, since nothing else can be predicted."""
    source = tiny_config._load_halves("validation")
    for index in range(7):
        (tmp_path / "left").mkdir(exist_ok=True)
        Image.fromarray(source.images[index]).save(tmp_path / "left" / f"{index}.png")
    result = loop.evaluate(with_values(**{"eval.sets.r": str(tmp_path), "ema_decay": 0.5}), str(finished[0]))
    assert {name: value for name, value in result.items() if "/" not in name} == finished[1]
    assert result["r/top1"] == 100.0
    assert result["r/examples"] == 7


@pytest.mark.slow
def test_a_renamed_class_folder_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a_one", "b_seven"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    values = {"data.name": "folders", "data.directory": str(tmp_path / "data"), "epochs": 1}
    loop.train(with_values(**values), str(tmp_path / "run"))
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a_one").rename(tmp_path / "data" / split / "z_one")
    for call in (loop.train, loop.evaluate):
        with pytest.raises(UserError, match="do not have a_one, .* do not have z_one"):
            call(with_values(**values), str(tmp_path / "run"))
    assert (tmp_path / "run" / "classes.txt").read_text() == "a_one\nb_seven\n"
