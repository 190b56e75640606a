"""Digests of files, JSON and arrays, and their comparison."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dat_jax.checkpoints.integrity import (
    DamagedError,
    check_digests,
    check_manifest,
    compute_fingerprints,
    hash_arrays,
    hash_json,
    name_leaves,
    write_manifest,
)


def test_every_difference_is_named():
    check_digests("It", saved={"a": 1}, actual={"a": 1})
    saved, actual = {"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 1, "b": 0, "c": None, "e": 5}
    with pytest.raises(DamagedError) as info:
        check_digests("The folder", saved=saved, actual=actual)
    assert str(info.value) == (
        "The folder is damaged: b differs from what was written, c is missing or cannot be read, "
        "d is missing or cannot be read, e is unexpected."
    )


def test_a_hash_of_arrays_depends_on_names_shapes_dtypes_and_bits_but_not_on_order():
    a, b = np.arange(6, dtype=np.float32), np.ones(2, ml_dtypes.bfloat16)
    digest = hash_arrays({"a": a, "b": b})
    assert hash_arrays({"b": b, "a": a}) == digest
    assert hash_arrays({"a": np.stack([a, a], axis=1)[:, 0], "b": b}) == digest  # not contiguous
    others = ({"c": a, "b": b}, {"a": a.reshape(2, 3), "b": b}, {"a": a.view(np.int32), "b": b}, {"a": -a, "b": b})
    assert digest not in [hash_arrays(other) for other in others]


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
def test_a_fingerprint_changes_with_any_bit_and_with_order(dtype):
    array = np.asarray(jnp.arange(1, 7).astype(dtype)).reshape(2, 3)
    expected = int(compute_fingerprints(jnp.asarray(array)))
    unsigned = {2: np.uint16, 4: np.uint32}[array.itemsize]
    for element in range(6):
        for bit in range(8 * array.itemsize):
            flipped = array.copy()
            flipped.view(unsigned).reshape(-1)[element] ^= unsigned(1 << bit)
            assert int(compute_fingerprints(jnp.asarray(flipped))) != expected
    assert int(compute_fingerprints(jnp.asarray(array[::-1].copy()))) != expected


def test_digests_are_those_of_earlier_versions():
    """The values are stored in checkpoints, so they must not change."""
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, ml_dtypes.bfloat16)}
    assert hash_arrays(arrays) == "dfdbca1bb99aafdfd117c42a7b92eca53aba667ce3b193acf330e3e14660e58d"
    assert hash_json({"b": [1, 2.5], "a": None}) == "6b1d84977084473f4b3b012fc8f1d08257499895d136f26cc7b5c865d2f19e23"
    fingerprints = compute_fingerprints({"x": {"y": jnp.asarray(arrays["a"]), "z": [jnp.int32(7)]}})
    assert {name: int(value) for name, value in name_leaves(fingerprints).items()} == {"x/y": 1390411776, "x/z/0": 7}


def test_a_manifest_lists_files_in_folders_and_not_itself(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    for name in ("meta", "state/d/0"):
        (tmp_path / name).write_text(name)
    for _ in range(2):
        write_manifest(tmp_path)
        check_manifest(tmp_path)
    (tmp_path / "state" / "d" / "0").unlink()
    (tmp_path / "new").write_text("")
    with pytest.raises(DamagedError, match="new is unexpected, state/d/0 is missing"):
        check_manifest(tmp_path)
    (tmp_path / "files.json").write_text("[]")
    with pytest.raises(DamagedError, match=r"files\.json"):
        check_manifest(tmp_path)
