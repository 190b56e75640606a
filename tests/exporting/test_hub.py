"""Exported folders that are pushed to the Hugging Face Hub, and loaded from there by everything that takes weights."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load as load_safetensors

import dat_jax
from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.checkpoints.hub import resolve_address
from dat_jax.checkpoints.loading import check_exists, load_for_finetuning
from dat_jax.conversion.command import convert_to_official
from dat_jax.errors import UserError
from dat_jax.exporting.files import write_exported
from dat_jax.exporting.hub import push_exported
from dat_jax.exporting.model_card import format_model_card, read_training
from dat_jax.inference.command import predict_files
from dat_jax.training.model_defaults import resolve_model
from tests.exporting.test_export import run
from tests.helpers import tiny_config
from tests.helpers.hub_server import Repository
from tests.helpers.photographs import photographs
from tests.helpers.tiny_classification import random_classifier

ADDRESS, NAMES = "hf://me/dat", ("cat", "dog", "crane", "cow", "hen")
SUMMARY = """# quickstart

All 12 steps are done.

| | |
|---|---|
| model | dat_pp_nano, 40,676 parameters, float32 |
| data | /home/me/animals: 48 to train, 21 to validate, crops of 64 x 64 |
| work directory | /home/me/runs/1 |

## Metrics

| | best top1 (step) | last (step) |
|---|---|---|
| eval/top1 | 82.53 (8) | 81.5 (12) |
| train/loss |  | 0.3715 (12) |
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of weights."""
    folder = tmp_path_factory.mktemp("trained") / "weights"
    model, variables = random_classifier()
    export_model(folder, model=model, variables=variables, classes=NAMES, options={"image_size": 64, "resize": 72})
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """An exported folder without a program, which tests only read."""
    folder = tmp_path_factory.mktemp("exported") / "classifier"
    assert run(trained, folder, "--formats=orbax,safetensors") == 0
    return folder


@pytest.fixture
def pushed(hub, exported):
    """The server, with the export at ADDRESS."""
    push_exported(exported, ADDRESS)
    return hub


def test_a_pushed_export_is_the_folder_with_a_model_card(hub, exported, capsys):
    assert run(exported, f"--push={ADDRESS}", "--license=mit") == 0
    assert f"Pushed to {hub.url}/me/dat/commit/" in capsys.readouterr().out
    repository = hub.repositories["me/dat"]
    files = {path.relative_to(exported).as_posix(): path for path in exported.rglob("*") if path.is_file()}
    assert repository.files.keys() == files.keys() | {"README.md", ".gitattributes"}
    assert all(repository.files[name] == path.read_bytes() for name, path in files.items())
    assert "cls_head.weight" in load_safetensors(repository.files["model.safetensors"])
    assert not repository.private
    _, head, text = repository.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "dat_jax",
        "license": "mit",
        "pipeline_tag": "image-classification",
        "tags": ["dat", "deformable-attention", "flax", "jax", "vision-transformer"],
    }
    assert "A classifier with 5 classes (cat, dog, crane, cow, hen)" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    space = {}
    exec(code, space)
    assert space["predict"].class_names == NAMES


def test_everything_that_takes_weights_takes_an_address(pushed, exported, tmp_path, capsys):
    model, variables = dat_jax.load(ADDRESS)
    expected_model, expected = dat_jax.load(exported)
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert not [request for request in pushed.requests if "resolve" in request and "model.safetensors" in request]

    image = photographs(width=64, height=64)[0]
    Image.fromarray(image).save(tmp_path / "photo.png")
    classifier = inference.load(ADDRESS)
    assert classifier.class_names == NAMES
    np.testing.assert_array_equal(classifier(image), inference.load(exported)(image))
    assert predict_files(ADDRESS, [str(tmp_path / "photo.png")], options={})
    assert "photo.png: " in capsys.readouterr().out

    check_exists(ADDRESS)
    restored, _ = load_for_finetuning(
        ADDRESS, fresh_variables=expected, deformable_form=model.deformable_form, class_names=NAMES[::-1]
    )
    np.testing.assert_array_equal(restored["params"]["cls_head"]["bias"], expected["params"]["cls_head"]["bias"][::-1])
    rows = convert_to_official(ADDRESS, str(tmp_path / "weights.safetensors"))
    assert rows["class names"] == ", ".join(NAMES)
    assert run(f"--check={ADDRESS}") == 0


def test_a_configuration_takes_the_image_size_of_an_address_without_its_weights(pushed):
    config = tiny_config.get_config().unlock()
    config.init_from, config.data.image_size, config.data.eval_resize = ADDRESS, -1, -1
    config = resolve_model(config.lock())
    assert (config.data.image_size, config.data.eval_resize) == (64, 72)
    assert not [request for request in pushed.requests if "params" in request]


def test_the_card_and_the_manifest_have_the_results_of_the_run(hub, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.md").write_text(SUMMARY)
    training = read_training(tmp_path / "run")
    assert training == {
        "settings": {
            "model": "dat_pp_nano, 40,676 parameters, float32",
            "data": "animals: 48 to train, 21 to validate, crops of 64 x 64",
        },
        "results": {"eval/top1": "82.53 (8)"},
    }
    write_exported(tmp_path / "out", inference.load(trained), formats=["orbax"], training=training)
    assert read_training(tmp_path / "out") == training
    push_exported(tmp_path / "out", ADDRESS)
    card = hub.repositories["me/dat"].files["README.md"].decode()
    assert "license: unknown" in card
    assert "| data | animals: 48 to train" in card
    assert "| eval/top1 | 82.53 (8) |" in card
    assert "/home/me" not in card
    assert read_training(trained) is None


@pytest.mark.parametrize(
    ("task", "model", "kind", "tag"),
    [
        ("segmentation", {"head": "upernet"}, "segmentor", "image-segmentation"),
        ("detection", {"name": "mask_rcnn"}, "detector", "object-detection"),
        ("features", {"head": "sem_fpn"}, "backbone", "image-feature-extraction"),
    ],
)
def test_cards_of_dense_models(task, model, kind, tag):
    manifest = {"dat_jax": "0.1.0", "task": task, "model": model, "backbone": "dat_pp_small", "classes": ["cat"] * 7}
    manifest |= {"preprocessing": {"steps": ["resize"]}, "files": {"model_64x96.stablehlo": {}}}
    card = format_model_card(manifest, address="hf://me/dense@v1", license_id="mit")
    assert f"pipeline_tag: {tag}" in card
    assert "# dense\n" in card
    assert f"A {kind} with 7 classes (cat, cat, cat, cat, cat and 2 more)" in card
    assert f"`{next(iter(model.values()))}` on `dat_pp_small`." in card
    assert "- programs that run with jax" in card
    assert "model.safetensors" not in card


def test_a_new_push_replaces_the_export_and_keeps_other_files(pushed, exported, tmp_path):
    repository = pushed.repositories["me/dat"]
    first = repository.branches["main"]
    changed = {**repository.files, "README.md": b"mine", "notes.txt": b"n", "params/old/0": b"o", "a.stablehlo": b"p"}
    repository.commit("main", changed)
    push_exported(exported, ADDRESS)
    assert repository.files == {**repository.commits[first], "README.md": b"mine", "notes.txt": b"n"}

    shutil.copytree(exported, tmp_path / "described")
    (tmp_path / "described" / "README.md").write_text("newer")
    push_exported(tmp_path / "described", ADDRESS)
    assert repository.files["README.md"] == b"newer"
    assert len(repository.commits) == 5  # each push is one


def test_a_branch_is_created_and_leaves_the_others_unchanged(pushed, exported):
    repository = pushed.repositories["me/dat"]
    main = repository.branches["main"]
    repository.commit("main", {".gitattributes": b""})
    for _ in range(2):
        push_exported(exported, f"{ADDRESS}@dev")
    assert repository.files == {".gitattributes": b""}
    assert repository.commits[repository.branches["dev"]].keys() == repository.commits[main].keys()
    assert dat_jax.load(f"{ADDRESS}@dev")[0] == dat_jax.load(exported)[0]


def test_private_repositories(hub, exported):
    push_exported(exported, ADDRESS, private=True)
    assert hub.repositories["me/dat"].private
    hub.repositories["me/dat"].private = False
    before = dict(hub.repositories["me/dat"].branches)
    with pytest.raises(UserError, match=f"{ADDRESS} is public, but a private repository is requested"):
        push_exported(exported, ADDRESS, private=True)
    assert hub.repositories["me/dat"].branches == before


def test_an_export_whose_push_fails_is_complete(hub, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    out = tmp_path / "out"
    assert run(trained, out, "--formats=orbax", f"--push={ADDRESS}", "--private") == 1
    error = capsys.readouterr().err
    assert f"{ADDRESS} cannot be written: access is denied (status 401); log in with `hf auth login`" in error
    assert f"python -m dat_jax.export {out} --push={ADDRESS} --license=unknown --private\n" in error
    assert run(f"--check={out}") == 0
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{trained}", "{out}", "--push=me/dat"], "'me/dat': expected hf://USER/REPOSITORY"),
        (["{trained}", "{out}", "--push=hf://me/dat/x"], "'hf://me/dat/x': expected hf://USER/REPOSITORY"),
        (["{trained}", "{out}", "--push=hf://me/dat", "--formats=safetensors"], "--push needs the format orbax"),
        (["{trained}", "hf://me/dat"], "the Hugging Face Hub is for weights and `dat-jax export --push`"),
        (["{trained}", "--push=hf://me/dat"], "is not a folder written by dat_jax.export"),
        (["--push=hf://me/dat"], "EXPORTED --push=hf://USER/REPOSITORY or --check=DIR, got nothing"),
        (["{trained}", "--push=hf://me/dat", "--check={trained}"], "--check and --push cannot be combined"),
        (["{trained}", "--push=hf://me/dat", "--batch=2"], "--batch: an exported folder is pushed as it is"),
        (["{trained}", "{out}", "--private"], "--license and --private are for --push=hf://USER/REPOSITORY"),
        (["hf://me/none", "{out}"], "hf://me/none cannot be read: there is no such repository"),
    ],
)
def test_impossible_pushes_are_refused_before_anything_is_written(arguments, sentence, hub, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*[argument.format(trained=trained, out=out) for argument in arguments]) == 1
    assert sentence in capsys.readouterr().err
    assert not out.exists()
    assert hub.repositories == {}


def test_a_damaged_or_partial_folder_is_not_pushed(hub, exported, trained, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors differs"):
        push_exported(copy, ADDRESS)
    assert run(trained, tmp_path / "out", "--formats=safetensors") == 0
    with pytest.raises(UserError, match=r"has no model\.json, which dat_jax\.load reads"):
        push_exported(tmp_path / "out", ADDRESS)
    assert hub.repositories == {}


@pytest.mark.parametrize("file", ["model.json", "params/cls_head.bias/0", "manifest.json"])
def test_a_damaged_download_is_noticed_and_can_be_repeated(file, pushed):
    pushed.damage = lambda path, content: bytes([content[0] ^ 1]) + content[1:] if path == file else content
    with pytest.raises(UserError, match=r"The copy of hf://me/dat in .* is damaged: .*Delete the folder") as caught:
        dat_jax.load(ADDRESS)
    assert file in str(caught.value)
    pushed.damage = lambda path, content: content
    shutil.rmtree(re.search(r"Delete the folder (\S+) to", str(caught.value))[1])
    assert dat_jax.load(ADDRESS)[0].num_classes == len(NAMES)


def test_an_incomplete_copy_is_not_loaded_offline(pushed, monkeypatch):
    from huggingface_hub import constants

    folder = resolve_address(ADDRESS)
    (folder / "params" / "cls_head.bias" / "0").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no complete copy|params/cls_head\.bias/0 is missing"):
        dat_jax.load(ADDRESS)


def test_a_repository_of_something_else_is_refused(hub):
    hub.repositories["me/dat"] = Repository(private=False)
    hub.repositories["me/dat"].commit("main", {"config.json": b"{}", "model.safetensors": b"s"})
    for use in (dat_jax.load, inference.load, check_exists):
        with pytest.raises(UserError, match=r"hf://me/dat is not an export of dat_jax: it has no model\.json\."):
            use(ADDRESS)


def test_weights_that_were_not_exported_are_loaded_too(hub, trained):
    """A folder of weights has no manifest, but digests of its arrays."""
    files = {path.relative_to(trained).as_posix(): path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    hub.repositories["me/dat"] = Repository(private=False)
    hub.repositories["me/dat"].commit("main", files)
    assert dat_jax.load(ADDRESS)[0] == dat_jax.load(trained)[0]


@pytest.mark.slow
def test_predict_uses_the_cache_of_another_process_offline(pushed, tmp_path):
    Image.fromarray(photographs(width=64, height=64)[0]).save(tmp_path / "photo.png")
    command = [sys.executable, "-m", "dat_jax.predict", ADDRESS, "photo.png", "--json=classes.json", "--overwrite"]
    options = dict(cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    first = subprocess.run(command, env=environment, **options)
    assert first.returncode == 0, first.stderr
    count = len(pushed.requests)
    second = subprocess.run(command, env={**environment, "HF_HUB_OFFLINE": "1"}, **options)
    assert second.returncode == 0, second.stderr
    assert len(pushed.requests) == count
    assert first.stdout == second.stdout
    assert set(json.loads((tmp_path / "classes.json").read_text())[0]["classes"]) <= set(NAMES)
