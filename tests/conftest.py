"""Strict by default: 8 virtual CPU devices, no implicit rank promotion, warnings are errors.

Tests compile far more than they compute, and many compile the same programs. Each worker keeps those that take longest, below
pytest's cache directory, for its other tests and for the next run. Programs that tests start do not.
"""

import gc
import os
import pathlib
import uuid

from experiments.soak.bucket_server import make_bucket, run_server
from tests.helpers.hub_server import run_hub_server, use_hub
from tests.helpers.launch_stand_ins import Machines
from tests.helpers.logs import collect_logs
from tests.helpers.xla_flags import fast_compilation_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing is written to the home directory, by programs neither
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", *fast_compilation_flags())
)

import jax
import pytest

jax.devices()  # XLA reads the flags now
# libtpu, which some tests load, reads them too, and ends the process at this one.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
jax.config.update("jax_numpy_rank_promotion", "raise")
PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS / os.environ.get("PYTEST_XDIST_WORKER", "main")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
gc.set_threshold(50_000, 50, 100)  # a quarter of the time of tracing is otherwise spent on looking for garbage


@pytest.fixture
def machines(tmp_path):
    """Stand-ins for the hosts of a run and for the programs that start them."""
    made = Machines(tmp_path)
    yield made
    made.end_all()


@pytest.fixture
def logs():
    """The messages that the package logs during a test."""
    with collect_logs() as messages:
        yield messages


@pytest.fixture
def x64():
    """float64 for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def pytest_collection_modifyitems(items):
    """Put the files that take longest first, so that workers end at about the same time.

    These are files with slow tests; among them those of whole programs in this folder, then trainings.
    """
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    here = pathlib.Path(__file__).parent
    items.sort(
        key=lambda item: (
            item.path not in slow_files,
            item.path.parent != here,
            item.path.parent.name != "training",
        )
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Several workers take whole files, in the order of collection, so that no fixture of a module is made twice."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def bucket_server():
    """URL of a storage server that the libraries of this process and of programs that tests start use for gs://."""
    with run_server() as url:
        os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
        yield url
        del os.environ["STORAGE_EMULATOR_HOST"], os.environ["TENSORSTORE_GCS_HTTP_URL"]


@pytest.fixture
def bucket(bucket_server):
    """A new bucket, such as gs://test-0123."""
    name = f"test-{uuid.uuid4().hex}"
    make_bucket(bucket_server, name)
    return f"gs://{name}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server without repositories that hf:// addresses refer to, with an empty cache."""
    with run_hub_server() as server:
        use_hub(server, tmp_path / "hub_cache", monkeypatch)
        yield server
