import jax
import pytest

from dat_jax.training.compiler_options import known_options
from tests.helpers.xla_flags import is_known


def test_options_that_this_version_lacks_are_left_out():
    options = {"xla_backend_optimization_level": 0, "xla_no_version_has_this_option": True}
    assert known_options(options) == {"xla_backend_optimization_level": 0}


def test_no_options_are_none():
    assert known_options({}) is None


def test_a_wrong_value_of_a_known_option_is_an_error():
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_backend_optimization_level"):
        known_options({"xla_backend_optimization_level": "fast"})


def test_flags_are_tried_in_another_process_before_they_are_set():
    assert is_known("--xla_backend_optimization_level=0")
    assert not is_known("--xla_no_version_has_this_flag=true")
