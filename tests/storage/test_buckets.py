"""Files and folders in buckets, on a storage server of this machine."""

import concurrent.futures
import logging
import os
import time

import pytest

from dat_jax import storage
from dat_jax.cli.files import check_outputs
from dat_jax.errors import UserError
from dat_jax.storage import transfer
from experiments.soak.bucket_server import run_s3_server


def write_export(path):
    with storage.atomic_path(path) as temporary:
        (temporary / "params").mkdir(parents=True)
        (temporary / "params" / "a").write_bytes(bytes(1000))
        (temporary / "model.json").write_text("{}")


def test_a_folder_is_written_fetched_and_never_replaced(bucket):
    write_export(f"{bucket}/export")
    assert storage.list_objects(storage.as_path(f"{bucket}/export")) == ["model.json", "params/a"]
    copy = storage.fetch(f"{bucket}/export")
    assert (copy / "params" / "a").read_bytes() == bytes(1000)
    with pytest.raises(UserError, match=f"{bucket}/export exists already"):
        write_export(f"{bucket}/export")
    with pytest.raises(UserError, match="exists already"):
        storage.check_absent(f"{bucket}/export/model.json")


def test_what_describes_a_folder_is_uploaded_last(bucket, monkeypatch):
    order, put = [], transfer._put

    def record(source, target):
        put(source, target)
        order.append(target.name)

    monkeypatch.setattr(transfer, "_put", record)
    write_export(f"{bucket}/export")
    assert order == ["a", "model.json"]


def test_a_failed_upload_leaves_nothing(bucket, monkeypatch):
    put = transfer._put

    def fail_at_the_description(source, target):
        if target.name == "model.json":
            raise OSError(5, "the network is down")
        put(source, target)

    monkeypatch.setattr(transfer, "_put", fail_at_the_description)
    with pytest.raises(UserError, match=f"{bucket}/export cannot be written: the network is down"):
        write_export(f"{bucket}/export")
    assert storage.list_objects(storage.as_path(f"{bucket}/export")) == []


@pytest.mark.parametrize("failure", [OSError(5, "the network is down"), KeyboardInterrupt()])
def test_a_failed_replacement_changes_nothing(failure, bucket, monkeypatch):
    storage.atomic_write_text(f"{bucket}/results.json", "old")
    write_export(f"{bucket}/run")

    def fail(source, target):
        raise failure

    monkeypatch.setattr(transfer, "_put", fail)
    with (
        pytest.raises((UserError, KeyboardInterrupt)),
        storage.atomic_path(f"{bucket}/results.json", overwrite=True) as temporary,
    ):
        temporary.write_text("new")
    assert storage.fetch(f"{bucket}/results.json").read_text() == "old"
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError):
        write_export(f"{bucket}/other")
    assert storage.list_objects(storage.as_path(f"{bucket}/other")) == []
    assert len(storage.list_objects(storage.as_path(f"{bucket}/run"))) == 2


def test_a_file_is_not_written_onto_a_folder_or_below_a_file(bucket):
    write_export(f"{bucket}/run")
    storage.atomic_write_text(f"{bucket}/file", "")
    for path, reason in {
        f"{bucket}/run": "it is a folder",
        f"{bucket}/file/a.json": f"{bucket}/file is a file",
    }.items():
        with pytest.raises(UserError, match=reason), storage.atomic_path(path, overwrite=True):
            pass
    with pytest.raises(UserError, match=f"{bucket}/file is a file"):
        write_export(f"{bucket}/file/export")


def test_outputs_are_compared_with_inputs_and_with_each_other(bucket):
    storage.atomic_write_text(f"{bucket}/a/i.png", "image")
    image, output = storage.fetch(f"{bucket}/a/i.png"), storage.as_path(f"{bucket}/a/i.png")
    with pytest.raises(UserError, match=f"{bucket}/a/i.png is an input and would be overwritten"):
        check_outputs([output], inputs=[image], overwrite=True)
    table = storage.as_path(f"{bucket}/a/t.json")
    with pytest.raises(UserError, match="would be written twice"):
        check_outputs([table, table], inputs=[image], overwrite=True)
    check_outputs([table], inputs=[image], overwrite=False)
    storage.atomic_write_text(table, "")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        check_outputs([table], inputs=[image], overwrite=False)


def test_copies_agree_with_what_is_there(bucket):
    write_export(f"{bucket}/export")
    copy = storage.fetch(f"{bucket}/export")
    assert storage.name_original(copy / "model.json") == f"{bucket}/export/model.json"
    assert storage.restore_names(f"{copy}/model.json is damaged") == f"{bucket}/export/model.json is damaged"
    (copy / "model.json").unlink()
    storage.remove(storage.as_path(f"{bucket}/export/params"))
    storage.fetch(f"{bucket}/export")
    assert storage.list_objects(copy) == ["model.json"]
    storage.remove(storage.as_path(f"{bucket}/export"))
    storage.atomic_write_text(f"{bucket}/export", "now a file")
    assert storage.fetch(f"{bucket}/export").read_text() == "now a file"


def test_threads_may_fetch_the_same_folder(bucket):
    write_export(f"{bucket}/export")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(storage.fetch, [f"{bucket}/export"] * 8))
    assert len(set(copies)) == 1
    assert storage.list_objects(copies[0]) == ["model.json", "params/a"]


def test_files_that_changed_are_fetched_again(bucket):
    storage.atomic_write_text(f"{bucket}/a/classes.txt", "old\n")
    assert storage.fetch(f"{bucket}/a/classes.txt").read_text() == "old\n"
    storage.atomic_write_text(f"{bucket}/a/classes.txt", "new\n")
    assert storage.fetch(f"{bucket}/a/classes.txt").read_text() == "new\n"
    assert (storage.fetch(f"{bucket}/a") / "classes.txt").read_text() == "new\n"


def test_folders_are_moved_and_deleted(bucket):
    write_export(f"{bucket}/a")
    storage.move(storage.as_path(f"{bucket}/a"), storage.as_path(f"{bucket}/b/c"))
    assert storage.list_objects(storage.as_path(f"{bucket}/b")) == ["c/model.json", "c/params/a"]
    assert not storage.exists(storage.as_path(f"{bucket}/a"))
    storage.remove(storage.as_path(f"{bucket}/b"))
    assert not storage.exists(storage.as_path(f"{bucket}/b"))


def test_missing_buckets_and_files_in_the_way_are_named(bucket):
    for use in (storage.check_writable, write_export):
        with pytest.raises(UserError, match=r"gs://test-missing/run .*there is no bucket gs://test-missing"):
            use("gs://test-missing/run")
    with pytest.raises(UserError, match=f"{bucket}/none cannot be read: there is nothing"):
        storage.fetch(f"{bucket}/none")
    storage.atomic_write_text(f"{bucket}/file", "")
    with pytest.raises(UserError, match=f"{bucket}/file is a file"):
        storage.check_writable(f"{bucket}/file/run")
    storage.check_writable(f"{bucket}/run")
    assert storage.list_objects(storage.as_path(f"{bucket}/run")) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("Forbidden: https://storage/b\nno access"), "access to gs://my-bucket is denied; run `gcloud auth"),
        (FileNotFoundError("b/my-bucket/o"), "it is not there, or there is no bucket gs://my-bucket"),
        (TimeoutError(), "gs://my-bucket does not answer"),
    ],
)
def test_errors_of_libraries_become_reasons(error, reason):
    with pytest.raises(OSError, match="gs://my-bucket/run") as caught, storage.os_errors("gs://my-bucket/run"):
        raise error
    assert reason in caught.value.strerror
    assert caught.value.filename == "gs://my-bucket/run"


def test_other_errors_stay_as_they_are():
    with pytest.raises(ZeroDivisionError), storage.os_errors("gs://my-bucket/run"):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="local"), storage.os_errors("runs/1"):
        raise ValueError("local")


def test_a_mirror_uploads_what_changes(bucket):
    storage.atomic_write_text(f"{bucket}/run/metrics.jsonl", "1\n")
    storage.atomic_write_text(f"{bucket}/run/checkpoints/1", "")
    mirror = storage.Mirror(f"{bucket}/run")
    mirror.open()
    assert [path.name for path in mirror.local.iterdir()] == ["metrics.jsonl"]
    assert mirror.local.name == "run"
    with (mirror.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    (mirror.local / "tensorboard").mkdir()
    (mirror.local / "tensorboard" / "events").write_text("e")
    (mirror.local / ".half.unfinished").write_text("h")
    mirror.upload()
    end = time.monotonic() + 20
    while not storage.exists(mirror.path / "tensorboard" / "events") and time.monotonic() < end:
        time.sleep(0.05)
    (mirror.local / "summary.md").write_text("s")
    mirror.close()
    assert storage.list_objects(mirror.path) == ["checkpoints/1", "metrics.jsonl", "summary.md", "tensorboard/events"]
    assert (mirror.path / "metrics.jsonl").read_text() == "1\n2\n"
    assert not mirror.local.parent.exists()


def test_a_mirror_keeps_what_cannot_be_uploaded(bucket, monkeypatch, caplog):
    mirror = storage.Mirror(f"{bucket}/run")
    mirror.open()

    def fail(source, target):
        raise OSError(5, "the network is down")

    monkeypatch.setattr(transfer, "_put", fail)
    (mirror.local / "metrics.jsonl").write_text("1\n")
    with caplog.at_level(logging.WARNING):
        mirror.close()
    messages = [record.getMessage() for record in caplog.records]
    assert any(f"1 files are not in {bucket}/run: metrics.jsonl" in message for message in messages)
    assert (mirror.local / "metrics.jsonl").read_text() == "1\n"


def test_a_mirror_that_may_not_upload_keeps_its_files(bucket):
    mirror = storage.Mirror(f"{bucket}/run")
    mirror.open(may_upload=lambda: False)
    (mirror.local / "metrics.jsonl").write_text("1\n")
    mirror.close()
    assert storage.list_objects(mirror.path) == []
    assert (mirror.local / "metrics.jsonl").read_text() == "1\n"


def test_a_mirror_of_a_local_folder_is_that_folder(tmp_path):
    mirror = storage.Mirror(tmp_path / "run")
    mirror.open()
    mirror.upload()
    mirror.close()
    assert mirror.local == mirror.path == tmp_path / "run"
    assert not os.listdir(tmp_path)


def test_weights_can_be_in_s3(monkeypatch):
    import s3fs
    from etils.epath import backend

    with run_s3_server() as url:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        # Other tests may have left file systems without credentials.
        s3fs.S3FileSystem.clear_instance_cache()
        type(backend.fsspec_backend)._get_filesystem.cache_clear()
        s3fs.S3FileSystem().mkdir("test-bucket")
        write_export("s3://test-bucket/export")
        assert storage.list_objects(storage.as_path("s3://test-bucket/export")) == ["model.json", "params/a"]
        assert (storage.fetch("s3://test-bucket/export") / "params" / "a").read_bytes() == bytes(1000)
        with pytest.raises(UserError, match="s3://test-bucket/export exists already"):
            write_export("s3://test-bucket/export")
        with pytest.raises(
            UserError, match=r"s3://test-missing/export cannot be written: .*no bucket s3://test-missing"
        ):
            write_export("s3://test-missing/export")
