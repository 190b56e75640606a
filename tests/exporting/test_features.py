"""Exported programs that return feature maps, as a head in another framework calls them."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax import inference
from dat_jax.checkpoints.exports import export_model
from dat_jax.errors import UserError
from dat_jax.exporting import load_program, make_features_program
from dat_jax.tasks.preprocessing import normalize
from tests.exporting.test_buckets import fill
from tests.exporting.test_export import run
from tests.helpers import documents
from tests.helpers.photographs import photographs
from tests.helpers.tiers import slow
from tests.helpers.tiny_classification import random_classifier
from tests.helpers.tiny_detection import random_detector
from tests.helpers.tiny_segmentation import random_segmentor
from tests.inference.test_detection import export_detector

PHOTOS = np.stack([photographs(width=96, height=64)[index] for index in range(3)])


@pytest.fixture
def classifier(tmp_path):
    model, variables = random_classifier()
    export_model(tmp_path / "classifier", model=model, variables=variables)
    return tmp_path / "classifier"


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_features_of_a_classifier_have_no_norms(classifier, tmp_path, capsys):
    out = tmp_path / "features"
    assert run(classifier, out, "--features=1,3", "--image_size=64,96", "--platforms=cpu") == 0
    space = {}
    exec(capsys.readouterr().out.partition("To load it:\n\n")[2], space)  # the code that it prints
    assert set(space["features"]) == {"features_1", "features_3"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["task"] == "features"
    assert manifest["preprocessing"]["size"] == [64, 96]
    records = {record["name"]: record for record in manifest["program"]["outputs"]}
    assert records["features_1"]["shape"] == ["b", 8, 12, 8]
    assert records["features_3"]["dtype"] == "float32"
    assert run(f"--check={out}") == 0

    model, variables = dat_jax.load(out)  # the whole classifier
    maps = jax.jit(lambda v, images: model.apply(v, images, method="features"))(variables, normalize(PHOTOS))
    outputs = load_program(out).call(PHOTOS)
    for index in (1, 3):
        close(outputs[f"features_{index}"], maps[index])


@pytest.mark.parametrize("make", [random_segmentor, slow(random_detector)])
def test_features_of_dense_models_have_their_norms(make, tmp_path):
    model, variables = make()
    export_model(tmp_path / "trained", model=model, variables=variables)
    out = tmp_path / "features"
    arguments = ["--features=0,2", "--buckets=64x96", "--platforms=cpu", "--formats=stablehlo"]
    assert run(tmp_path / "trained", out, *arguments) == 0
    sizes = np.array([[64, 96], [33, 70]], np.int32)
    outputs = load_program(out, (33, 70)).call(fill(sizes, (64, 96)), sizes)
    backbone, variables = dat_jax.load_backbone(tmp_path / "trained", out_indices=(0, 2))
    assert np.ptp(np.asarray(variables["params"]["norms_2"]["scale"])) > 0.1
    for index, (height, width) in enumerate(sizes):
        image = photographs(width=width, height=height)[index]
        maps = jax.jit(backbone.apply)(variables, normalize(image[None]))
        for name, expected in zip(("features_0", "features_2"), maps, strict=True):
            _, rows, columns, _ = expected.shape
            close(outputs[name][index, :rows, :columns], expected[0])


def test_a_backbone_with_any_attributes_is_a_program(classifier):
    backbone, variables = dat_jax.load_backbone(classifier, out_indices=(0,), dtype=jnp.bfloat16)
    program = make_features_program(
        backbone, variables, image_shape=(64, 96), platforms=("cpu",), preprocessing="outside", batch=3
    )
    program = jax.export.deserialize(program.serialize())
    outputs = program.call(normalize(PHOTOS))
    assert outputs["features_0"].dtype == jnp.float32
    (expected,) = jax.jit(backbone.apply)(variables, normalize(PHOTOS))
    np.testing.assert_allclose(outputs["features_0"], expected.astype(jnp.float32), rtol=0.05, atol=0.05)
    weights = sum(leaf.size for leaf in jax.tree.leaves(inference.load(classifier).variables))
    kept = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert kept < 0.5 * weights
    assert len(program.serialize()) < 4 * weights  # later stages are not in it
    with pytest.raises(UserError, match="from 0 to 3 in ascending order"):
        make_features_program(backbone.clone(out_indices=(4,)), variables, image_shape=(64, 64))
    with pytest.raises(UserError, match="at least 32 pixels"):
        make_features_program(backbone, variables, image_shape=(16, 64))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--features=1,0"], "from 0 to 3 in ascending order, got [1, 0]"),
        (["--features=all"], "--features must be indices of stages, such as 0,1,2,3, got all"),
        (["--features="], "one or more stages from 0 to 3"),
        (["--features=0", "--formats=orbax"], "features are for the format stablehlo and not for onnx"),
        (["--features=0", "--formats=stablehlo,onnx"], "features are for the format stablehlo and not for onnx"),
        (["--features=0", "--image_size=16,64"], "image_size must be at least 32 pixels per side"),
    ],
)
def test_errors_end_with_one_sentence(classifier, tmp_path, capsys, arguments, sentence):
    assert run(classifier, tmp_path / "out", *arguments) == 1
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]


@pytest.mark.slow
def test_a_map_that_a_detector_does_not_use_is_refused(tmp_path, capsys):
    export_detector(tmp_path / "trained", "retinanet")
    assert run(tmp_path / "trained", tmp_path / "out", "--features=0,1") == 1
    assert "does not use the map of stage 0, which has no norm" in capsys.readouterr().err


@pytest.mark.slow
def test_the_function_for_pytorch(classifier, tmp_path):
    """The one of docs/backbone.md."""
    torch = pytest.importorskip("torch")
    page = (documents.ROOT / "docs" / "backbone.md").read_text()
    block = next(block.text for block in documents.read_blocks(page) if "from_dlpack" in block.text)
    backbone, variables = dat_jax.load_backbone(classifier, output_norms=False)
    program = jax.jit(make_features_program(backbone, variables, image_shape=(64, 96), platforms=("cpu",)).call)
    space = {"program": program}
    exec(block, space)
    maps = space["compute_torch_features"](torch.from_numpy(PHOTOS).permute(0, 3, 1, 2))
    expected = jax.jit(backbone.apply)(variables, normalize(PHOTOS))
    for x, y in zip(maps, expected, strict=True):
        assert x.dtype == torch.float32
        close(x.permute(0, 2, 3, 1).numpy(), y)
