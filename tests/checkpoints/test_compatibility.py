"""Metadata of a checkpoint against the configuration of the run that restores it."""

import json

import pytest

from dat_jax.checkpoints import compatibility
from dat_jax.checkpoints.class_names import add_class_names
from dat_jax.errors import UserError
from tests.helpers import tiny_config
from tests.helpers.logs import collect_logs


def make_config(**values):
    config = tiny_config.get_config(deformable_form="dat_pp").unlock()
    config.update_from_flattened_dict(values)
    return config.lock()


NAMES = ("left", "right")
METADATA = json.loads(
    json.dumps(compatibility.describe(make_config(), step=3, class_names=NAMES))
)  # as a checkpoint stores it


def check(metadata=METADATA, class_names=NAMES, **values) -> list[str]:
    """What is logged."""
    with collect_logs() as messages:
        compatibility.check(metadata, make_config(**values), class_names=class_names)
    return messages


def test_metadata_has_the_position_in_the_data():
    assert (METADATA["examples"], METADATA["classes"]) == (48, 2)
    assert check() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("mesh.fsdp", 2), ("log_every", 1), ("data.workers", 3), ("checkpoint.keep", 7), ("logs", ()), ("tune", False)],
)
def test_keys_of_the_machine_and_of_logging_may_change(key, value):
    assert check(**{key: value}) == []


@pytest.mark.parametrize(("key", "value"), [("optimizer.name", "lion"), ("optimizer.freeze", ("backbone",))])
def test_the_state_of_another_optimizer_is_refused(key, value):
    with pytest.raises(UserError, match=rf"started with {key} .*, now .*--config.init_from"):
        check(**{key: value})


@pytest.mark.parametrize(
    ("name", "key", "value", "refused"),
    [
        ("adamw", "ema_decay", 0.5, True),
        ("adamw", "optimizer.clip_norm", 0.0, True),
        ("adamw", "optimizer.clip_norm", 1.0, False),
        ("adamw", "optimizer.b1", 0.5, False),
        ("schedule_free_adamw", "optimizer.b1", 0.5, True),
        ("adamw", "optimizer.adafactor.clip_rms", 0.0, False),
        ("adafactor", "optimizer.adafactor.clip_rms", 0.0, True),
        ("adafactor", "optimizer.adafactor.clip_rms", 2.0, False),
        ("adafactor", "optimizer.adafactor.momentum", 0.9, True),
        ("adafactor", "optimizer.adafactor.min_side", 4, True),
        ("adafactor", "optimizer.adafactor.scale_by_parameter", True, True),
    ],
)
def test_keys_that_determine_the_state_are_refused(name, key, value, refused):
    metadata = compatibility.describe(make_config(**{"optimizer.name": name}), step=3, class_names=NAMES)
    values = {"optimizer.name": name, key: value}
    if refused:
        with pytest.raises(
            UserError, match=rf"started with {key} .*, now {value}\. The state of its optimizer or average"
        ):
            check(metadata, **values)
    else:
        assert len(check(metadata, **values)) == 1


def test_checkpoints_of_the_first_versions_are_of_adamw():
    """Their configurations have no other keys of the optimizer than those of AdamW."""
    keys = ("b1", "b2", "eps", "weight_decay", "decay_rule", "clip_norm")
    optimizer = {key: METADATA["config"]["optimizer"][key] for key in keys}
    older = {**METADATA, "config": {**METADATA["config"], "optimizer": optimizer}}
    assert check(older) == []
    with pytest.raises(UserError, match=r"optimizer\.name adamw, now muon"):
        check(older, **{"optimizer.name": "muon"})


@pytest.mark.parametrize(
    ("key", "saved", "value"), [("epochs", 2, 9), ("optimizer.b1", 0.9, 0.5), ("model.remat", None, "x")]
)
def test_other_differences_are_logged(key, saved, value):
    if key == "model.remat":
        config = make_config().unlock()
        config.model.remat = value
        with collect_logs() as messages:
            compatibility.check(METADATA, config, class_names=NAMES)
    else:
        messages = check(**{key: value})
    assert len(messages) == 1
    assert f"{key} {saved}, now {value}" in messages[0]


@pytest.mark.parametrize(
    ("key", "saved", "value"), [("batch_size", 16, 8), ("seed", 0, 7), ("data.name", "halves", "x")]
)
def test_another_order_of_the_data_is_an_error(key, saved, value):
    with pytest.raises(UserError, match=f"started with {key} {saved}, now {value}"):
        check(**{key: value})
    compatibility.check_model(METADATA, make_config(**{key: value}), class_names=NAMES)


def test_another_model_is_an_error_also_with_the_same_shapes():
    with pytest.raises(UserError, match="of another model: model.offset_range_factors"):
        check(**{"model.offset_range_factors": (2,)})
    compatibility.check_model(METADATA, make_config(**{"model.dtype": "bfloat16"}), class_names=NAMES)


@pytest.mark.parametrize("metadata", [None, [], {}, {"config": 3, "classes": 2}, {"config": {}}])
def test_incomplete_metadata_is_an_error(metadata):
    with pytest.raises(UserError, match="does not record which model"):
        check(metadata)


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (("z_left", "right"), "do not have left, .* do not have z_left"),
        (("left", "right", "middle"), "do not have middle"),
        (("right",), "do not have left"),
        (("right", "left"), "class 0 is 'left', now 'right'"),
    ],
)
def test_other_class_names_are_an_error(class_names, message):
    with pytest.raises(UserError, match=message):
        check(class_names=class_names)


def test_class_names_of_an_older_checkpoint_are_those_of_the_work_directory(tmp_path):
    older = {key: value for key, value in METADATA.items() if key != "class_names"}
    assert check(add_class_names(older, tmp_path), class_names=("any", "name")) == []
    with pytest.raises(UserError, match="number of classes 2, now 3"):
        check(older, class_names=("a", "b", "c"))
    (tmp_path / "classes.txt").write_text("left\nright\n")
    assert check(add_class_names(older, tmp_path)) == []
    with pytest.raises(UserError, match="do not have z_left"):
        check(add_class_names(older, tmp_path), class_names=("z_left", "right"))
