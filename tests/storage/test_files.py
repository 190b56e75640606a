"""Atomic writes of files and folders, and checks of paths before work starts."""

import errno
import pathlib

import pytest

from dat_jax import storage
from dat_jax.errors import UserError


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "parents" / "figure.png"
    with storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".png"
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with storage.atomic_path(tmp_path / "export") as temporary:
        (temporary / "params").mkdir(parents=True)
        (temporary / "model.json").write_text("{}")
        assert not (tmp_path / "export").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["model.json", "params"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong"), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_after_a_failure(error, folder, tmp_path):
    def write():
        with storage.atomic_path(tmp_path / "a" / "b") as temporary:
            if folder:
                temporary.mkdir()
                temporary = temporary / "file"
            temporary.write_text("half")
            raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        write()
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_replaced_only_if_asked(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match="file exists already"), storage.atomic_path(path):
        raise AssertionError("the context must not be entered")
    with pytest.raises(UserError, match="file exists already"):
        storage.check_absent(path)
    with storage.atomic_path(path, overwrite=True) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    storage.check_absent(tmp_path / "other")


def test_a_path_that_the_system_refuses_is_an_error_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written: (File name too long|Not a directory)"):  # noqa: SIM117
            with storage.atomic_path(path):
                raise AssertionError("the context must not be entered")


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    with storage.atomic_path(path) as temporary:
        temporary.write_text("")
    assert path.exists()


def test_text_replaces_a_file_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    storage.atomic_write_text(path, "first é\n")
    assert path.read_bytes() == "first é\n".encode()
    storage.atomic_write_text(path, "surrogate \udcff", errors="surrogateescape")
    assert path.read_bytes() == b"surrogate \xff"

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        storage.atomic_write_text(path, "second")
    assert path.read_bytes() == b"surrogate \xff"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_created_and_checked(tmp_path):
    storage.check_writable(tmp_path / "a" / "b")
    storage.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder .*file/c cannot be written: Not a directory"):
        storage.check_writable(tmp_path / "file" / "c")
