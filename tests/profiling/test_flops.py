"""FLOPs counted in traced programs."""

import jax
import jax.numpy as jnp
import pytest

from configs import dat_pp_t
from dat_jax.profiling.flops import count_product_flops
from dat_jax.profiling.step_report import StandIn
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def test_products_in_loops_and_branches_count_as_often_as_they_run():
    x = jnp.ones((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=5)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def convolved(x):
        return jax.lax.conv_general_dilated(
            jnp.ones((1, 6, 8, 8)), jnp.ones((2, 3, 3, 3)), (1, 1), "VALID", feature_group_count=2
        )

    product = 2 * 4**3
    for function, expected in [(scanned, 5 * product), (branched, 2 * product), (convolved, 2 * 2 * 36 * 27)]:
        assert count_product_flops(jax.make_jaxpr(jax.jit(function))(x).jaxpr) == expected


def make_sources(classes):
    return (StandIn(2048, tuple(map(str, range(classes)))),) * 2


@pytest.mark.slow
def test_model_flops_do_not_depend_on_rematerialization_and_accumulation():
    """The forward pass has 4.26 G multiply-adds, as published."""
    config = dat_pp_t.get_config().unlock()
    config.accumulate_steps = 2
    trainer = Trainer(config, sources=make_sources(1000))
    assert trainer.config.model.remat == "blocks"
    assert trainer.count_model_flops() == pytest.approx(3 * 2 * 4.26e9, rel=1e-3)


def test_model_flops_of_frozen_parameters_have_no_backward_pass():
    """Only the last norm and the head learn, and the head is a product of 4 numbers with a matrix of 4 x 10."""

    def count(*freeze):
        config = tiny_config.get_config(dim_stem=4, dims=(4,), num_heads=(1,), stages=("D",), key_strides=(4,)).unlock()
        config.optimizer.freeze = freeze
        return Trainer(config, sources=make_sources(10)).count_model_flops()

    everything, head = count(), count("all_but_head")
    assert head == everything / 3 + 2 * (2 * 4 * 10)
