"""The cache of compiled programs, and compiler options that a version of XLA may not have."""

import ctypes
import os
import pathlib
import subprocess
import sys
import weakref

import jax
import pytest

from dat_jax.training.compilation import enable_cache, known_options, release_unused_memory
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config
from tests.helpers.logs import collect_logs
from tests.helpers.xla_flags import is_known

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def enabled():
    """Without the directory of the tests; nothing is compiled in these."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_where_programs_are_kept(enabled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert enable_cache("") is None
    assert jax.config.jax_compilation_cache_dir is None
    directory = enable_cache(str(tmp_path / "given"))
    assert directory.parent == tmp_path / "given"
    assert directory.name.startswith("cpu-")  # of this machine's processor
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert enable_cache("auto") == directory  # as if the user's environment had set it
    jax.config.update("jax_compilation_cache_dir", None)
    assert enable_cache("auto").parent == tmp_path / "xdg" / "dat_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
    jax.config.update("jax_compilation_cache_dir", None)
    assert enable_cache("auto").parent == tmp_path / "home" / ".cache" / "dat_jax"


def test_a_directory_that_cannot_be_written_is_a_warning(enabled, tmp_path):
    (tmp_path / "file").write_text("")
    with collect_logs() as messages:
        assert enable_cache(str(tmp_path / "file" / "cache")) is None
    assert len(messages) == 1
    assert messages[0].endswith("cannot be written: Not a directory.")
    assert jax.config.jax_compilation_cache_dir is None


@pytest.fixture
def turned_off():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def test_where_the_user_turned_it_off_it_stays_off(turned_off, tmp_path):
    assert enable_cache(str(tmp_path / "given")) is None
    assert not (tmp_path / "given").exists()


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    program = (
        "import jax, jax.numpy as jnp; from dat_jax.training.compilation import enable_cache;"
        f"enable_cache({str(tmp_path)!r});"
        "found = []; jax.monitoring.register_event_listener(lambda name, **_: found.append(name));"
        "print(jax.jit(lambda x: jnp.sin(x).sum())(jnp.ones(3)));"
        "print(sum(name.endswith('cache_hits') for name in found))"
    )
    environment = {
        **os.environ,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", program]
    options = dict(capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=True)
    (first, hits_first), (second, hits_second) = (subprocess.run(command, **options).stdout.split() for _ in range(2))
    assert first == second
    assert int(hits_first) == 0
    assert int(hits_second) > 0


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_is_returned_to_the_system():
    def read_resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(2**16) for _ in range(2000)]  # small enough for the heap, 131 MB
    kept = [bytearray(2**16) for _ in range(2)]  # at the end of the heap, which otherwise shrinks by itself
    del blocks
    before = read_resident()
    release_unused_memory()
    assert before - read_resident() > 60e6
    assert len(kept) == 2


def test_without_glibc_garbage_is_collected(monkeypatch):
    class Node:
        pass

    node = Node()
    node.itself = node  # only the garbage collector frees it
    freed = weakref.ref(node)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    del node
    release_unused_memory()
    assert freed() is None


def test_a_step_that_was_compiled_ahead_is_not_compiled_again(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    trainer = Trainer(tiny_config.get_config())
    state, batch = trainer.initialize(), trainer.put_batch(next(trainer.train_batches(start_step=0)))
    trainer.compile_train_step(state, batch)
    compiled = []

    def record(name, seconds, **_):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        jax.block_until_ready(trainer.train_step(state, batch))
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert not [name for name in compiled if "compile" in name]
