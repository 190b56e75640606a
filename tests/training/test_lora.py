"""Low-rank adapters: merged and applied, what learns, files of adapters, runs that start from other weights and are resumed."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import dat_jax
from dat_jax.checkpoints.adapters import FILE_NAME, apply_adapter, describe_base, save_adapter
from dat_jax.checkpoints.restore import initialize_state
from dat_jax.config import load_config
from dat_jax.errors import UserError
from dat_jax.models.layers import GeluLinear, Linear
from dat_jax.models.lora import init_adapters, merge_adapters
from dat_jax.training import loop, report
from dat_jax.training.optimizers.parameter_groups import without_frozen
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def make_params():
    """A model, its parameters with random adapters, and images."""
    model = dat_jax.create_model("dat_pp_nano", num_classes=10, **tiny_config.ONE_STAGE)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    adapters = init_adapters(jax.random.key(2), params, rank=3, layers=("attention", "mlp"))
    leaves = {
        name: jax.random.normal(jax.random.fold_in(jax.random.key(3), index), leaf.shape) * 0.3
        for index, (name, leaf) in enumerate(flatten_dict(adapters, sep="/").items())
    }
    return model, {**params, "lora": unflatten_dict(leaves, sep="/")}, images


def apply_unmerged(model, params, images, scale):
    """The logits, with each adapter as two further products beside its layer."""
    adapters = flatten_dict(params["lora"], sep="/")

    def add_adapter(call, arguments, keywords, context):
        out, name = call(*arguments, **keywords), "/".join(context.module.path)
        if context.method_name != "__call__" or f"{name}/a" not in adapters:
            return out
        used.append(name)
        x = nn.gelu(arguments[0], approximate=False) if isinstance(context.module, GeluLinear) else arguments[0]
        assert isinstance(context.module, GeluLinear | Linear)
        return out + scale * (x @ adapters[f"{name}/a"]) @ adapters[f"{name}/b"]

    used = []
    with nn.intercept_methods(add_adapter):
        logits = model.apply({"params": params}, images, train=False)
    assert sorted(used) == sorted(name.removesuffix("/a") for name in adapters if name.endswith("/a"))
    return logits


@pytest.mark.slow
def test_merged_adapters_equal_applied_ones(x64):
    """To 1e-6, in fact to 1e-12 in float64."""
    model, params, images = make_params()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    model, images = model.clone(dtype=jnp.float64), images.astype(jnp.float64)
    merged = merge_adapters(params, scale=0.5)
    assert "lora" not in merged
    apply = jax.jit(lambda params: model.apply({"params": params}, images, train=False))
    got, plain = apply(merged), apply({name: group for name, group in params.items() if name != "lora"})
    wanted = jax.jit(lambda params: apply_unmerged(model, params, images, 0.5))(params)
    assert np.abs(got - plain).max() > 1e-2
    np.testing.assert_allclose(got, wanted, atol=1e-12 * float(np.abs(wanted).max()))


def test_new_adapters_change_nothing_and_have_the_layers():
    model = dat_jax.create_model("dat_pp_nano", num_classes=10)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 48, 48, 3)))["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    adapters = init_adapters(jax.random.key(0), params, rank=2, layers=("attention",))
    jax.tree.map(np.testing.assert_array_equal, merge_adapters({**params, "lora": adapters}, scale=3.0), params)
    names = {"/".join(name.split("/")[2:]) for name in flatten_dict(adapters, sep="/")}
    layers = ("qkv", "proj", "proj_q", "proj_k", "proj_v", "proj_out")
    assert names == {f"attn/{layer}/{which}" for layer in layers for which in "ab"}
    block = adapters["stages_3"]["blocks_0"]["attn"]["proj_q"]
    assert (block["a"].shape, block["b"].shape) == ((192, 2), (2, 192))
    bound = 1 / np.sqrt(192)
    assert 0.9 * bound < np.abs(block["a"]).max() <= bound
    with pytest.raises(ValueError, match="no linear layers of mlp"):
        init_adapters(jax.random.key(0), {"stages_0": {"blocks_0": {"norm1": {}}}}, rank=2, layers=("mlp",))


def test_the_adapter_of_the_quickstart_is_small():
    config = load_config("quickstart").unlock()
    config.lora.rank = 2
    trainer = Trainer(config)
    params = trainer.abstract_state.params
    learned = without_frozen(params, trainer.groups.frozen)
    assert set(learned) == {"lora", "cls_head", "cls_norm"}
    everything, adapters, saved = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, params["lora"], learned)
    )
    assert adapters < saved < 0.05 * (everything - adapters)
    frozen, learning = trainer.describe_groups()
    assert "adapters" not in frozen
    assert "adapters of stages_0/blocks_0-1" in learning


def with_lora(**values):
    config = tiny_config.get_config().unlock()
    config.update_from_flattened_dict({"lora.rank": 2, "lora.alpha": 4.0, "ema_decay": 0.5, **values})
    return config.lock()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of one epoch."""
    directory = str(tmp_path_factory.mktemp("base"))
    loop.train(tiny_config.get_config(), directory, quiet=True)
    return directory


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A run with adapters that starts from ``base``, and its result."""
    directory = str(tmp_path_factory.mktemp("adapted"))
    return directory, loop.train(with_lora(init_from=base), directory, quiet=True)


def logits_of(model, variables):
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    return np.asarray(model.apply(variables, images, train=False))


@pytest.mark.slow
def test_a_run_keeps_the_weights_and_its_file_gives_the_same_model(base, adapted, tmp_path):
    directory, result = adapted
    model, variables = dat_jax.load(directory)
    assert "lora" not in variables["params"]
    wanted = logits_of(model, variables)
    arrays = safetensors.numpy.load_file(f"{directory}/{FILE_NAME}")
    assert {name.split(".")[0] for name in arrays} == {"lora", "cls_head", "cls_norm"}
    np.testing.assert_allclose(logits_of(*dat_jax.load(base, adapter=f"{directory}/{FILE_NAME}")), wanted, rtol=1e-6)
    assert np.abs(logits_of(*dat_jax.load(base)) - wanted).max() > 1e-3
    dat_jax.export_model(tmp_path / "export", model=model, variables=variables)
    np.testing.assert_array_equal(logits_of(*dat_jax.load(tmp_path / "export")), wanted)
    assert loop.evaluate(with_lora(), directory, quiet=True) == result


@pytest.mark.slow
def test_runs_with_adapters_are_resumed_and_started_from(adapted, tmp_path):
    directory, result = adapted
    assert loop.train(with_lora(init_from="nothing"), directory, quiet=True) == result
    with pytest.raises(UserError, match=r"another model: lora\.alpha 4\.0, now 2\.0"):
        loop.train(with_lora(**{"lora.alpha": 2.0}), directory, quiet=True)
    trainer = Trainer(with_lora(init_from=directory))
    state = initialize_state(trainer.config, **loop._state_options(trainer))
    params = dat_jax.load(directory)[1]["params"]
    merged = {name: group for name, group in state.params.items() if name != "lora"}
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    assert not any(np.any(leaf) for name, leaf in flatten_dict(state.params["lora"]).items() if name[-1] == "b")


LAYER = "lora.stages_0.blocks_0.mlp.linear1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora.stages_9.mlp.linear1.a": np.zeros((3, 2))}, r"lora\.stages_9\.mlp\.linear1\.a do"),
        ({f"{LAYER}.a": np.zeros((5, 2))}, "of another model"),
        ({"else": np.zeros(3)}, "else do"),
        ({f"{LAYER}.b": None}, r"or is incomplete: .*linear1\.a do"),
        ({f"{LAYER}.a": None}, r"or is incomplete: .*linear1\.b do"),
        ({f"{LAYER}.b": np.ones((3, 8))}, r"linear1\.a, .*linear1\.b do"),
        ({f"{LAYER}.a": np.ones((4, 3)), f"{LAYER}.b": np.ones((3, 8))}, "do not fit the weights"),
        ({f"{LAYER}.a": np.full((4, 2), np.nan)}, r"is damaged: .*linear1\.a are not finite"),
        ({"cls_norm.scale": np.ones(9)}, r"cls_norm\.scale do"),
        ({"cls_head.kernel": np.ones((8, 3))}, r"cls_head\.kernel do"),
        ({"cls_head.kernel": np.ones((8, 3)), "cls_head.bias": np.ones(2)}, r"cls_head\.bias, cls_head\.kernel do"),
        ({f"{LAYER}.a": None, f"{LAYER}.b": None}, "has no adapters"),
    ],
)
def test_files_of_other_models_are_refused(change, message, tmp_path):
    path = tmp_path / FILE_NAME
    base = {
        "stages_0": {"blocks_0": {"mlp": {"linear1": {"kernel": np.ones((4, 8), np.float32)}}}},
        "cls_norm": {"scale": np.ones(8)},
        "cls_head": {"kernel": np.ones((8, 5)), "bias": np.ones(5)},
    }
    arrays = {f"{LAYER}.a": np.ones((4, 2), np.float32), f"{LAYER}.b": np.ones((2, 8), np.float32)}
    arrays |= {"cls_head.kernel": np.zeros((8, 3)), "cls_head.bias": np.zeros(3)}
    params = unflatten_dict(arrays, sep=".")
    options = dict(alpha=1.0, rank=2, base=describe_base(base, arrays))
    save_adapter(path, variables={"params": params}, **options)
    params = apply_adapter(path, {"params": base})["params"]
    np.testing.assert_array_equal(params["stages_0"]["blocks_0"]["mlp"]["linear1"]["kernel"], np.full((4, 8), 2.0))
    np.testing.assert_array_equal(params["cls_head"]["kernel"], np.zeros((8, 3)))
    if "cls_head.kernel" in change and "cls_head.bias" not in change:
        del arrays["cls_head.bias"]
    arrays = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    save_adapter(path, variables={"params": unflatten_dict(arrays, sep=".")}, **options)
    with pytest.raises(UserError, match=message):
        apply_adapter(path, {"params": base})


def test_files_with_an_impossible_scale_are_refused(tmp_path):
    base = {"params": {"mlp": {"linear1": {"kernel": np.ones((4, 8), np.float32)}}}}
    adapters = {"lora": {"mlp": {"linear1": {"a": np.ones((4, 2)), "b": np.ones((2, 8))}}}}
    for alpha, rank in ((float("nan"), 2), (1.0, -2), (1.0, 0)):
        save_adapter(tmp_path / FILE_NAME, variables={"params": adapters}, alpha=alpha, rank=rank, base={})
        with pytest.raises(UserError, match=f"is damaged: alpha {alpha} and rank {rank}"):
            apply_adapter(tmp_path / FILE_NAME, base)


def test_statistics_of_batch_norm_are_those_of_the_file(tmp_path):
    """A segmentor whose head learns has other statistics than the one that the run started from."""
    kernel = {"blocks_0": {"mlp": {"linear1": {"kernel": np.ones((4, 8), np.float32)}}}}
    base = {"params": {"backbone": kernel}, "batch_stats": {"decode_head": {"mean": np.zeros(3)}}}
    adapters = init_adapters(jax.random.key(0), base["params"], rank=2, layers=("mlp",))
    learned = {"params": {"lora": adapters}, "batch_stats": {"decode_head": {"mean": np.ones(3)}}}
    save_adapter(tmp_path / FILE_NAME, variables=learned, alpha=1.0, rank=2, base=describe_base(base["params"], ()))
    adapted = apply_adapter(tmp_path / FILE_NAME, base)
    jax.tree.map(np.testing.assert_array_equal, adapted, {**base, "batch_stats": learned["batch_stats"]})


@pytest.mark.parametrize("changed", ["linear1", "norm"])
def test_adapters_of_other_weights_are_refused(changed, tmp_path):
    """The shapes are the same, so that the result would be silently wrong."""
    base = {"mlp": {"linear1": {"kernel": np.ones((4, 8), np.float32)}, "norm": {"scale": np.ones(4, np.float32)}}}
    base["table"] = np.ones((3, 3), np.float32)
    learned = {"lora": {"mlp": {"linear1": {"a": np.ones((4, 2), np.float32), "b": np.ones((2, 8), np.float32)}}}}
    save_adapter(tmp_path / FILE_NAME, variables={"params": learned}, alpha=1.0, rank=2, base=describe_base(base, ()))
    resized = {**base, "table": np.zeros((5, 5), np.float32)}  # as for images of another size
    apply_adapter(tmp_path / FILE_NAME, {"params": resized})
    other = jax.tree.map(np.copy, base)
    next(iter(other["mlp"][changed].values()))[-1] = 1.5
    with pytest.raises(UserError, match=rf"was trained on other weights than these: .* mlp\.{changed}\.\w+ differ"):
        apply_adapter(tmp_path / FILE_NAME, {"params": other})


def test_the_folder_of_a_run_is_not_a_file_of_adapters(tmp_path):
    with pytest.raises(UserError, match=r"is a folder: expected a file of adapters, such as .*adapter\.safetensors"):
        apply_adapter(tmp_path, {"params": {}})


@pytest.mark.parametrize("text", ["[]", '{"norm": 3}', "{"])
def test_a_damaged_description_of_the_base_weights_is_refused(text, tmp_path):
    adapters = {"lora.mlp.linear1.a": np.ones((4, 2), np.float32), "lora.mlp.linear1.b": np.ones((2, 8), np.float32)}
    safetensors.numpy.save_file(adapters, tmp_path / FILE_NAME, metadata={"alpha": "1.0", "rank": "2", "base": text})
    with pytest.raises(UserError, match="is not a file of adapters, or is damaged"):
        apply_adapter(tmp_path / FILE_NAME, {"params": {"mlp": {"linear1": {"kernel": np.ones((4, 8), np.float32)}}}})


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, logs):
    (tmp_path / FILE_NAME).mkdir()
    state = types.SimpleNamespace(params={"lora": {"a": np.ones(2)}})
    trainer = types.SimpleNamespace(config=with_lora(), get_learned_variables=lambda state: {"params": state.params})
    report.save_adapter(trainer, state, tmp_path)
    assert "The adapters could not be saved" in "".join(logs)


def test_every_kind_of_attention_has_adapters():
    """Spatial reduction (P) has linear layers of other names, beside a convolution."""
    settings = {**tiny_config.ONE_STAGE, "stages": ("NDLSEP",), "window_sizes": (4,), "reduction_ratios": (2,)}
    model = dat_jax.create_model("dat_pp_nano", num_classes=2, **settings)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    adapters = jax.eval_shape(
        lambda params: init_adapters(jax.random.key(0), params, rank=2, layers=("attention",)), params
    )
    layers = {block: set(group["attn"]) for block, group in adapters["stages_0"].items()}
    assert layers == {
        "blocks_0": {"qkv", "proj"},
        "blocks_1": {"proj_q", "proj_k", "proj_v", "proj_out"},
        "blocks_2": {"proj_qkv", "proj_out"},
        "blocks_3": {"proj_qkv", "proj_out"},
        "blocks_4": {"qkv", "proj"},
        "blocks_5": {"q", "kv", "proj"},
    }


def test_random_weights_that_never_learn_are_a_warning(logs):
    options = dict(class_names=("left", "right"), initialize=lambda: "state", initialize_from=None)
    assert initialize_state(tiny_config.get_config(), **options) == "state"
    assert not logs
    initialize_state(with_lora(), **options)
    assert "the frozen parameters keep their random values" in "".join(logs)


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"damaged")
    with pytest.raises(UserError, match="is not a file of adapters, or is damaged"):
        apply_adapter(tmp_path / FILE_NAME, {"params": {}})
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        apply_adapter(tmp_path / "missing.safetensors", {"params": {}})
