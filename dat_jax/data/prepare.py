"""Writes images as a data set of TFDS in array_record, the bytes of every file unchanged; needs no TensorFlow.

  python -m dat_jax.data.prepare --train=PATH --validation=PATH --output=DIR [--validation_labels=FILE]
      [--records_per_shard=2048] [--workers=N] [--incomplete]

The archives of ImageNet as they come; any folders of classes; a flat validation set with its classes in a file:

  python -m dat_jax.data.prepare --train=ILSVRC2012_img_train.tar --validation=ILSVRC2012_img_val.tar --output=/data/imagenet
  python -m dat_jax.data.prepare --train=flowers/train --validation=flowers/val --output=/data/flowers
  python -m dat_jax.data.prepare --train=birds/train --validation=birds/val --validation_labels=val.txt --output=/data/birds

A PATH is ILSVRC2012_img_train.tar (a tar of one tar a class), ILSVRC2012_img_val.tar (flat), a folder of class folders or a
flat folder. Records are ordered by class, then by file name: training shuffles by random access. Damaged images are left
out and named in DIR/damaged.txt. The same command goes on where an interrupted one ended.
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

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dat_jax.cli.flags import fail, run_tool
from dat_jax.data.image_files import Member, index_classes, list_images, plain_reason, read_member
from dat_jax.data.images import check_image
from dat_jax.data.sources import METADATA_FILES, PREPARE_INPUTS, SPLITS
from dat_jax.errors import UserError
from dat_jax.storage import atomic_write_text

_IMAGENET_COUNTS = {"train": 1_281_167, "validation": 50_000}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records. ``labels`` are those of ``members``."""

    split: str
    path: pathlib.Path
    report_path: pathlib.Path
    members: Sequence[Member]
    labels: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a finished shard holds: records, bytes of them, bytes of the file, and (name, reason) of what was left out."""

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
    """Writes the data set, or what is still missing of it.

    Args:
      train, validation: what ``archives.list_images`` lists.
      output: a new or empty folder, or one that an earlier call with the same inputs began.
      validation_labels: a file with the class of each validation image a line, in the order of the images' names, where
        they are flat; "" takes the list of ImageNet for exactly 50,000 images.
      records_per_shard: images a file.
      workers: processes; 1 works in this one.
      incomplete: takes any number of images of ImageNet's 1,000 classes.

    Returns:
      What was done, in a sentence.

    Raises:
      UserError: inputs that do not fit, or an output that is of others or cannot be written. Finished shards stay.
    """
    with Console().status(f"Listing the images of {train} and {validation}"):
        members, class_names = list_splits(train=train, validation=validation, validation_labels=validation_labels)
    imagenet = list(class_names) == _read_imagenet_list("labels.txt")
    counts = {split: len(members[split]) for split in SPLITS}
    if imagenet and not incomplete and counts != _IMAGENET_COUNTS:
        raise UserError(
            f"ImageNet has {_IMAGENET_COUNTS['train']:,} and {_IMAGENET_COUNTS['validation']:,} images, {train} has "
            f"{counts['train']:,} and {validation} has {counts['validation']:,}: fetch them again, or add --incomplete."
        )
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
            return f"{directory} is complete already: {_describe(shards)}."
        if pending:
            write_shards(pending, workers=workers)
        finish(directory, name, class_names, shards)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}.") from error
    return f"{directory} is complete: {_describe(shards)}."


def list_splits(
    *, train: str, validation: str, validation_labels: str = ""
) -> tuple[dict[str, list[Member]], tuple[str, ...]]:
    """Members of each split with their classes, and the names of the classes: those of the training images, sorted.

    Raises:
      UserError: images without classes, or validation classes that no training image has.
    """
    members = {"train": list_images(train), "validation": list_images(validation)}
    if not members["train"][0].class_name:
        raise UserError(
            f"The training images of {train} have no classes: wanted class folders, or a tar of each class."
        )
    if not members["validation"][0].class_name:
        classes = _read_labels(validation, len(members["validation"]), validation_labels)
        labelled = zip(members["validation"], classes, strict=True)
        # by class, as the training images are; the sort keeps the order of the names
        members["validation"] = sorted(
            (member._replace(class_name=name) for member, name in labelled), key=lambda member: member.class_name
        )
    elif validation_labels:
        raise UserError(f"The images of {validation} lie in classes: leave out --validation_labels.")
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
    """The shards of a split, their files named as TFDS wants."""
    count = -(-len(members) // records_per_shard)
    labels = index_classes((member.class_name for member in members), class_names, source=split)
    shards = []
    for index in range(count):
        chosen = slice(index * records_per_shard, (index + 1) * records_per_shard)
        path = directory / f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"
        report_path = (directory / PREPARE_INPUTS).with_name(f"{split}-{index:05d}.json")
        shards.append(Shard(split, path, report_path, members[chosen], labels[chosen]))
    return shards


def begin(
    directory: pathlib.Path, members: dict[str, list[Member]], class_names: Sequence[str], records_per_shard: int
) -> None:
    """Makes the output, and keeps what it is made of: so another call can tell whether it goes on with the same.

    Raises:
      UserError: the folder holds something else.
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
                f"{directory} was begun with other images or another --records_per_shard: repeat that command, or "
                f"choose another --output (kept: {path.read_text()[:200]})."
            )
        return
    if directory.is_dir() and any(entry.name != path.parent.name for entry in directory.iterdir()):
        raise UserError(f"{directory} is not empty: choose another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)


def write_shards(shards: Sequence[Shard], *, workers: int) -> None:
    """Writes shards in parallel, with a progress bar.

    Raises:
      UserError: of a worker.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} images/s, left"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=sum(len(shard.members) for shard in shards), rate=0.0)
        done, start = 0, time.monotonic()
        for count in _run(shards, workers):
            done += count
            progress.update(task, completed=done, rate=done / (time.monotonic() - start))


def write_shard(shard: Shard) -> int:
    """Writes a shard, then its report, each under a temporary name until it is whole. Returns the number of members.

    Raises:
      UserError: the archive cannot be read, or the file not be written.
    """
    from array_record.python import array_record_module

    temporary = shard.report_path.with_suffix(f".{os.getpid()}.array_record")
    records, record_bytes, damaged = 0, 0, []
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")  # one image a read
        for member, label in zip(shard.members, shard.labels, strict=True):
            data = read_member(member)
            with warnings.catch_warnings():  # of odd tags, which change no pixel
                warnings.simplefilter("ignore")
                reason = check_image(data)
            if reason is not None:
                damaged.append((member.name, plain_reason(reason)))
                continue
            record = encode_record(data, label=label, file_name=posixpath.basename(member.name))
            writer.write(record)
            records += 1
            record_bytes += len(record)
        writer.close()
        os.replace(temporary, shard.path)
    except RuntimeError as error:  # of the writer
        raise UserError(f"{shard.path} cannot be written: {plain_reason(error)}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    report = Report(records, record_bytes, shard.path.stat().st_size, damaged)
    atomic_write_text(shard.report_path, json.dumps(dataclasses.asdict(report)))
    return len(shard.members)


def encode_record(data: bytes, *, label: int, file_name: str) -> bytes:
    """A serialized tf.train.Example of the features that ``finish`` describes."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(data)
    example.features.feature["label"].int64_list.value.append(label)
    example.features.feature["file_name"].bytes_list.value.append(os.fsencode(file_name))
    return example.SerializeToString(deterministic=True)


def read_report(shard: Shard) -> Report | None:
    """The report of a finished shard; None where the shard is still to be written."""
    try:
        report = Report(**json.loads(shard.report_path.read_text()))
        whole = shard.path.stat().st_size == report.file_bytes
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return report if whole and report.records + len(report.damaged) == len(shard.members) else None


def finish(directory: pathlib.Path, name: str, class_names: Sequence[str], shards: Sequence[Shard]) -> None:
    """Writes damaged.txt, then the metadata of TFDS: with them the data set is complete.

    Raises:
      UserError: a shard is missing, or every image of a split is damaged.
    """
    missing = [shard.path.name for shard in shards if read_report(shard) is None]
    if missing:
        raise UserError(
            f"{missing[0]} in {directory} was changed while others were written: run the same command again."
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
    # the file by which a data set is known comes last
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == METADATA_FILES[0]):
        os.replace(path, directory / path.name)
    temporary.rmdir()
    for path in temporary.parent.glob("*.array_record"):  # of calls that were killed
        path.unlink()


def _write_metadata(
    directory: pathlib.Path, name: str, class_names: Sequence[str], reports: dict[str, list[Report]]
) -> None:
    """dataset_info.json, features.json and the names of the classes, as TFDS itself writes them."""
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
                dataset_name=name, data_dir=directory, split=split, filetype_suffix="array_record"
            ),
        )
        for split in SPLITS
    ]
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(directory)


def _read_labels(path: str, count: int, labels_path: str) -> list[str]:
    """The class of each of ``count`` flat images in ``path``, in the order of their names."""
    if labels_path:
        try:
            labels = pathlib.Path(labels_path).read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--validation_labels={labels_path} cannot be read: {error}.") from error
    elif count == _IMAGENET_COUNTS["validation"]:
        labels = _read_imagenet_list("validation_labels.txt")
    else:
        raise UserError(
            f"{path} holds {count:,} images without classes: give them, one a line, by --validation_labels=FILE."
        )
    if len(labels) != count:
        raise UserError(f"{labels_path} has {len(labels):,} lines for the {count:,} images of {path}.")
    return labels


def _read_imagenet_list(name: str) -> list[str]:
    """Lines of a file that tensorflow_datasets ships for ImageNet: labels.txt, sorted, or validation_labels.txt."""
    package = importlib.util.find_spec("tensorflow_datasets")  # located, not imported
    if package is None:
        raise UserError("Data sets are prepared with tensorflow_datasets: pip install tensorflow-datasets.")
    path = pathlib.Path(package.origin).parent / "datasets" / "imagenet2012" / name
    return path.read_text().split()


def _run(shards: Sequence[Shard], workers: int) -> Iterator[int]:
    """The results of ``write_shard``, as they come."""
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
        raise UserError("A worker was ended from outside: run the same command again, with fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others


def _read_reports(shards: Sequence[Shard]) -> dict[str, list[Report]]:
    """Of finished shards, by split."""
    return {split: [read_report(shard) for shard in shards if shard.split == split] for split in SPLITS}


def _describe(shards: Sequence[Shard]) -> str:
    parts = []
    for split, reports in _read_reports(shards).items():
        damaged = sum(len(report.damaged) for report in reports)
        parts.append(f"{sum(report.records for report in reports):,} {split} images, {damaged:,} damaged and left out")
    return "; ".join(parts)


def define_flags(values: flags.FlagValues) -> None:
    """All of this tool."""
    flags.DEFINE_string("train", None, "Training images.", flag_values=values)
    flags.DEFINE_string("validation", None, "Validation images.", flag_values=values)
    flags.DEFINE_string("output", None, "Where the data set goes; an unfinished one goes on.", flag_values=values)
    flags.DEFINE_string(
        "validation_labels", "", "The class of each flat validation image a line, by name.", flag_values=values
    )
    flags.DEFINE_integer("records_per_shard", 2048, "Images a file.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("incomplete", False, "Takes any number of ImageNet's images.", flag_values=values)


_FLAGS = {
    "What is read": ("train=PATH", "validation=PATH", "validation_labels=FILE", "incomplete"),
    "What is written": ("output=DIR", "records_per_shard=N", "workers=N"),
}


def main(_):
    """One call, and its mistakes as one sentence."""
    names = [form.partition("=")[0] for forms in _FLAGS.values() for form in forms]
    options = {name: flags.FLAGS[name].value for name in names}
    if not (options["train"] and options["validation"] and options["output"]):
        fail("Wanted: --train=PATH --validation=PATH --output=DIR, a PATH being a tar or a folder of images.")
    try:
        print(prepare(**options))
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    goes_on = "Interrupted: the same command goes on from here."
    run_tool(main, groups=_FLAGS, define_flags=define_flags, interrupted=goes_on)
