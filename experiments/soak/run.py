"""Recovery of quickstart runs from kills, signals and a full disk; runs in a bucket; several processes; memory leaks.

JAX_PLATFORMS=cpu python -m experiments.soak.run [--parts=kills,bucket,...] [--output=DIR]

- **kills**: a run of 200 steps is killed at random times, some of them while it saves or starts, and is restarted each time. Its
  last state is compared bit for bit with that of an uninterrupted run.
- **bucket**: as kills, with the work directory and the compilation cache in a bucket of a storage server on this machine, whose
  last state is compared with that of a run on the disk. Some kills are in the middle of an upload.
- **bucket_processes**: the same with two processes of four virtual devices each, which have working and temporary folders of
  their own. Each time, both are killed, one up to a second after the other.
- **signal**: SIGTERM is sent to one of two processes.
- **processes**: two processes with four virtual devices each, and one process with eight. The losses of 30 steps are compared,
  and both evaluations of a checkpoint that the other layout wrote.
- **disk**: a file system of 20 MB fills up (tmpfs, which requires root).
- **memory**: resident memory and open files are recorded once per second during 2,000 steps and 20 evaluations.
"""

import collections
import contextlib
import functools
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np

from experiments import measure
from experiments.soak import bucket_server, processes

PARTS = ("kills", "bucket", "bucket_processes", "signal", "processes", "disk", "memory")
CONFIG = "configs/quickstart.py"
ONE_EPOCH = {
    "epochs": 1,
    "batch_size": 20,
    "log_every": 1,
    "checkpoint.every": 10,
    "schedule.warmup_epochs": 0.1,
}  # 200 steps
OF_TWO_PROCESSES = {**ONE_EPOCH, "batch_size": 40}  # 100 steps
_WAIT_SECONDS = 900


def start(workdir: pathlib.Path | str, cache: pathlib.Path | str, values: dict, **options) -> list[subprocess.Popen]:
    """Start a run of the quickstart with its compilation cache in ``cache``."""
    return processes.start(CONFIG, workdir, values={**values, "compilation_cache": cache}, **options)


def read_state(workdir: pathlib.Path | str, values: dict, step: int):
    """State of a checkpoint, on the host."""
    import jax

    from configs import quickstart
    from dat_jax import storage
    from dat_jax.checkpoints.manager import Checkpoints
    from dat_jax.training.trainer import Trainer

    directory = storage.as_path(workdir) / "checkpoints"
    config = quickstart.get_config().unlock()
    config.update_from_flattened_dict(values)
    trainer = Trainer(config.lock(), devices=jax.devices()[:1])
    with Checkpoints(directory, metric=trainer.task.metric, read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore(step, trainer.abstract_state)[0])


def run_kills(directory: pathlib.Path, cache: pathlib.Path, *, kills: int, seed: int) -> dict[str, str]:
    """Kill and restart a run, and compare its last state with that of an uninterrupted run."""
    rng = random.Random(seed)
    alone, killed = directory / "alone", directory / "killed"
    processes.finish(start(alone, cache, ONE_EPOCH, devices=1), seconds=_WAIT_SECONDS)
    moments, resumed, set_aside, done = collections.Counter(), [], 0, 0
    while done < kills:
        (running,) = start(killed, cache, ONE_EPOCH, devices=1)
        moment = ("during training", "during saving", "during training", "during saving", "during start")[done % 5]
        if moment == "during start":
            time.sleep(rng.uniform(0, 8))
        elif moment == "during training":
            _wait_for_lines(killed, _count_lines(killed) + rng.randint(1, 18), [running])
            time.sleep(rng.uniform(0, 0.05))
        else:
            while running.poll() is None and not any((killed / "checkpoints").glob("*orbax-checkpoint-tmp*")):
                time.sleep(0.001)
        printed = _kill(running)
        moments[moment] += 1
        resumed += [int(step) for step in re.findall(r"Resumed at step (\d+) of", printed)]
        set_aside += printed.count("moved to")
        done += 1
    (printed,) = processes.finish(start(killed, cache, ONE_EPOCH, devices=1), seconds=_WAIT_SECONDS)
    return {
        "kills": f"{done}: " + ", ".join(f"{count} {moment}" for moment, count in moments.items()),
        "resumed at step": ", ".join(map(str, resumed)),
        "unfinished or damaged checkpoints, set aside": str(set_aside),
        "arrays of the last state equal, bit for bit": compare_states(killed, alone),
    }


def _kill(running: Sequence[subprocess.Popen], *, first: int = 0, delay: float = 0.0) -> str:
    """Kill processes that have not exited.

    Args:
      running: processes of a run.
      first: index of the one that is killed first.
      delay: seconds until the others are killed.

    Returns:
      What the process with index 0 printed.
    """
    for process in running:
        if process.poll() is not None:
            raise RuntimeError(f"exited before it was killed:\n{process.communicate()[0]}")
    running[first].kill()
    time.sleep(delay)
    for process in running:
        process.kill()
    printed, *_ = [process.communicate()[0] for process in running]
    return printed


def compare_states(
    first: pathlib.Path | str, second: pathlib.Path | str, *, values: dict = ONE_EPOCH, step: int = 200
) -> str:
    """Number of equal arrays of the states of two runs at a step, and of all arrays."""
    import jax

    states = [jax.tree.leaves(read_state(path, values, step)) for path in (first, second)]
    equal = sum(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*states, strict=True))
    return f"{equal} of {len(states[0])}"


def run_bucket(
    directory: pathlib.Path, cache: pathlib.Path, *, kills: int, seed: int, count: int = 1
) -> dict[str, str]:
    """Kill and restart a run of ``count`` processes in a bucket, and compare its last state with that of a run on the disk."""
    from dat_jax import storage

    rng, moments, resumed, set_aside = random.Random(seed), collections.Counter(), [], 0
    on_disk, workdir = directory / f"on_disk_{count}", "gs://soak-bucket/runs/killed"
    values, steps, options = ONE_EPOCH, 200, {"devices": 1}
    if count > 1:
        values, steps, options = OF_TWO_PROCESSES, 100, {"processes": count}
    processes.finish(start(on_disk, cache, values, **options), seconds=_WAIT_SECONDS)
    if count > 1:
        options["folders"] = [directory / f"host_{index}" for index in range(count)]
        for folder in options["folders"]:
            folder.mkdir()
    with bucket_server.run_server() as url:
        os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
        bucket_server.make_bucket(url, "soak-bucket")
        start_again = functools.partial(start, workdir, "gs://soak-bucket/cache", values, **options)
        for number in range(kills):
            running = start_again()
            moment = ("during an upload", "during an upload", "at any time")[number % 3]
            if moment == "at any time":
                time.sleep(rng.uniform(5, 14) * count)
            else:
                _wait_for_upload(running[0], storage, workdir, number=rng.randint(1, 2))
                time.sleep(rng.uniform(0, 0.1))
            printed = _kill(running, first=rng.randrange(count), delay=rng.uniform(0, 1) * (count > 1))
            moments[moment] += 1
            resumed += [int(step) for step in re.findall(r"Resumed at step (\d+) of", printed)]
            set_aside += printed.count("moved to")
        printed, *_ = processes.finish(start_again(), seconds=_WAIT_SECONDS)
        set_aside += printed.count("moved to")
        series = read_series(storage.fetch(workdir))
        return {
            "kills": f"{kills}: " + ", ".join(f"{times} {moment}" for moment, times in moments.items()),
            "resumed at step": ", ".join(map(str, resumed)),
            "unfinished checkpoints, set aside": str(set_aside),
            "steps whose loss is in the metrics": f"{len(series['train/loss'])} of {steps}",
            "arrays of the last state equal to those of a run on the disk, bit for bit": compare_states(
                workdir, on_disk, values=values, step=steps
            ),
        }


def _wait_for_upload(running: subprocess.Popen, storage, workdir: str, *, number: int) -> None:
    """Wait until the upload of the checkpoint of this number, counted from the start of a process, has begun."""
    before, seen = _list_checkpoints(storage, workdir)[1], set()
    while running.poll() is None:
        complete, present = _list_checkpoints(storage, workdir)
        seen |= present - before
        if len(seen) >= number and present - complete - before:
            return
        time.sleep(0.01)


def _list_checkpoints(storage, workdir: str) -> tuple[set[str], set[str]]:
    """Steps with a complete checkpoint, and steps with any file."""
    names = storage.list_objects(storage.as_path(workdir) / "checkpoints")
    complete = {name.partition("/")[0] for name in names if name.endswith("/files.json")}
    return complete, {name.partition("/")[0] for name in names if name[0].isdigit()}


def read_series(workdir: pathlib.Path) -> dict[str, dict[int, float]]:
    """Metrics of a run."""
    from dat_jax.training.monitoring.metrics import read_metrics

    return read_metrics(workdir / "metrics.jsonl")


def run_signal(directory: pathlib.Path, cache: pathlib.Path) -> dict[str, str]:
    """Send SIGTERM to one of two processes."""
    workdir = directory / "signal"
    running = start(workdir, cache, {**ONE_EPOCH, "batch_size": 16, "eval.batch_size": 200}, processes=2)
    _wait_for_lines(workdir, 20, running)
    running[1].send_signal(signal.SIGTERM)
    printed = processes.finish(running, seconds=_WAIT_SECONDS)
    step = re.search(r"Ended by .* at step (\d+)\.", printed[0])[1]
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    return {"SIGTERM to the second of two processes": f"both exited with status 0 at step {step}; checkpoints {saved}"}


def run_processes(directory: pathlib.Path, cache: pathlib.Path) -> dict[str, str]:
    """Compare two processes with one."""
    from dat_jax.training.monitoring.metrics import read_metrics

    values = {"epochs": 1, "batch_size": 128, "log_every": 1, "schedule.warmup_epochs": 0.2}  # 31 steps
    series_by_count = {}
    for count in (1, 2):
        processes.finish(start(directory / f"of_{count}", cache, values, processes=count), seconds=_WAIT_SECONDS)
        series_by_count[count] = read_metrics(directory / f"of_{count}" / "metrics.jsonl")
    losses = {count: series["train/loss"] for count, series in series_by_count.items()}
    difference = max(abs(losses[1][step] - losses[2][step]) for step in range(1, 31))
    evaluations = {
        count: {name: list(values.values()) for name, values in series.items() if name.startswith("eval/")}
        for count, series in series_by_count.items()
    }
    more = {**values, "epochs": 2}
    continued = {}
    for count in (1, 2):  # each resumes from the checkpoint of the other layout
        (first, *_) = processes.finish(
            start(directory / f"of_{3 - count}", cache, more, processes=count), seconds=_WAIT_SECONDS
        )
        assert "Resumed at step 31 of 62" in first, first
        continued[count] = read_metrics(directory / f"of_{3 - count}" / "metrics.jsonl")["train/loss"][62]
    return {
        "largest difference between the losses of 30 steps of two processes and of one": f"{difference:.1e}",
        "evaluation of one process, of two": f"{evaluations[1]}, {evaluations[2]}",
        "loss of step 62, after each resumed from the other's checkpoint": f"{continued[1]:.6f}, {continued[2]:.6f}",
    }


def run_disk(directory: pathlib.Path, cache: pathlib.Path) -> dict[str, str]:
    """Fill up the disk of a run."""
    with _small_disk(directory / "disk", megabytes=20) as disk:
        if disk is None:
            return {"a disk of 20 MB": "not run: tmpfs requires root"}
        (printed,) = processes.finish(start(disk / "run", cache, ONE_EPOCH, devices=1), seconds=_WAIT_SECONDS)
        warnings = re.findall(r"WARNING: Step \d+ could not be saved: [^.]*\.", printed)
        steps = sorted(int(path.name) for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdigit())
        lines = _count_lines(disk / "run")
        state = read_state(disk / "run", ONE_EPOCH, steps[-1])
        return {
            "a disk of 20 MB": f"exited with status 0; {len(warnings)} saves failed; {lines} lines of metrics; checkpoints "
            f"{steps}; latest readable checkpoint: step {int(state.step)}",
            "the first warning": warnings[0] if warnings else "none",
        }


def run_memory(directory: pathlib.Path, cache: pathlib.Path) -> dict[str, str]:
    """Record memory and open files of a run."""
    values = {"epochs": 20, "batch_size": 40, "checkpoint.every": 50}
    (running,) = start(directory / "memory", cache, values, devices=1)
    samples = []
    while running.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            status = pathlib.Path(f"/proc/{running.pid}/status").read_text()
            resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 2**20
            files = len(list(pathlib.Path(f"/proc/{running.pid}/fd").iterdir()))
            samples.append((time.monotonic(), resident, files))
        time.sleep(1)
    processes.finish([running], seconds=10)
    samples = samples[len(samples) // 5 :]  # warm-up, four of twenty epochs
    fifth = max(1, len(samples) // 5)
    first, last = (
        [statistics.median(sample[index] for sample in part) for index in (1, 2)]
        for part in (samples[:fifth], samples[-fifth:])
    )
    return {
        "resident memory after warm-up, at the end, GiB": f"{first[0]:.3f}, {last[0]:.3f}",
        "change of resident memory": f"{100 * (last[0] / first[0] - 1):+.1f} %",
        "open files after warm-up, at the end": f"{first[1]:.0f}, {last[1]:.0f}",
        "steps, evaluations, seconds observed": f"2000, 20, {samples[-1][0] - samples[0][0]:.0f}",
    }


@contextlib.contextmanager
def _small_disk(path: pathlib.Path, *, megabytes: int) -> Iterator[pathlib.Path | None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _count_lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _wait_for_lines(workdir, count, running):
    """Wait until the metrics have ``count`` lines."""
    while _count_lines(workdir) < count:
        if any(process.poll() is not None for process in running):
            raise RuntimeError(f"exited before {count} lines:\n" + "\n".join(processes.finish(running, seconds=10)))
        time.sleep(0.01)


def main(arguments: list[str] | None = None) -> None:
    """Run the selected parts and write the results."""
    parser = measure.make_parser(__file__, __doc__, repeats=1, min_seconds=0.0)
    parser.add_argument("--parts", type=measure.words, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=20, help="number of kills; half of them for a bucket")
    parser.add_argument("--seed", type=int, default=0, help="seed for the times of the kills")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    parts = {
        "kills": functools.partial(run_kills, kills=options.kills, seed=options.seed),
        "bucket": functools.partial(run_bucket, kills=options.kills // 2, seed=options.seed),
        "bucket_processes": functools.partial(run_bucket, kills=options.kills // 2, seed=options.seed, count=2),
        "signal": run_signal,
        "processes": run_processes,
        "disk": run_disk,
        "memory": run_memory,
    }
    product, sections = [measure.time_matrix_product()], {}
    with tempfile.TemporaryDirectory() as directory:
        cache = pathlib.Path(directory) / "cache"
        for name in options.parts:
            results = parts[name](pathlib.Path(directory), cache)
            print(name, results, flush=True)
            rows = [{"measurement": label, "result": value} for label, value in results.items()]
            sections[name] = measure.format_table(rows)
    product.append(measure.time_matrix_product())
    head = f"{measure.describe_machine(product_seconds=product)}\n\n{options.command}"
    measure.write_results(options.output, title="Recovery of a run from failures", sections={"": head, **sections})


if __name__ == "__main__":
    main()
