"""Models on meshes with Auto and Explicit axes."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dat_jax

IMAGES = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)


def make_mesh(axis_type=AxisType.Explicit):
    return jax.make_mesh((8,), ("d",), axis_types=(axis_type,))


def make_classifier(*stages, **overrides):
    def per_stage(value):
        return (value,) * len(stages)

    settings = dict(
        num_classes=5,
        image_size=32,
        dim_stem=8,
        dims=per_stage(8),
        stages=stages,
        num_heads=per_stage(2),
        num_groups=per_stage(1),
        key_strides=per_stage(1),
        offset_kernels=per_stage(3),
        offset_range_factors=per_stage(-1),
        position_bias=per_stage("table"),
        use_offsets=per_stage(True),
        window_sizes=per_stage(3),
        neighborhood_sizes=per_stage(3),
        reduction_ratios=per_stage(1),
        lpu=per_stage(True),
        conv_mlp=per_stage(True),
        layer_scale_init=per_stage(-1),
    )
    return dat_jax.DAT(**{**settings, **overrides})


def zeros(model):
    """Variables of the model's shapes."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), IMAGES))


def place(variables, mesh):
    """Replicated variables, and images split along the batch."""
    return jax.device_put(variables, NamedSharding(mesh, P())), jax.device_put(IMAGES, NamedSharding(mesh, P("d")))


def loss_and_outputs(model):
    def loss(variables, images):
        outputs = model.apply(variables, images)
        return sum((leaf**2).mean() for leaf in jax.tree.leaves(outputs)), outputs

    return jax.value_and_grad(loss, has_aux=True)


def check_trace(model, *, use_context):
    """Traces the gradient, where jax refuses shardings that it cannot infer, and checks the shardings of the results."""
    mesh = make_mesh()
    variables, images = place(zeros(model), mesh)
    with jax.set_mesh(mesh) if use_context else contextlib.nullcontext():
        (_, outputs), gradients = jax.eval_shape(loss_and_outputs(model), variables, images)
    assert all(leaf.sharding.spec[0] == "d" for leaf in jax.tree.leaves(outputs))
    assert not any(any(leaf.sharding.spec) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("use_context", [True, False])
@pytest.mark.parametrize("kinds", ["ND", "LS", "PE", "X"])
def test_explicit_axes_with_every_block_type(kinds, use_context):
    check_trace(make_classifier(kinds), use_context=use_context)


def test_explicit_axes_with_scanned_and_recomputed_blocks():
    check_trace(make_classifier("NN", scan_blocks=True, remat="blocks"), use_context=True)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "sem_fpn", "retinanet"])
def test_explicit_axes_with_heads(head):
    dat = make_classifier("N", "X", "X", "X")
    if head == "retinanet":
        model = dat_jax.create_detector(head, backbone=dat, num_classes=3, features=8, depth=1)
    else:
        model = dat_jax.create_segmentor(head, backbone=dat, num_classes=3, channels=8)
    check_trace(model, use_context=True)


def test_explicit_axes_with_returned_collections():
    model, mesh = make_classifier("D"), make_mesh()
    variables, images = place(zeros(model), mesh)

    def apply(variables, images):
        return model.apply(variables, images, mutable=["intermediates"])

    with jax.set_mesh(mesh):
        initial = jax.eval_shape(model.init, jax.random.key(0), images)
        logits, state = jax.eval_shape(apply, variables, images)
    assert logits.sharding.spec[0] == "d"
    assert all(leaf.sharding.spec[0] == "d" for leaf in jax.tree.leaves(state))
    assert not any(any(leaf.sharding.spec) for leaf in jax.tree.leaves(initial))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_values_and_gradients_do_not_depend_on_the_mesh(axis_type):
    model = make_classifier("ND")
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    expected = jax.jit(loss_and_outputs(model))(variables, IMAGES)
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        results = jax.jit(loss_and_outputs(model))(*place(variables, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results, expected)
    assert results[0][1].sharding.is_equivalent_to(NamedSharding(mesh, P("d")), 2)


def test_program_without_a_mesh_is_the_same():
    model = make_classifier("X")
    variables = zeros(model)

    def lower(apply):
        def program(variables, images):
            return apply(model, variables, jnp.asarray(images))

        return jax.jit(program).lower(variables, IMAGES).as_text()

    assert lower(type(model).apply) == lower(nn.Module.apply)


def test_the_summary_of_flax_works():
    model = make_classifier("LS")
    assert "cls_head" in model.tabulate(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), console_kwargs={"width": 200})
