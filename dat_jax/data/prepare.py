"""Write images as a TFDS data set in array_record format, without TensorFlow and without re-encoding them.

  python -m dat_jax.data.prepare --train=PATH --validation=PATH --output=DIR [--validation_labels=FILE]
      [--records_per_shard=2048] [--workers=N] [--incomplete]

Examples: the original archives of ImageNet; folders of classes; a flat validation set with its classes in a file:

  python -m dat_jax.data.prepare --train=ILSVRC2012_img_train.tar --validation=ILSVRC2012_img_val.tar --output=/data/imagenet
  python -m dat_jax.data.prepare --train=flowers/train --validation=flowers/val --output=/data/flowers
  python -m dat_jax.data.prepare --train=birds/train --validation=birds/val --validation_labels=val.txt --output=/data/birds

A PATH is one of:
  - ILSVRC2012_img_train.tar, or another tar that contains one tar per class
  - ILSVRC2012_img_val.tar, or another flat tar of images
  - a folder of class folders
  - a flat folder of images

Records are sorted by class, then by file name; training shuffles them by random access. Damaged images are left out and listed
in DIR/damaged.txt. If the command is interrupted, rerun it to resume.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pathlib
import posixpath
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dat_jax.cli.flags import fail, run_tool
from dat_jax.data.image_files import Member, error_text, index_classes, list_images, read_member
from dat_jax.data.images import check_image
from dat_jax.data.sources import METADATA_FILES, PREPARE_INPUTS, SPLITS
from dat_jax.errors import UserError
from dat_jax.storage import atomic_write_text, check_local

_IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One array_record file to write.

    Attributes:
      split: "train" or "validation".
      path: the file.
      report_path: JSON file with the ``Report`` of the finished shard.
      members, labels: images of the shard and their labels.
    """

    split: str
    path: pathlib.Path
    report_path: pathlib.Path
    members: Sequence[Member]
    labels: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Report:
    """Content of a finished shard.

    Attributes:
      records: number of records.
      record_bytes: total size of the records.
      file_bytes: size of the file.
      damaged: (name, reason) of every image that was left out.
    """

    records: int
    record_bytes: int
    file_bytes: int
    damaged: list[tuple[str, str]]


def prepare(
    *,
    train: str,
    validation: str,
    output: str,
    validation_labels: str = "",
    records_per_shard: int = 2048,
    workers: int = 1,
    incomplete: bool = False,
) -> str:
    """Write a data set, or the missing parts of one.

    Args:
      train, validation: paths of images, see ``image_files.list_images``.
      output: a new or empty folder, or the output of an earlier, possibly interrupted call with the same inputs.
      validation_labels: file with the class of each image, one per line, in the order of the image names, for flat validation
        images; "" uses ImageNet's list if there are exactly 50,000 images.
      records_per_shard: number of images per file.
      workers: number of processes; 1 works in this process.
      incomplete: whether any number of images of ImageNet's 1,000 classes is accepted.

    Returns:
      A sentence that describes the result.

    Raises:
      UserError: the inputs are invalid, or the output belongs to other inputs or cannot be written. Finished shards are kept.
    """
    with Console().status(f"Listing the images of {train} and {validation}"):
        members, class_names = list_splits(train=train, validation=validation, validation_labels=validation_labels)
    imagenet = list(class_names) == _read_imagenet_list("labels.txt")
    counts = {split: len(members[split]) for split in SPLITS}
    if imagenet and not incomplete and counts != _IMAGENET_COUNTS:
        raise UserError(
            f"ImageNet has {_IMAGENET_COUNTS['train']:,} and {_IMAGENET_COUNTS['validation']:,} images, but {train} has "
            f"{counts['train']:,} and {validation} has {counts['validation']:,}: download them again, or add --incomplete."
        )
    for name, path in {"--train": train, "--validation": validation, "--output": output}.items():
        check_local(path, key=name)
    directory = pathlib.Path(output)
    name = "imagenet2012" if imagenet else "images"
    shards = [
        shard
        for split in SPLITS
        for shard in plan_shards(members[split], class_names, directory, name, split, records_per_shard)
    ]
    try:
        begin(directory, members, class_names, records_per_shard)
        pending = [shard for shard in shards if read_report(shard) is None]
        if not pending and all((directory / file).exists() for file in METADATA_FILES):
            return f"{directory} is already complete: {_describe(shards)}."
        if pending:
            write_shards(pending, workers=workers)
        finish(directory, name, class_names, shards)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}.") from error
    return f"{directory} is complete: {_describe(shards)}."


def list_splits(
    *, train: str, validation: str, validation_labels: str = ""
) -> tuple[dict[str, list[Member]], tuple[str, ...]]:
    """List the images of both splits.

    Returns:
      Split -> images with their classes, and the sorted class names of the training images.

    Raises:
      UserError: images have no classes, or the validation images have classes that no training image has.
    """
    members = {"train": list_images(train), "validation": list_images(validation)}
    if not members["train"][0].class_name:
        raise UserError(
            f"The training images of {train} have no classes: expected class folders, or a tar with one tar per class."
        )
    if not members["validation"][0].class_name:
        classes = _read_labels(validation, len(members["validation"]), validation_labels)
        labeled = [
            member._replace(class_name=name) for member, name in zip(members["validation"], classes, strict=True)
        ]
        # Sorted by class like the training images; within a class, the order of the names is kept.
        members["validation"] = sorted(labeled, key=lambda member: member.class_name)
    elif validation_labels:
        raise UserError(f"The images of {validation} already have classes: omit --validation_labels.")
    class_names = tuple(sorted({member.class_name for member in members["train"]}))
    index_classes((member.class_name for member in members["validation"]), class_names, source=validation)
    return members, class_names


def plan_shards(
    members: Sequence[Member],
    class_names: Sequence[str],
    directory: pathlib.Path,
    name: str,
    split: str,
    records_per_shard: int,
) -> list[Shard]:
    """Return the shards of a split, with the file names that TFDS requires."""
    count = -(-len(members) // records_per_shard)
    labels = index_classes((member.class_name for member in members), class_names, source=split)
    shards = []
    for index in range(count):
        part = slice(index * records_per_shard, (index + 1) * records_per_shard)
        path = directory / f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"
        report_path = (directory / PREPARE_INPUTS).with_name(f"{split}-{index:05d}.json")
        shards.append(Shard(split, path, report_path, members[part], labels[part]))
    return shards


def begin(
    directory: pathlib.Path, members: dict[str, list[Member]], class_names: Sequence[str], records_per_shard: int
) -> None:
    """Create the output folder and record its inputs, so that a later call can check that it resumes the same work.

    Raises:
      UserError: the folder has other content.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for member in members[split]:
            digest.update(
                f"{split}\0{member.class_name}\0{member.name}\0{member.size}\n".encode(errors="surrogateescape")
            )
    counts = {split: len(members[split]) for split in SPLITS}
    inputs = {"images": counts, "classes": len(class_names), "records_per_shard": records_per_shard}
    text = json.dumps({**inputs, "digest": digest.hexdigest()})
    path = directory / PREPARE_INPUTS
    if path.exists():
        if path.read_text() != text:
            raise UserError(
                f"{directory} was started with other images or another --records_per_shard: repeat that command, or choose "
                f"another --output (recorded inputs: {path.read_text()[:200]})."
            )
        return
    if directory.is_dir() and any(entry.name != path.parent.name for entry in directory.iterdir()):
        raise UserError(f"{directory} is not empty: choose another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)


def write_shards(shards: Sequence[Shard], *, workers: int) -> None:
    """Write shards in parallel, with a progress bar.

    Raises:
      UserError: a worker failed or died.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} images/s, left"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=sum(len(shard.members) for shard in shards), rate=0.0)
        done, start = 0, time.monotonic()
        for count in _run(shards, workers):
            done += count
            progress.update(task, completed=done, rate=done / (time.monotonic() - start))


def write_shard(shard: Shard) -> int:
    """Write a shard and then its report, each under a temporary name until it is complete.

    Returns:
      The number of images, including damaged ones.

    Raises:
      UserError: the images cannot be read, or the file cannot be written.
    """
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] (compiled, no stubs)

    temporary = shard.report_path.with_suffix(f".{os.getpid()}.array_record")
    records, record_bytes, damaged = 0, 0, []
    try:
        writer = array_record_module.ArrayRecordWriter(
            str(temporary), "group_size:1"
        )  # random access reads a single image
        for member, label in zip(shard.members, shard.labels, strict=True):
            data = read_member(member)
            with warnings.catch_warnings():  # about unusual tags, which do not affect pixels
                warnings.simplefilter("ignore")
                reason = check_image(data)
            if reason is not None:
                damaged.append((member.name, error_text(reason)))
                continue
            record = encode_record(data, label=label, file_name=posixpath.basename(member.name))
            writer.write(record)
            records += 1
            record_bytes += len(record)
        writer.close()
        os.replace(temporary, shard.path)
    except RuntimeError as error:  # raised by the writer
        raise UserError(f"{shard.path} cannot be written: {error_text(error)}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    report = Report(records, record_bytes, shard.path.stat().st_size, damaged)
    atomic_write_text(shard.report_path, json.dumps(dataclasses.asdict(report)))
    return len(shard.members)


def encode_record(data: bytes, *, label: int, file_name: str) -> bytes:
    """Serialize an image as a tf.train.Example with the features that ``_write_metadata`` declares."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf at import)
    example.features.feature["image"].bytes_list.value.append(data)
    example.features.feature["label"].int64_list.value.append(label)
    example.features.feature["file_name"].bytes_list.value.append(os.fsencode(file_name))
    return example.SerializeToString(deterministic=True)


def read_report(shard: Shard) -> Report | None:
    """Return the report of a finished shard, or None if the shard is missing or incomplete."""
    try:
        report = Report(**json.loads(shard.report_path.read_text()))
        has_full_size = shard.path.stat().st_size == report.file_bytes
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return report if has_full_size and report.records + len(report.damaged) == len(shard.members) else None


def finish(directory: pathlib.Path, name: str, class_names: Sequence[str], shards: Sequence[Shard]) -> None:
    """Write damaged.txt and then the TFDS metadata, which completes the data set.

    Raises:
      UserError: a shard is missing, or all images of a split are damaged.
    """
    missing = [shard.path.name for shard in shards if read_report(shard) is None]
    if missing:
        raise UserError(
            f"{missing[0]} in {directory} is missing or has changed since it was written: rerun the command."
        )
    reports = _read_reports(shards)
    damaged = [(split, *pair) for split in SPLITS for report in reports[split] for pair in report.damaged]
    lines = "".join("\t".join(line) + "\n" for line in damaged)
    atomic_write_text(directory / "damaged.txt", lines, errors="surrogateescape")  # names as the archive has them
    for split in SPLITS:
        if not any(report.records for report in reports[split]):
            raise UserError(f"Every {split} image is damaged: see {directory / 'damaged.txt'}.")
    temporary = (directory / PREPARE_INPUTS).with_name("metadata")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    _write_metadata(temporary, name, class_names, reports)
    # The file that identifies a data set comes last.
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == METADATA_FILES[0]):
        os.replace(path, directory / path.name)
    temporary.rmdir()
    for path in temporary.parent.glob("*.array_record"):  # left by calls that were killed
        path.unlink()


def _write_metadata(
    directory: pathlib.Path, name: str, class_names: Sequence[str], reports: dict[str, list[Report]]
) -> None:
    """Write dataset_info.json, features.json and the class names with TFDS itself."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=class_names),
        "file_name": tfds.features.Text(),
    }
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[report.records for report in reports[split]],
            num_bytes=sum(report.record_bytes for report in reports[split]),
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=name,
                data_dir=directory,  # pyright: ignore[reportArgumentType] (any path works)
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split in SPLITS
    ]
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(directory)


def _read_labels(path: str, count: int, labels_path: str) -> list[str]:
    """Return the class of each of ``count`` flat images in ``path``, in the order of their names."""
    if labels_path:
        try:
            labels = pathlib.Path(labels_path).read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--validation_labels={labels_path} cannot be read: {error}.") from error
    elif count == _IMAGENET_COUNTS["validation"]:
        labels = _read_imagenet_list("validation_labels.txt")
    else:
        raise UserError(
            f"{path} contains {count:,} images without classes: set --validation_labels=FILE to a file with one class per line."
        )
    if len(labels) != count:
        raise UserError(f"{labels_path} has {len(labels):,} lines for the {count:,} images of {path}.")
    return labels


def _read_imagenet_list(name: str) -> list[str]:
    """Return the lines of a file bundled with tensorflow_datasets: labels.txt, sorted, or validation_labels.txt."""
    package = importlib.util.find_spec("tensorflow_datasets")  # located but not imported
    if package is None or package.origin is None:
        raise UserError(
            "Preparing data sets requires the package tensorflow_datasets: pip install tensorflow-datasets."
        )
    path = pathlib.Path(package.origin).parent / "datasets" / "imagenet2012" / name
    return path.read_text().split()


def _run(shards: Sequence[Shard], workers: int) -> Iterator[int]:
    """Write shards and yield the results of ``write_shard`` in order of completion."""
    if workers == 1 or len(shards) <= 1:
        yield from map(write_shard, shards)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(shards)), mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupts
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(write_shard, shard) for shard in shards]):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "A worker died unexpectedly, often because the machine ran out of memory: rerun the command with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers


def _read_reports(shards: Sequence[Shard]) -> dict[str, list[Report]]:
    """Return the reports of finished shards by split."""
    reports: dict[str, list[Report]] = {split: [] for split in SPLITS}
    for shard in shards:
        report = read_report(shard)
        assert report is not None
        reports[shard.split].append(report)
    return reports


def _describe(shards: Sequence[Shard]) -> str:
    parts = []
    for split, reports in _read_reports(shards).items():
        damaged = sum(len(report.damaged) for report in reports)
        parts.append(f"{sum(report.records for report in reports):,} {split} images, {damaged:,} damaged and left out")
    return "; ".join(parts)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("train", None, "Training images.", flag_values=values)
    flags.DEFINE_string("validation", None, "Validation images.", flag_values=values)
    flags.DEFINE_string(
        "output", None, "Folder of the data set; an unfinished data set is resumed.", flag_values=values
    )
    flags.DEFINE_string(
        "validation_labels",
        "",
        "File with the class of each flat validation image, one per line, in the order of the image names.",
        flag_values=values,
    )
    flags.DEFINE_integer("records_per_shard", 2048, "Number of images per file.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("workers", os.cpu_count(), "Number of processes.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("incomplete", False, "Accept any number of ImageNet's images.", flag_values=values)


_FLAGS = {
    "Input": ("train=PATH", "validation=PATH", "validation_labels=FILE", "incomplete"),
    "Output": ("output=DIR", "records_per_shard=N", "workers=N"),
}


def main(_):
    """Run the command; user errors are printed without a traceback."""
    names = [form.partition("=")[0] for forms in _FLAGS.values() for form in forms]
    options: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}  # absl does not annotate values
    missing = [f"--{name}" for name in ("train", "validation", "output") if not options[name]]
    if missing:
        fail(
            f"Missing {', '.join(missing)}: expected --train=PATH --validation=PATH --output=DIR, where PATH is a tar or a "
            "folder of images."
        )
    try:
        print(prepare(**options))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    interrupted = "Interrupted: rerun the command to resume."
    run_tool(main, groups=_FLAGS, define_flags=define_flags, interrupted=interrupted)
