"""Whatever comes from outside is taken, or refused with the one error that says so: 11,800 inputs, always the same ones."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import tempfile

import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dat_jax.checkpoints import compatibility, directory, integrity
from dat_jax.cli.flags import parse_flags
from dat_jax.config import (
    get_classification_config,
    get_detection_config,
    get_keys,
    get_segmentation_config,
    validate,
)
from dat_jax.config.files import define_config_flag
from dat_jax.conversion.files import read_weights, write_safetensors
from dat_jax.data.images import check_image, decode_image
from dat_jax.errors import UserError
from dat_jax.training.monitoring.metrics import read_metrics
from tests.helpers.pth_writer import write_pth

pytestmark = pytest.mark.slow

WEIGHTS = {"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.ones(2, np.float16)}


def always_the_same(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw, data: bytes):
    """The bytes with some changed, cut, repeated or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["change", "cut", "insert", "repeat", "end"])):
            case "change":
                data[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del data[place : place + draw(st.integers(1, 40))]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=20))
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 40))]
            case "end":
                del data[place:]
    return bytes(data)


def encoded(kind, mode="RGB", size=(9, 7)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [
    encoded("PNG"),
    encoded("JPEG"),
    encoded("PNG", "P"),
    encoded("JPEG", "CMYK"),
    encoded("GIF", "P"),
    encoded("WEBP"),
]


@always_the_same(4000)
@given(data=st.sampled_from(IMAGES).flatmap(damaged) | st.binary(max_size=60))
def test_images(data):
    check_image(data)
    with contextlib.suppress(UserError):
        image = decode_image(data, name="it")
        assert image.dtype == np.uint8
        assert image.ndim == 3


def test_an_image_that_claims_to_be_huge_is_refused_before_it_takes_memory():
    data = bytearray(encoded("PNG"))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(UserError, match="more than 89,478,485 pixels"):
        decode_image(bytes(data), name="bomb")


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    write_pth(directory / "a.pth", WEIGHTS)
    write_safetensors(directory / "a.safetensors", WEIGHTS)
    return directory


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights(weight_files, suffix):
    original, path = (weight_files / f"a{suffix}").read_bytes(), weight_files / f"b{suffix}"

    @always_the_same(1500)
    @given(data=damaged(original) | st.binary(max_size=60))
    def read(data):
        path.write_bytes(data)
        try:
            weights = read_weights(path)
        except UserError:
            return
        assert all(isinstance(array, np.ndarray) for array in weights.values())
        assert sum(array.nbytes for array in weights.values()) < 10**6

    read()


class Attack:
    def __reduce__(self):
        return print, ("CODE WAS RUN",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    from tests.helpers.pth_writer import write_archive

    content = pickle.dumps({"model": Attack()}, protocol=2)[2:-1]
    write_archive(tmp_path / "a.pth", content, {})
    with pytest.raises(UserError):
        read_weights(tmp_path / "a.pth")
    assert "CODE" not in capsys.readouterr().out


def paths(schema, prefix=()):
    for key, value in schema.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 2), max_size=2),
    st.dictionaries(st.text("ab", max_size=3), st.integers(), max_size=2),
)


MAKERS = {
    "classification": get_classification_config,
    "segmentation": get_segmentation_config,
    "detection": get_detection_config,
}


@pytest.mark.parametrize("task", MAKERS)
@always_the_same(1000)
@given(data=st.data())
def test_configurations(task, data):
    config = MAKERS[task]().unlock()
    keys = st.sampled_from(sorted(paths(get_keys(task))))
    changes = data.draw(st.lists(st.tuples(keys, VALUES), min_size=1, max_size=3))
    for (*groups, last), value in changes:
        group = config
        for name in groups:
            group = group.get(name) if hasattr(group, "get") else None
        if hasattr(group, "ignore_type"):
            with group.ignore_type():
                group[last] = value
    check_validated(config)


def check_validated(config):
    """A refusal in one sentence, or a configuration whose values are in their ranges."""
    message = None
    try:
        validate(config)
    except UserError as error:
        message = str(error)
    if message is not None:
        assert message.startswith(("config.", "Unknown key config.", "Missing key config.")), message
        assert "\n" not in message
    else:
        assert all(size >= 1 or size == -1 for size in (config.batch_size, config.epochs))
        assert config.eval.batch_size >= 1
        assert 0 <= config.data.max_damaged <= 1
        assert config.model.dtype in ("auto", "float32", "bfloat16")


RUN_BY_CODE = pathlib.Path(tempfile.gettempdir()) / f"run-by-a-command-line-{os.getpid()}"


@always_the_same(300)
@given(
    key=st.sampled_from([".".join(path) for path in paths(get_keys("classification"))]) | st.text(max_size=12),
    value=st.text(max_size=16)
    | st.sampled_from(
        [f"__import__('pathlib').Path({str(RUN_BY_CODE)!r}).touch()", "1e999", "(1,", "[[", "0x", "{", "None"]
    ),
)
def test_what_stands_on_a_command_line(key, value):
    """Of a run: read without running what stands there, refused in one sentence or checked like any configuration."""
    values, printed = flags.FlagValues(), io.StringIO()
    define_config_flag(values)
    with contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
        parse_flags(["main", "--config=finetune", f"--config.{key}={value}"], values)
        check_validated(values.config)
    said = printed.getvalue()
    assert not said or (said.startswith("error: Flags: ") and said.endswith("\n") and said.count("\n") == 1)
    assert not RUN_BY_CODE.exists()


CONFIG = get_classification_config()
METADATA = json.dumps({"examples": 4, "config": CONFIG.to_dict(), "classes": 2}).encode()


@always_the_same(1500)
@given(
    data=damaged(METADATA) | st.binary(max_size=40),
    anything=st.dictionaries(st.sampled_from(["config", "classes"]), VALUES),
)
def test_metadata_of_a_checkpoint(tmp_path_factory, data, anything):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    (path / "metrics").mkdir(parents=True, exist_ok=True)
    for name in (integrity.MANIFEST, "metrics/metrics", "metrics.jsonl"):
        (path / name).write_bytes(data)
    metrics = directory.read_metrics(path)
    assert metrics is None or isinstance(metrics, dict)
    read_metrics(path / "metrics.jsonl")
    with pytest.raises(integrity.DamagedError):
        integrity.check_manifest(path)
    inputs = [anything]
    with contextlib.suppress(ValueError):
        inputs.append(json.loads(data))
    for metadata in inputs:
        with contextlib.suppress(UserError):
            compatibility.check(metadata, CONFIG, class_names=("left", "right"))
