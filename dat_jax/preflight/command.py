"""The command ``python -m dat_jax.check``: run the parts of the check on all processes, and print what they found."""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence

import jax
from ml_collections import ConfigDict
from rich.console import Console

from dat_jax.checkpoints.orbax_messages import ORBAX_ERRORS
from dat_jax.cli.console import configure_logging, make_console, print_table
from dat_jax.config import validate
from dat_jax.errors import UserError, name_some
from dat_jax.parallel import multihost
from dat_jax.preflight.estimate import estimate_run
from dat_jax.preflight.phases import PHASES, Outcome, Phase, Session
from dat_jax.storage import Path, as_path, exists, is_in_bucket, remove
from dat_jax.training.monitoring import sinks
from dat_jax.training.workdir import WorkDirectory

logger = logging.getLogger(__name__)
_NEEDED_FOR_ESTIMATE = ("storage", "input", "steps", "checkpoint")


def check(
    config: ConfigDict,
    workdir: str,
    *,
    seconds: float = 10.0,
    expected_devices: int | None = None,
    skip: Collection[str] = (),
) -> list[str]:
    """Check a run on the machines that it will use, and print what was measured, an estimate, problems and advice.

    Nothing is left in the work directory. Compiled programs are kept as ``config.compilation_cache`` says, so that the run does
    not compile again.

    Args:
      config: configuration of the run.
      workdir: its work directory. A run in it is not disturbed.
      seconds: for how long images are loaded to measure the speed of the input.
      expected_devices: number of devices of all processes, or None for any number.
      skip: parts of ``PHASES`` that are left out.

    Returns:
      The problems, in sentences: what would end the run or spoil its results.

    Raises:
      UserError: an argument or the configuration is invalid.
    """
    unknown = sorted(set(skip) - set(PHASES))
    if unknown:
        raise UserError(f"--skip: there is no {name_some(unknown)}; choose from {', '.join(PHASES)}.")
    multihost.check_started()
    validate(config)
    sinks.check_sinks(config.get("logs", ()))
    first = jax.process_index() == 0
    configure_logging(enabled=first)
    console = make_console(quiet=not first)
    start = time.monotonic()
    with _make_scratch(workdir) as scratch:
        session = Session(config, workdir, scratch, seconds=seconds, expected_devices=expected_devices)
        problems = []
        for name, phase in PHASES.items():
            missing = [other for other in phase.needs if other not in session.values]
            if name in skip:
                console.print(f"{name}: skipped")
            elif missing:
                console.print(f"{name}: not checked, because it needs {name_some(missing)}")
            else:
                found = _run_phase(name, phase, session, console)
                _print_problems(found, console)
                problems += found
        _print_estimate(session, console)
    duration = f"{time.monotonic() - start:.0f} s"
    if problems:
        console.print(f"{_count(len(problems))} found in {duration}:")
        _print_problems(problems, console)
    else:
        console.print(f"No problem was found, in {duration}. To start the run, use the same flags with dat_jax.main.")
    return problems


def _run_phase(name: str, phase: Phase, session: Session, console: Console) -> list[str]:
    """Run one part in all processes and print what it found. Returns its problems."""
    console.print(f"Checking: {name}")
    values, failure = {}, ""
    try:
        values = phase.measure(session)
    except UserError as error:
        failure = str(error)
    except (*ORBAX_ERRORS, ArithmeticError, LookupError) as error:
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    answers = [json.loads(text) for text in multihost.gather_texts(json.dumps({"values": values, "failure": failure}))]
    failures: dict[str, list[int]] = {}
    for process, answer in enumerate(answers):
        if text := answer["failure"].replace(str(session.scratch), str(session.workdir)):
            failures.setdefault(text, []).append(process)
    if failures:
        problems = [f"{_name_processes(processes, len(answers))}{text}" for text, processes in failures.items()]
        return [f"{name}: {problem}" for problem in problems]
    gathered = [answer["values"] for answer in answers]
    session.values[name] = gathered
    outcome: Outcome = phase.describe(session, gathered)
    print_table(console, "", outcome.rows)
    return [f"{name}: {problem}" for problem in outcome.problems]


def _print_problems(problems: list[str], console: Console) -> None:
    for problem in problems:
        console.print(f"PROBLEM: {problem}")


def _count(problems: int) -> str:
    return f"{problems} problem{'s' * (problems != 1)}"


def _name_processes(processes: list[int], count: int) -> str:
    return "" if len(processes) == count else f"process {name_some(list(map(str, processes)))} of {count}: "


def _print_estimate(session: Session, console: Console) -> None:
    missing = [name for name in _NEEDED_FOR_ESTIMATE if name not in session.values]
    if missing:
        console.print(f"There is no estimate, because it needs {name_some(missing)}.")
        return
    measured = session.collect()
    if not measured.steps_left:
        console.print("The run in this work directory has done all its steps.")
        return
    estimate = estimate_run(measured)
    without = "" if "evaluation" in session.values else ", without evaluations"
    print_table(console, f"Estimate{without}", estimate.describe())
    for sentence in estimate.advice:
        console.print(f"Advice: {sentence}")


@contextlib.contextmanager
def _make_scratch(workdir: str) -> Iterator[WorkDirectory]:
    """A directory inside the work directory, which is removed at the end, with the parents that were missing."""
    name = multihost.broadcast_text(f".check-{uuid.uuid4().hex}")
    path = as_path(workdir) / name
    missing = [] if is_in_bucket(path) else [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        with WorkDirectory(str(path)) as scratch:
            yield scratch
        multihost.wait("check")
    finally:
        with _without_signals():
            _remove_scratch(path, missing)


def _remove_scratch(path: Path, missing: Sequence[Path]) -> None:
    """Remove a folder and the parents that were missing before. A failure is logged as a warning."""
    try:
        if is_in_bucket(path):
            if jax.process_index() == 0 and exists(path):
                remove(path)
            return
        if os.path.exists(path):
            shutil.rmtree(path, ignore_errors=jax.process_count() > 1)  # several processes remove the same files
    except OSError as error:
        logger.warning("%s could not be removed: %s. Please delete it.", path, error.strerror or error)
    for parent in missing:
        with contextlib.suppress(OSError):
            parent.rmdir()


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP do nothing."""
    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
