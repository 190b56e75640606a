"""The comparison with PyTorch: its rows, and, where PyTorch is installed, its model and the modules of its parts."""

import pytest

from experiments.pytorch import benchmark, parts

SECONDS = {"dat_jax": 0.5, "PyTorch": 0.9, "PyTorch, compiled": 0.75}


def make_part(*, products):
    return parts.Part("MLP", channels=64, side=56, products=products, ours=list, peer=list)


def test_the_ratio_is_that_of_the_faster_peer():
    assert benchmark.format_times(8, "eval", {"seconds": SECONDS})["ratio"] == "1.50"
    row = parts.format_row(make_part(products=10**9), 8, gradient=False, result={"seconds": SECONDS}, speed=1e11)
    assert row["ratio"] == "1.50"
    assert row["products alone, ms"] == "80.0"


def test_a_gradient_has_three_times_the_products():
    row = parts.format_row(make_part(products=10**9), 8, gradient=True, result={"seconds": SECONDS}, speed=1e11)
    assert row["products alone, ms"] == "240"


def test_a_part_without_products_or_a_column_has_a_dash():
    result = {"seconds": {"dat_jax": 0.5, "PyTorch": 0.4}}
    row = parts.format_row(make_part(products=0), 8, gradient=False, result=result, speed=1e11)
    assert row["products alone, ms"] == "-"
    assert row["PyTorch, compiled, ms"] == "-"
    assert row["ratio"] == "0.80"


def test_a_failed_measurement_says_why():
    failed = {"failed": "ended by SIGKILL"}
    assert benchmark.format_times(8, "eval", failed)["ratio"] == "ended by SIGKILL"
    assert (
        parts.format_row(make_part(products=1), 8, gradient=False, result=failed, speed=1.0)["ratio"]
        == "ended by SIGKILL"
    )


@pytest.mark.slow
def test_the_peer_computes_the_same():
    pytest.importorskip("torch")
    differences = benchmark.compare("dat_pp_tiny")
    assert differences["logits"] < 1e-5
    assert differences["gradients"] < 1e-5


@pytest.mark.slow
def test_the_parts_of_both_have_the_same_parameters():
    pytest.importorskip("torch")
    import jax

    for part in parts.list_parts("dat_pp_tiny"):
        shape = jax.ShapeDtypeStruct((1, part.side, part.side, part.channels), "float32")
        ours = jax.eval_shape(part.ours().init, jax.random.key(0), shape)["params"]
        theirs = sum(parameter.numel() for parameter in part.peer().parameters())
        assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == theirs, part
