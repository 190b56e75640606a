"""Folders of weights, work directories as models, and weights adapted to another size or other classes."""

import json
import pathlib
import shutil
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.checkpoints.adaptation import adapt_input_kernel, adapt_params, resize_bicubic
from dat_jax.checkpoints.exports import export_model, load_export, save_export
from dat_jax.checkpoints.loading import load_for_finetuning, load_trained
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.checkpoints.model_description import describe_model
from dat_jax.errors import UserError
from dat_jax.training.state import TrainState
from tests.helpers.random_variables import random_variables

TINY = dict(
    image_size=64,
    dim_stem=16,
    dims=(16, 16),
    stages=("D", "L"),
    num_heads=(2, 2),
    num_groups=(1, 1),
    key_strides=(4, 1),
    offset_kernels=(3, 3),
    offset_range_factors=(-1, -1),
    position_bias=("table", "table"),
    use_offsets=(True, True),
    window_sizes=(7, 4),
    neighborhood_sizes=(3, 3),
    reduction_ratios=(1, 1),
    lpu=(True, False),
    conv_mlp=(True, False),
    layer_scale_init=(-1, -1),
)
RPE, WINDOW = "stages_0/blocks_0/attn/rpe_table", "stages_1/blocks_0/attn/relative_position_bias_table"


def tiny(seed=0, **settings):
    model = dat_jax.create_model("dat_pp_nano", **{**TINY, "num_classes": 6, **settings})
    return model, random_variables(model, np.zeros((1, 64, 64, 3), np.float32), seed=seed)["params"]


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


def assert_same(got, wanted):
    got, wanted = flat(got), flat(wanted)
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A folder of weights, which tests only read, with the model and parameters in it."""
    directory = tmp_path_factory.mktemp("export") / "export"
    model, params = tiny()
    export_model(directory, model=model, variables={"params": params})
    return directory, model, params


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Work directory of a run with three evaluations, the second the best, and the averaged weights of that one."""
    directory = tmp_path_factory.mktemp("run")
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in TINY.items()}
    config = {"task": "classification", "model": {"name": "dat_pp_nano", "dtype": "auto", **settings}}
    (directory / "config.json").write_text(json.dumps(config))
    averaged = {step: tiny(seed=10 + step)[1] for step in (1, 2, 3)}
    with Checkpoints(directory / "checkpoints", metric="top1") as checkpoints:
        for step, top1 in {1: 50.0, 2: 90.0, 3: 70.0}.items():
            params = tiny(seed=step)[1]
            moments = {"mu": params, "count": jnp.int32(step)}
            state = TrainState(jnp.int32(step), params, {}, (moments,), averaged[step])
            checkpoints.save(jax.device_put(state), metadata={"examples": 0}, metrics={"top1": top1})
    return directory, averaged[2]


def test_arrays_are_restored_exactly(tmp_path):
    params = {
        "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": jnp.ones(3, jnp.bfloat16)},
        "scalar": np.array(2, np.int32),
    }
    written = save_export(tmp_path / "new" / "export", params=params, description={"model": {"dims": (1, 2)}})
    loaded, description = load_export(tmp_path / "new" / "export")
    assert_same(loaded, params)
    assert isinstance(loaded["a"]["bias"], np.ndarray)
    assert description == {"model": {"dims": [1, 2]}, "checksum": written}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["export"]


def test_existing_files_are_not_overwritten(export, tmp_path):
    directory, model, params = export
    with pytest.raises(UserError, match="export exists already and nothing is overwritten"):
        export_model(directory, model=model, variables={"params": params})
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"out cannot be written: Not a directory\."):
        export_model(tmp_path / "file" / "out", model=model, variables={"params": params})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_export_leaves_nothing(export, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_export(tmp_path / "out", params={"a": np.ones(2)}, description={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "removed", "another"])
def test_damaged_arrays_are_named(damage, export, tmp_path):
    directory = shutil.copytree(export[0], tmp_path / "copy")
    folder = directory / "params" / "cls_head.kernel"
    if damage == "cut":
        chunk = folder / "0.0"
        chunk.write_bytes(chunk.read_bytes()[:-9])
    elif damage == "removed":
        shutil.rmtree(folder)
    else:
        save_export(tmp_path / "other", params={"cls_head": {"kernel": np.ones((16, 6), np.float32)}}, description={})
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "other" / "params" / "cls_head.kernel", folder)
    with pytest.raises(UserError, match=r"copy is damaged: cls_head/kernel (cannot be read|differs)"):
        load_export(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"arrays": {"a": 3}, "checksum": ""}'])
def test_a_damaged_description_is_an_error(text, export, tmp_path):
    directory = shutil.copytree(export[0], tmp_path / "copy")
    (directory / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"copy is not a folder of weights, or its model\.json is damaged"):
        dat_jax.load_pretrained(directory)


def test_an_array_missing_from_the_description_is_an_error(export, tmp_path):
    directory = shutil.copytree(export[0], tmp_path / "copy")
    manifest = json.loads((directory / "model.json").read_text())
    del manifest["arrays"]["cls_head/bias"]
    (directory / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged"):
        load_export(directory)


def test_the_model_of_an_export_is_restored(export):
    directory, wanted, params = export
    model, variables = dat_jax.load_pretrained(str(directory))
    assert model == wanted
    assert_same(variables["params"], params)
    model, _ = dat_jax.load_pretrained(directory, dtype=jnp.bfloat16, drop_path_rate=0.3)
    assert (model.dtype, model.drop_path_rate, model.dims) == (jnp.bfloat16, 0.3, (16, 16))


def test_every_attribute_that_determines_the_function_is_described():
    model = dat_jax.create_model("dat_tiny", image_size=(96, 64), layer_scale_init=(1e-5,) * 4)
    described = json.loads(json.dumps(describe_model(model)))
    assert not {"dtype", "implementation", "parent", "name"} & set(described)
    restored = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
    assert dat_jax.DAT(**restored) == model


def test_the_best_averaged_weights_of_a_run_are_loaded(workdir):
    directory, averaged = workdir
    model, variables = load_trained(directory)
    params = variables["params"]
    assert model == tiny()[0]
    assert_same(params, averaged)
    _, variables = dat_jax.load_pretrained(directory)
    assert_same(variables["params"], averaged)


def test_weights_of_a_run_without_averaging_are_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"name": "dat_pp_nano", **TINY}}))
    _, params = tiny()
    with Checkpoints(tmp_path / "checkpoints", metric="top1") as checkpoints:
        state = jax.device_put(TrainState(jnp.int32(1), params, {}, (), None))
        checkpoints.save(state, metadata={"examples": 0}, metrics={"top1": 1.0})
    assert_same(load_trained(tmp_path)[1]["params"], params)


def test_a_damaged_or_incomplete_run_is_an_error(workdir, tmp_path):
    directory = shutil.copytree(workdir[0], tmp_path / "copy")
    best, newest = directory / "checkpoints" / "2" / "state", directory / "checkpoints" / "3" / "state"
    shutil.rmtree(best)
    shutil.copytree(newest, best)
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged: .*ema_params/cls_head/kernel differs"):
        load_trained(directory)
    for path in best.rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read: "):
        load_trained(directory)
    (directory / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json does not describe the model"):
        load_trained(directory)
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints").mkdir()
    (directory / "config.json").write_text(json.dumps({"model": {"name": "dat_pp_nano"}}))
    with pytest.raises(UserError, match="There is no complete checkpoint in"):
        load_trained(directory)
    with pytest.raises(UserError, match=r"Expected a folder of weights \(with model\.json\) or the work directory"):
        load_trained(tmp_path)


def test_the_name_of_a_model_is_not_a_path_to_load_from():
    with pytest.raises(
        UserError, match=r"^dat_pp_tiny is the name .* weights are not downloaded: .*dat_jax\.conversion"
    ):
        dat_jax.load("dat_pp_tiny")


def test_bicubic_resizing_equals_that_of_pytorch():
    """Recorded from torch.nn.functional.interpolate(mode="bicubic", align_corners=False) in float64."""
    table = np.array([[0, 1, 4], [2, -3, 5], [1, 0, -2]])
    wanted = [
        [0.07646875, 3.38846875],
        [0.282890625, 3.552843750],
        [0.5859375, 3.01171875],
        [0.7771875, 0.17559375],
        [0.8685, -2.02303125],
    ]
    np.testing.assert_allclose(resize_bicubic(table, (5, 2)), wanted, rtol=1e-13)
    np.testing.assert_allclose(resize_bicubic(table, (3, 3)), table, atol=1e-15)
    np.testing.assert_array_equal(resize_bicubic(np.stack([table, -table]), (5, 2))[1], -resize_bicubic(table, (5, 2)))


def test_only_position_tables_are_resized():
    _, params = tiny()
    _, wanted = tiny(seed=1, image_size=96, window_sizes=(7, 5))
    adapted, notes = adapt_params(params, abstract_params=jax.eval_shape(lambda: wanted))
    given, adapted = flat(params), flat(adapted)
    np.testing.assert_array_equal(adapted[RPE], resize_bicubic(given[RPE], (47, 47)).astype(np.float32))
    for head in range(2):
        table = resize_bicubic(given[WINDOW][:, head].reshape(7, 7), (9, 9))
        np.testing.assert_array_equal(adapted[WINDOW][:, head].reshape(9, 9), table.astype(np.float32))
    for name in set(given) - {RPE, WINDOW}:
        np.testing.assert_array_equal(adapted[name], given[name])
    assert sorted(notes) == [
        "Position tables resized from 31 x 31 to 47 x 47: 1.",
        "Position tables resized from 7 x 7 to 9 x 9: 1.",
    ]
    assert adapt_params(params, abstract_params=params)[1] == []


def test_a_fixed_bias_is_not_resized():
    params = {"stages_0": {"attn": {"rpe_table": np.ones((2, 9, 9))}}, "cls_head": {"kernel": np.ones((3, 2))}}
    wanted = {"stages_0": {"attn": {"rpe_table": np.ones((2, 25, 25))}}, "cls_head": {"kernel": np.ones((3, 2))}}
    adapt_params(params, abstract_params=wanted)
    with pytest.raises(UserError, match=r"stages_0/attn/rpe_table: expected \(2, 25, 25\), got \(2, 9, 9\)"):
        adapt_params(params, abstract_params=wanted, fixed_stages={0})


def test_a_head_for_other_classes_is_initialized_or_has_selected_rows():
    _, params = tiny()
    _, fresh = tiny(seed=1, num_classes=4)
    adapted, notes = adapt_params(params, abstract_params=fresh)
    assert_same(adapted, {**params, "cls_head": fresh["cls_head"]})
    assert notes == ["The head for 4 classes is initialized: the trained one is for 6."]
    rows = np.array([5, 0, 2, 2])
    adapted, notes = adapt_params(params, abstract_params=fresh, head_rows=rows)
    head = params["cls_head"]
    assert_same(adapted, {**params, "cls_head": {"kernel": head["kernel"][:, rows], "bias": head["bias"][rows]}})
    assert notes == ["The head has 4 of the 6 classes of the trained one."]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1, 2], r"one integer for each of 4 classes, got int64 \(3,\)"),
        ([0.0, 1.0, 2.0, 3.0], "one integer for each of 4 classes"),
        ([0, 1, 2, 6], "numbers from 0 to 5, got 0 to 6"),
        ([-1, 1, 2, 3], "numbers from 0 to 5, got -1 to 3"),
    ],
)
def test_invalid_rows_of_the_head_are_an_error(rows, message):
    with pytest.raises(UserError, match=message):
        adapt_params(tiny()[1], abstract_params=tiny(num_classes=4)[1], head_rows=np.array(rows))


def test_other_differences_of_each_kind_are_named():
    _, params = tiny()
    _, wanted = tiny(dims=(16, 32), num_heads=(4, 2), lpu=(False, True))
    with pytest.raises(UserError, match="These weights are of another model") as info:
        adapt_params(params, abstract_params=wanted)
    for part in (
        "cls_head/kernel: expected (32, 6), got (16, 6)",
        "stages_1/blocks_0/lpu/kernel is missing",
        "stages_0/blocks_0/lpu/kernel is unknown",
    ):
        assert part in str(info.value)
    with pytest.raises(UserError, match="no cls_head"):
        adapt_params({"stages_0": {}}, abstract_params=wanted)


def test_a_model_with_other_classes_and_image_size_runs(export):
    directory, _, params = export
    model, variables = dat_jax.load_pretrained(directory, num_classes=4, image_size=96)
    images = np.random.default_rng(0).standard_normal((1, 96, 96, 3)).astype(np.float32)
    logits = jax.jit(lambda v: model.apply(v, images, train=False))(variables)
    assert logits.shape == (1, 4)
    assert np.isfinite(logits).all()
    head = variables["params"]["cls_head"]
    assert 0 < np.abs(head["kernel"]).max() <= 1 / np.sqrt(16)  # as initialised
    rest = {name: array for name, array in flat(params).items() if name != RPE and not name.startswith("cls_head")}
    for name, array in rest.items():
        np.testing.assert_array_equal(flat(variables["params"])[name], array)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(num_clases=4), "DAT has no attribute 'num_clases', did you mean 'num_classes'"),
        (dict(dims=(32, 32)), "These weights are of another model: .*cls_head/kernel"),
        (dict(num_heads=(3, 2)), "3 heads do not divide 16"),
        (dict(dims=(16,)), "one entry for each of the 2 stages"),
    ],
)
def test_invalid_attributes_are_an_error(overrides, message, export):
    with pytest.raises(UserError, match=message):
        dat_jax.load_pretrained(export[0], **overrides)


def test_weights_for_finetuning_are_host_arrays_with_the_dtypes_of_the_new_model(export, workdir):
    _, fresh = tiny(seed=3, num_classes=4, image_size=96)
    fresh = jax.tree.map(jnp.asarray, fresh)
    fresh["cls_norm"]["bias"] = fresh["cls_norm"]["bias"].astype(jnp.bfloat16)
    for path, given in ((export[0], export[2]), workdir):
        variables, notes = load_for_finetuning(path, fresh_variables={"params": fresh}, deformable_form="dat_pp")
        params = variables["params"]
        for got, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(fresh), strict=True):
            assert isinstance(got, np.ndarray)
            assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_array_equal(params["cls_norm"]["scale"], given["cls_norm"]["scale"])
        np.testing.assert_array_equal(params["cls_head"]["kernel"], fresh["cls_head"]["kernel"])
        assert len(notes) == 2
    rows = np.array([3, 1, 0, 5])
    variables, _ = load_for_finetuning(
        export[0], fresh_variables={"params": fresh}, deformable_form="dat_pp", head_rows=rows
    )
    params = variables["params"]
    np.testing.assert_array_equal(params["cls_head"]["bias"], export[2]["cls_head"]["bias"][rows])


def test_importing_the_package_does_not_import_orbax():
    code = "import dat_jax, sys; print([name for name in sys.modules if name.split('.')[0] in ('orbax', 'matplotlib')])"
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert result.stdout.strip() == "[]"


def test_the_first_kernel_is_adapted_as_by_timm():
    """By hand: the RGB kernels are summed for one channel; for 5 they are R, G, B, R and G times 3/5."""
    kernel = np.array([[[[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]]], np.float32)
    assert adapt_input_kernel(kernel, 1).tolist() == [[[[7.0, 70.0]]]]
    expected = 0.6 * np.array([[1, 10], [2, 20], [4, 40], [1, 10], [2, 20]])
    np.testing.assert_allclose(adapt_input_kernel(kernel, 5)[0, 0], expected, rtol=1e-6)
    assert adapt_input_kernel(kernel, 12).shape == (1, 1, 12, 2)
    with pytest.raises(UserError, match="for images with 5 channels: expected weights for 2, or for RGB"):
        adapt_input_kernel(adapt_input_kernel(kernel, 5), 2)


def test_rgb_weights_are_loaded_for_other_channels(tmp_path):
    """An image whose channels are equal gives the same logits."""
    model, params = tiny()
    export_model(tmp_path / "rgb", model=model, variables={"params": params})
    gray = np.random.default_rng(0).standard_normal((2, 64, 64, 1)).astype(np.float32)
    expected = jax.jit(model.apply)({"params": params}, np.repeat(gray, 3, axis=-1))
    for channels in (1, 6):
        adapted_model, adapted = dat_jax.load(tmp_path / "rgb", in_channels=channels)
        logits = jax.jit(adapted_model.apply)(adapted, np.repeat(gray, channels, axis=-1))
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    export_model(tmp_path / "six", model=adapted_model, variables=adapted)
    assert dat_jax.load(tmp_path / "six")[0].in_channels == 6
    with pytest.raises(UserError, match="for images with 6 channels: expected weights for 4"):
        dat_jax.load(tmp_path / "six", in_channels=4)
