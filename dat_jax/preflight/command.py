"""The command ``python -m dat_jax.check``: run the parts of the check on all processes, and print what they found."""

import contextlib
import json
import pathlib
import shutil
import time
import uuid
from collections.abc import Collection, Iterator

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
from dat_jax.storage import as_path, exists, is_in_bucket, remove
from dat_jax.training.monitoring import sinks
from dat_jax.training.workdir import WorkDirectory

_NEEDED_FOR_ESTIMATE = set(PHASES) - {"algorithms", "communication"}


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
            if name in skip or missing:
                reason = "skipped" if name in skip else f"not checked, since {name_some(missing)} did not succeed"
                console.print(f"{name}: {reason}")
                continue
            problems += _run_phase(name, phase, session, console)
        _print_estimate(session, console)
    for problem in problems:
        console.print(f"PROBLEM: {problem}")
    verdict = f"{len(problems)} problem{'s' * (len(problems) != 1)} found" if problems else "No problem was found"
    console.print(f"{verdict}, in {time.monotonic() - start:.0f} s.")
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
        if answer["failure"]:
            failures.setdefault(answer["failure"], []).append(process)
    if failures:
        problems = [f"{_name_processes(processes, len(answers))}{text}" for text, processes in failures.items()]
        print_table(console, "", {name: "failed, see below"})
        return [f"{name}: {problem}" for problem in problems]
    gathered = [answer["values"] for answer in answers]
    session.values[name] = gathered
    outcome: Outcome = phase.describe(session, gathered)
    print_table(console, "", outcome.rows)
    return [f"{name}: {problem}" for problem in outcome.problems]


def _name_processes(processes: list[int], count: int) -> str:
    return "" if len(processes) == count else f"process {name_some(list(map(str, processes)))} of {count}: "


def _print_estimate(session: Session, console: Console) -> None:
    if not set(session.values) >= _NEEDED_FOR_ESTIMATE:
        console.print("There is no estimate, since parts of the check are missing.")
        return
    measured = session.collect()
    if not measured.steps_left:
        console.print("The run in this work directory has done all its steps.")
        return
    estimate = estimate_run(measured)
    print_table(console, "Estimate", estimate.describe())
    for sentence in estimate.advice:
        console.print(f"Advice: {sentence}")


@contextlib.contextmanager
def _make_scratch(workdir: str) -> Iterator[WorkDirectory]:
    """A directory inside the work directory, which is removed at the end, with the parents that were missing."""
    name = multihost.broadcast_text(f".check-{uuid.uuid4().hex}")
    path = as_path(workdir) / name
    missing = [] if is_in_bucket(path) else [parent for parent in path.parents if not parent.exists()]
    try:
        with WorkDirectory(str(path)) as scratch:
            yield scratch
        multihost.wait("check")
    finally:
        with contextlib.suppress(OSError):
            if isinstance(path, pathlib.PosixPath) and not is_in_bucket(path):
                shutil.rmtree(path, ignore_errors=True)
            elif jax.process_index() == 0 and exists(path):
                remove(path)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
