"""Addresses of the Hugging Face Hub, copies of its repositories, and what is said if there is none."""

import sys

import pytest

from dat_jax import storage
from dat_jax.errors import UserError
from tests.helpers.hub_server import TOKEN, Repository

FILES = {"model.json": b"{}", "params/a": bytes(1000), "model.onnx": b"o"}


@pytest.fixture
def repository(hub):
    """A public repository with one commit of FILES."""
    hub.repositories["me/dat"] = Repository(private=False)
    hub.repositories["me/dat"].commit("main", FILES)
    return hub.repositories["me/dat"]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "hf://",
            "hf://me",
            "hf:///dat",
            "hf://me/",
            "hf://me/dat/",
            "hf://me/dat/params",
            "hf://me/dat@",
            "hf:/me/dat",
        ),
        *(
            "HF://me/dat",
            " hf://me/dat",
            "hf://me/d at",
            "hf://me/dat@a b",
            "hf://me/dat\n",
            "hf://mé/dat",
            "hf://-me/dat",
        ),
    ],
)
def test_wrong_addresses_are_refused(text):
    assert storage.is_on_hub(text)
    with pytest.raises(UserError, match="expected hf://USER/REPOSITORY or hf://USER/REPOSITORY@REVISION"):
        storage.fetch(text)


@pytest.mark.parametrize("text", ["runs/hf", "hf", "gs://hf/a", "./hf:/a", "hf-mirror:/a"])
def test_other_paths_are_not_on_the_hub(text):
    assert not storage.is_on_hub(text)


def test_the_hub_is_not_written_as_a_folder():
    with pytest.raises(UserError, match=r"the Hugging Face Hub is for weights and `dat-jax export --push`"):
        storage.check_absent("hf://me/dat")


def test_the_extra_is_named_if_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'hf://me/dat cannot be used. .* pip install "dat-jax\[hub\]"'):
        storage.fetch("hf://me/dat")


def test_a_repository_is_copied_once(hub, repository):
    folder = storage.fetch("hf://me/dat")
    assert {name: (folder / name).read_bytes() for name in storage.list_objects(folder)} == FILES
    hub.requests.clear()
    assert storage.fetch("hf://me/dat") == folder
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_only_wanted_files_are_copied(repository):
    folder = storage.download_repository("hf://me/dat", patterns=["params/*"])
    assert storage.list_objects(folder) == ["params/a"]


def test_the_revision_is_a_branch_a_tag_or_a_commit(repository):
    old = repository.branches["main"]
    repository.tags["v1.0"] = old
    repository.commit("dev/a", {"model.json": b"dev"})
    repository.commit("main", {"model.json": b"new"})
    contents = {"": b"new", "@main": b"new", "@v1.0": b"{}", f"@{old}": b"{}", "@dev/a": b"dev"}
    for suffix, content in contents.items():
        assert (storage.fetch(f"hf://me/dat{suffix}") / "model.json").read_bytes() == content
    with pytest.raises(UserError, match=r"it has no revision v2; it has main, dev/a, v1\.0\."):
        storage.fetch("hf://me/dat@v2")


@pytest.mark.parametrize("switched_off", [True, False])
def test_a_copy_is_used_without_network(switched_off, hub, repository, monkeypatch):
    from huggingface_hub import constants

    folder = storage.download_repository("hf://me/dat", patterns=["*.json"])
    if switched_off:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reason = "HF_HUB_OFFLINE is set"
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        reason = "http://127.0.0.1:9 does not answer"
    hub.requests.clear()
    assert storage.download_repository("hf://me/dat", patterns=["*.json"]) == folder
    with pytest.raises(UserError, match=f"hf://me/other cannot be read: {reason}, and there is no complete copy"):
        storage.fetch("hf://me/other")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (
            (401, "RepoNotFound"),
            "there is no such repository, or it is private; log in with `hf auth login`, or set HF_TOKEN",
        ),
        ((401, ""), r"access is denied \(status 401\); log in with `hf auth login`"),
        ((403, ""), r"access is denied \(status 403\); log in with `hf auth login`"),
        ((403, "GatedRepo"), "its owners grant access on request, see http://127.0.0.1:[0-9]+/me/dat; then log in"),
        ((503, ""), "http://127.0.0.1:[0-9]+ answers with status 503"),
    ],
)
def test_the_reason_why_a_repository_cannot_be_read_is_named(refusal, reason, hub, repository):
    hub.refusal = refusal
    with pytest.raises(UserError, match=f"hf://me/dat cannot be read: {reason}"):
        storage.fetch("hf://me/dat")


def test_a_private_repository_is_read_with_a_token(repository, monkeypatch):
    repository.private = True
    assert (storage.fetch("hf://me/dat") / "model.json").is_file()
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    with pytest.raises(UserError, match="there is no such repository, or it is private; log in with"):
        storage.fetch("hf://me/dat@v1")


def test_a_cut_download_is_not_taken_for_a_file(hub, repository):
    hub.damage = lambda path, content: content[:-1]
    with pytest.raises(UserError, match=r"file should be of size 1000 but has size 999 .*/params/a\)"):
        storage.download_repository("hf://me/dat", patterns=["params/*"])
    hub.damage = lambda path, content: content
    assert (storage.fetch("hf://me/dat") / "params" / "a").read_bytes() == FILES["params/a"]
