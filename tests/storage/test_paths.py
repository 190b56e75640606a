"""Names of files and folders on disks and in buckets."""

import pathlib

import pytest

from dat_jax import storage
from dat_jax.errors import UserError

WRONG = {
    # text: what the sentence must say
    "gs:/my-bucket/run": "did you mean gs://my-bucket/run",
    "gs:///my-bucket/run": "did you mean gs://my-bucket/run",
    "GS://my-bucket/run": "did you mean gs://my-bucket/run",
    "gcs://my-bucket/run": "did you mean gs://my-bucket/run",
    "s3a://my-bucket/run": "did you mean s3://my-bucket/run",
    " gs://my-bucket/run": "did you mean gs://my-bucket/run",
    "gs://my-bucket/run ": "did you mean gs://my-bucket/run",
    "gs://my-bucket/run\n": "did you mean gs://my-bucket/run",
    "gs://": "name of a bucket",
    "gs:///": "did you mean gs://BUCKET/NAME",
    "gs://my-bucket": "expected a folder in the bucket",
    "gs://my-bucket/": "expected a folder in the bucket",
    "gs://b1/run": "'b1' cannot be the name of a bucket",
    "gs://My-Bucket/run": "'My-Bucket' cannot be the name of a bucket",
    "gs://my bucket/run": "'my bucket' cannot be the name of a bucket",
    "gs://my..bucket/run": "cannot be the name of a bucket",
    "gs://-bucket/run": "cannot be the name of a bucket",
    "gs://bücket/run": "cannot be the name of a bucket",
    "gs://my-bucket//run": "must not be empty",
    "gs://my-bucket/a/../b": "must not be empty, '.' or '..'",
    "gs://my-bucket/./b": "must not be empty, '.' or '..'",
    "gs://my-bucket/run*": "'*' is not allowed",
    "gs://my-bucket/a\tb": "is not allowed",
    "gs://my-bucket/run[1]": "'[' is not allowed",
    "gs://my-bucket/" + "x" * 201: "more than 200 bytes",
    "gs://my-bucket/" + "/".join(["x" * 100] * 10): "more than 900 bytes",
    "http://my-bucket/run": "got the scheme http",
    "https://storage.googleapis.com/my-bucket/run": "got the scheme https",
    "file:///tmp/run": "leave out file://",
    "hdfs://my-bucket/run": "got the scheme hdfs",
    "az://my-bucket/run": "got the scheme az",
    "dbfs:/run": "got the scheme dbfs",
}


@pytest.mark.parametrize("text", WRONG)
def test_impossible_destinations_are_refused_in_one_sentence(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (storage.as_path, storage.check_writable, storage.check_absent, storage.fetch):
        with pytest.raises(UserError) as caught:
            use(text)
        assert WRONG[text] in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_path_object_has_lost_a_slash():
    with pytest.raises(UserError, match="did you mean gs://my-bucket/run"):
        storage.as_path(pathlib.Path("gs://my-bucket/run"))


@pytest.mark.parametrize("text", ["runs/1", "/data/a b", "übung", "a:b", "./gs", "~x"])
def test_local_paths_stay_as_they_are(text):
    assert storage.as_path(text) == pathlib.Path(text)
    assert not storage.is_in_bucket(text)


@pytest.mark.parametrize("text", ["gs://my-bucket/run", "gs://my-bucket/a b/ü", "gs://my_bucket.x/1/2"])
def test_paths_in_buckets_keep_their_names(text):
    assert str(storage.as_path(text + "/")) == text
    assert str(storage.as_path(text) / "checkpoints") == f"{text}/checkpoints"
    assert storage.is_in_bucket(storage.as_path(text))


def test_data_in_a_bucket_are_refused_with_the_command_that_mounts_it():
    storage.check_local("/data/imagenet", key="config.data.directory")
    with pytest.raises(UserError, match="gcsfuse --implicit-dirs my-bucket /mnt/my-bucket") as caught:
        storage.check_local("gs://my-bucket/imagenet", key="config.data.directory")
    assert str(caught.value).endswith("set config.data.directory=/mnt/my-bucket/imagenet.")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install \"dat-jax\[gcs\]\""):
        storage.as_path("gs://my-bucket/run")
