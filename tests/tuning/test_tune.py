"""The choice of implementations by measurement, with kernels that are interpreted, wrong, slow or broken."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops import dispatch
from dat_jax.ops.attention.branches import deformable_branch, neighborhood_branch
from dat_jax.ops.attention.deformable import deformable_attention
from dat_jax.ops.attention.grid_sample import grid_sample
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.calls import recorded_calls
from dat_jax.ops.layers.depthwise import depthwise_conv
from dat_jax.ops.layers.local_perception import local_perception
from dat_jax.ops.layers.mlp import conv_mlp
from dat_jax.ops.layers.norm_linear import norm_linear
from dat_jax.ops.pallas import sampling
from dat_jax.tuning.candidates import find_default, get_tolerance, list_candidates
from dat_jax.tuning.choices import Choice
from dat_jax.tuning.measurement import Measurement, measure
from dat_jax.tuning.programs import count_examples, expect_whole_batch, make_arrays
from dat_jax.tuning.tune import choose, explain, tune

ones = jnp.ones


def record(function, *arguments, differentiated=True, **options):
    """Return the calls of an op that is called with arrays."""
    with recorded_calls(differentiated=differentiated) as calls:
        jax.eval_shape(lambda *arguments: function(*arguments, **options), *arguments)
    return calls


def record_sampling(*, differentiated=False, dtype=jnp.float32):
    return record(grid_sample, ones((3, 5, 6, 4), dtype), ones((3, 2, 7, 2)), differentiated=differentiated)


def plant(monkeypatch, change):
    """Replace the sampling kernel by ``change(features, points, kernel)``."""
    kernel = sampling.grid_sample
    monkeypatch.setattr(sampling, "grid_sample", lambda features, points: change(features, points, kernel))


@dispatch.interpreted_kernels()
def tune_sampling(**options):
    calls = record_sampling(**options)
    (key,) = calls
    return tune(calls)[key]


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_correct_kernel_is_timed_beside_the_others(differentiated):
    choice = tune_sampling(differentiated=differentiated)
    assert list(choice.measured) == ["gather", "matmul", "pallas"]
    assert choice.default == "gather"
    for measured in choice.measured.values():
        assert measured.problem == ""
        assert measured.seconds > 0
        assert measured.error < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_wrong_kernel_is_left_out_and_named(monkeypatch, logs, dtype):
    plant(monkeypatch, lambda features, points, kernel: kernel(features, points).at[0, 3].multiply(1.2))
    choice = tune_sampling(dtype=dtype)
    assert choice.chosen != "pallas"
    assert choice.measured["pallas"].seconds is None
    (message,) = [sentence for sentence in logs if "is not used" in sentence]
    assert message.startswith("grid_sample(features=")
    assert "pallas is not used, because its result differs by" in message


def test_a_kernel_with_a_wrong_gradient_is_left_out(monkeypatch, logs):
    def without_gradient(features, points, kernel):
        return kernel(features, jax.lax.stop_gradient(points))

    plant(monkeypatch, without_gradient)
    choice = tune_sampling(differentiated=True)
    assert choice.chosen != "pallas"
    assert "pallas is not used, because its gradient of points differs by 1 (at most 0.0001 is allowed)" in "\n".join(
        logs
    )


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_kernel_that_is_wrong_for_the_last_example_is_left_out(monkeypatch, differentiated):
    plant(monkeypatch, lambda features, points, kernel: kernel(features, points).at[-1, 3].multiply(1.2))
    choice = tune_sampling(differentiated=differentiated)
    assert "differs by" in choice.measured["pallas"].problem


def test_a_kernel_that_is_wrong_outside_the_map_is_left_out(monkeypatch):
    def clamp(features, points, kernel):
        return kernel(
            features, jnp.clip(points, 0, jnp.array(features.shape[1:3], jnp.float32).reshape(1, 1, 1, 2) - 1)
        )

    plant(monkeypatch, clamp)
    assert "its result differs by" in tune_sampling().measured["pallas"].problem


def test_the_gradient_of_an_only_key_is_zero_and_agrees():
    table = ones((2, 17, 15))
    with dispatch.interpreted_kernels():
        calls = record(
            lambda q, k, v, p, t: deformable_attention(q, k, v, points=p, table=t, num_heads=2, points_inside=True),
            *(MAP, ones((3, 1, 4)), ones((3, 1, 4)), ones((3, 1, 1, 2)), table),
        )
        call = next(iter(calls.values()))
        measured = measure(call, list_candidates(call))
    assert set(measured) == {"slice", "matmul", "pallas", "triton"}
    assert not any(value.problem for value in measured.values())


def test_a_call_that_cannot_be_compared_leaves_the_others_alone(logs):
    first, second = record_sampling(), record_sampling(differentiated=True)

    def fail_for_gradients(call, names):
        if call.differentiated:
            raise RuntimeError("RESOURCE_EXHAUSTED: too large\nmore")
        return {name: Measurement(seconds=1.0, error=0.0) for name in names}

    assert tune({**second, **first}, measure=fail_for_gradients).keys() == first.keys()
    assert "its implementations cannot be compared, so the default is used: RESOURCE_EXHAUSTED: too large" in "\n".join(
        logs
    )


def test_a_known_choice_that_cannot_run_here_is_measured_again():
    calls = record_sampling()
    (key,) = calls
    with dispatch.interpreted_kernels():
        known = {key: Choice("pallas", "gather", {"pallas": Measurement(seconds=1.0, error=0.0)})}
        assert tune(calls, known=known) == {}
    assert tune(calls, known=known).keys() == {key}


def test_nan_is_a_difference(monkeypatch):
    plant(monkeypatch, lambda features, points, kernel: kernel(features, points).at[0, 3].set(jnp.nan))
    assert "its result differs by nan" in tune_sampling().measured["pallas"].problem


def test_a_slow_kernel_is_not_chosen_and_the_ratio_is_named(monkeypatch, logs):
    def slow(features, points, kernel):
        out = kernel(features, points)
        shape = jax.ShapeDtypeStruct(out.shape, out.dtype)
        return jax.pure_callback(lambda x: (time.sleep(0.1), np.asarray(x))[1], shape, out)

    plant(monkeypatch, slow)
    choice = tune_sampling()
    assert choice.chosen != "pallas"
    assert choice.measured["pallas"].seconds >= 0.1
    assert "the kernel is not used, because it takes" in "\n".join(logs)


@pytest.mark.parametrize("error", [ValueError("no such layout"), NotImplementedError(), RuntimeError("one\ntwo")])
def test_a_kernel_that_cannot_be_compiled_is_left_out(monkeypatch, logs, error):
    def fail(features, points, kernel):
        raise error

    plant(monkeypatch, fail)
    choice = tune_sampling()
    reason = (str(error) or type(error).__name__).splitlines()[0]
    assert choice.chosen != "pallas"
    assert choice.measured["pallas"] == Measurement(problem=f"it cannot be compiled: {reason}")
    assert "pallas is not used, because it cannot be compiled" in "\n".join(logs)


def test_a_kernel_that_fails_while_it_runs_is_left_out(monkeypatch):
    def fail(features, points, kernel):
        out = kernel(features, points)

        def stop(_):
            raise RuntimeError("out of something")

        return jax.pure_callback(stop, jax.ShapeDtypeStruct(out.shape, out.dtype), out)

    plant(monkeypatch, fail)
    choice = tune_sampling()
    assert choice.chosen != "pallas"
    assert choice.measured["pallas"].problem.startswith("it fails: ")


def test_known_choices_are_not_measured_again():
    calls = record_sampling()

    measured = []

    def count(call, names):
        measured.append(call.key)
        return {name: Measurement(seconds=1.0, error=0.0) for name in names}

    known = tune(calls, measure=count)
    assert measured == list(calls) == list(known)
    assert tune(calls, known=known, measure=count) == {}
    assert measured == list(calls)


def test_the_fastest_without_a_problem_is_chosen_unless_the_default_is_as_fast():
    def fast(seconds):
        return Measurement(seconds=seconds, error=0.0)

    assert choose({"a": fast(2.0), "b": fast(1.0), "c": Measurement(problem="wrong")}, "a").chosen == "b"
    assert choose({"a": fast(1.02), "b": fast(1.0)}, "a").chosen == "a"
    assert choose({"a": Measurement(problem="x"), "b": fast(1.0)}, "a").chosen == "b"
    assert choose({"a": Measurement(bytes=5.0), "b": Measurement(bytes=4.0)}, "a").chosen == "b"


def test_if_every_implementation_has_a_problem_the_default_is_used_and_it_is_said():
    choice = choose({"a": Measurement(problem="wrong"), "b": Measurement(problem="broken")}, "a")
    assert choice.chosen == "a"
    (call,) = record_sampling().values()
    assert explain(call, choice)[-1].endswith("every implementation has a problem; a is used, as without a comparison.")


MAP, SIZES = ones((3, 9, 8, 4)), ones((3, 2), jnp.int32)
KEYS, POINTS, TABLE = ones((3, 6, 4)), ones((3, 1, 6, 2)), ones((2, 17, 15))
MLP = (ones((4, 8)), ones(8), ones((3, 3, 1, 8)), ones(8), ones((8, 4)), ones(4))
CALLS = {
    "neighborhood": (neighborhood_attention, (MAP, MAP, MAP, ones((2, 5, 5))), dict(kernel_size=3, num_heads=2)),
    "neighborhood with sizes": (
        lambda *args, **options: neighborhood_attention(*args[:-1], sizes=args[-1], **options),
        (MAP, MAP, MAP, ones((2, 5, 5)), SIZES),
        dict(kernel_size=3, num_heads=2),
    ),
    "deformable": (
        lambda q, k, v, p, t, **options: deformable_attention(q, k, v, points=p, table=t, **options),
        (MAP, KEYS, KEYS, POINTS, TABLE),
        dict(num_heads=2, points_inside=True),
    ),
    "deformable with another table": (
        lambda q, k, v, p, t, **options: deformable_attention(q, k, v, points=p, table=t, **options),
        (MAP, KEYS, KEYS, POINTS, ones((2, 11, 13))),
        dict(num_heads=2),
    ),
    "deformable with a bias": (
        lambda q, k, v, b, **options: deformable_attention(q, k, v, bias=b, **options),
        (MAP, KEYS, KEYS, ones((1, 2, 72, 6))),
        dict(num_heads=2),
    ),
    "deformable with sizes": (
        lambda q, k, v, p, t, s, m, **options: deformable_attention(
            q, k, v, points=p, table=t, sizes=s, key_mask=m, **options
        ),
        (MAP, KEYS, KEYS, POINTS, TABLE, SIZES, ones((3, 6), bool)),
        dict(num_heads=2),
    ),
    "MLP": (conv_mlp, (MAP, *MLP), {}),
    "MLP as a branch": (
        lambda *args: conv_mlp(*args[:7], norm_scale=args[7], norm_bias=args[8], factors=args[9]),
        (MAP, *MLP, ones(4), ones(4), ones(3)),
        {},
    ),
    "local perception": (local_perception, (MAP, ones((3, 3, 1, 4)), ones(4)), {}),
    "norm and linear": (norm_linear, (MAP, ones(4), ones(4), ones((4, 6)), ones(6)), {}),
    "neighborhood branch": (
        neighborhood_branch,
        (MAP, ones(4), ones(4), ones((4, 12)), ones(12), ones((2, 5, 5)), ones((4, 4)), ones(4), ones(3)),
        dict(kernel_size=3, num_heads=2),
    ),
    "deformable branch": (
        deformable_branch,
        (MAP, ones(4), ones(4), ones((4, 4)), ones(4), KEYS, KEYS, POINTS, TABLE, ones((4, 4)), ones(4), ones(3)),
        dict(num_heads=2),
    ),
    "convolution": (depthwise_conv, (MAP, ones((5, 5, 1, 4))), dict(stride=2, padding=2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_all_implementations_of_every_op_agree(name):
    function, arguments, options = CALLS[name]
    with dispatch.interpreted_kernels():
        call = next(iter(record(function, *arguments, **options).values()))
        names = list_candidates(call)
        measured = measure(call, names)
    assert names[0] == find_default(call)
    assert len(set(names)) == len(names)
    assert ("pallas" in names) == ("sizes" not in name and name != "convolution")
    is_attention = name.startswith(("neighborhood", "deformable")) and not name.endswith("branch")
    assert ("triton" in names) == (is_attention and "sizes" not in name)
    for value in measured.values():
        assert value.problem == ""
        assert value.error < 2e-5


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("float16", False), ("bfloat16", False)])
def test_the_tolerance_follows_from_the_dtype(dtype, exact):
    (call,) = record_sampling(dtype=dtype).values()
    assert get_tolerance(call) == (1e-4 if exact else 0.03)
    with dispatch.compiling_for("gpu"):  # which rounds products of float32
        assert get_tolerance(call) == 0.03


def test_kernels_are_candidates_only_where_they_can_run():
    (call,) = record(*CALLS["neighborhood"][:1], *CALLS["neighborhood"][1], **CALLS["neighborhood"][2]).values()
    assert list_candidates(call) == ["dense", "tiles", "rows"]
    with dispatch.compiling_for("tpu"):
        assert list_candidates(call) == ["dense", "tiles", "pallas"]
    with dispatch.compiling_for("gpu"):
        assert list_candidates(call) == ["dense", "tiles", "triton"]
    x = ones((1, 96, 96, 4))
    (call,) = record(neighborhood_attention, x, x, x, ones((2, 5, 5)), kernel_size=3, num_heads=2).values()
    with dispatch.compiling_for("tpu"):
        assert list_candidates(call) == ["tiles", "pallas"]
    with dispatch.compiling_for("gpu"):
        assert list_candidates(call) == ["tiles", "triton"]
    (call,) = record(grid_sample, x, ones((1, 1, 5, 2))).values()
    with dispatch.compiling_for("tpu"):
        assert list_candidates(call) == ["gather", "matmul"]  # sampling of a large map has no kernel
    on_gpus = {
        "deformable": ["matmul", "slice", "triton"],
        "deformable with sizes": ["matmul"],
        "MLP": ["products"],
    }
    for name, expected in on_gpus.items():
        function, arguments, options = CALLS[name]
        call = next(iter(record(function, *arguments, **options).values()))
        with dispatch.compiling_for("gpu"):
            assert list_candidates(call) == expected


def test_arrays_are_valid_and_always_the_same():
    calls = record(*CALLS["deformable with sizes"][:1], *CALLS["deformable with sizes"][1], num_heads=2)
    (call,) = calls.values()
    arrays = make_arrays(call, examples=3)
    assert {name: array.shape for name, array in arrays.items()} == {name: shape for name, shape, _ in call.arrays}
    points = arrays["points"]
    assert points.min() < 0
    assert (points.max((0, 1, 2)) > [8, 7]).any()
    assert (arrays["sizes"] == [9, 8]).all()
    assert arrays["key_mask"][:, 0].all()
    for name, array in make_arrays(call, examples=3).items():
        np.testing.assert_array_equal(array, arrays[name])
    inside = next(iter(record(*CALLS["deformable"][:1], *CALLS["deformable"][1], **CALLS["deformable"][2]).values()))
    points = make_arrays(inside, examples=3)["points"]
    assert points.min() >= 0
    assert (points.max((0, 1, 2)) <= [8, 7]).all()


def test_a_batch_repeats_examples_and_what_is_expected_of_it_is_known():
    assert [count_examples(batch) for batch in (1, 2, 3, 4, 7, 9, 128)] == [1, 2, 3, 2, 7, 3, 2]
    x, kernel = ones((4, 5, 5, 2)), ones((3, 3, 1, 2))
    (call,) = record(depthwise_conv, x, kernel, padding=1).values()
    arrays = make_arrays(call, examples=2)
    np.testing.assert_array_equal(arrays["x"][2:], arrays["x"][:2])
    assert (arrays["x"][0] != arrays["x"][1]).any()
    results = {"result": np.array([1, 2]), "x": np.array([3, 4]), "kernel": np.array([5, 6])}
    whole = expect_whole_batch(call, results, 2)
    assert {name: array.tolist() for name, array in whole.items()} == {
        "result": [1, 2, 1, 2],
        "x": [3, 4, 3, 4],
        "kernel": [10, 12],
    }
