"""Where compiled programs are kept, and that a second process finds them."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from dat_jax.training import compilation_cache

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def enabled():
    """The tests run without a cache; nothing is compiled in these."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_compilation_cache_dir", before)


def no_note(text):
    raise AssertionError(text)


def test_where_programs_are_kept(enabled, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compilation_cache.enable("", note=no_note) is None
    assert jax.config.jax_compilation_cache_dir is None
    directory = compilation_cache.enable(str(tmp_path / "given"), note=no_note)
    assert directory.parent == tmp_path / "given"
    assert directory.name.startswith("cpu-")  # of this machine's processor
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert compilation_cache.enable("auto", note=no_note) == directory  # as if the user's environment had set it
    jax.config.update("jax_compilation_cache_dir", None)
    assert compilation_cache.enable("auto", note=no_note).parent == tmp_path / "xdg" / "dat_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
    jax.config.update("jax_compilation_cache_dir", None)
    assert compilation_cache.enable("auto", note=no_note).parent == tmp_path / "home" / ".cache" / "dat_jax"


def test_a_directory_that_cannot_be_written_is_a_warning(enabled, tmp_path):
    (tmp_path / "file").write_text("")
    notes = []
    assert compilation_cache.enable(str(tmp_path / "file" / "cache"), note=notes.append) is None
    assert len(notes) == 1
    assert notes[0].startswith("Warning: compiled programs are not kept. ")
    assert notes[0].endswith("cannot be written: Not a directory.")
    assert jax.config.jax_compilation_cache_dir is None


def test_where_the_user_turned_it_off_it_stays_off(tmp_path):
    assert compilation_cache.enable(str(tmp_path / "given"), note=no_note) is None
    assert not (tmp_path / "given").exists()


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    program = (
        "import jax, jax.numpy as jnp; from dat_jax.training import compilation_cache;"
        f"compilation_cache.enable({str(tmp_path)!r}, note=print);"
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
