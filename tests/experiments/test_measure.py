"""What the benchmarks share, without measuring anything that takes long."""

import itertools
import pathlib
import types

import pytest

from experiments import measure
from experiments.model import trace


def return_or_end(*, value=None, end=None):
    """For the tests of fresh processes."""
    import os

    if end is not None:
        os.kill(os.getpid(), end)
    return {"value": value}


def compile_or_load(*, cache, repeats, name):
    """The second process finds what the first left."""
    file = pathlib.Path(cache) / name
    found = file.exists()
    file.touch()
    return {"repeats": repeats, "compile_seconds": 0.0 if found else 9.0, "whole_peak_bytes": 1 if found else 5}


def refuse():
    raise ValueError("no such thing")


def test_a_fresh_process_gives_what_the_function_returns_or_why_it_failed():
    name = "tests.experiments.test_measure"
    assert measure.run_fresh(f"{name}:return_or_end", value=[1, "two"]) == {"value": [1, "two"]}
    assert measure.run_fresh(f"{name}:return_or_end", end=9) == {"failed": "ended by SIGKILL"}
    assert measure.run_fresh(f"{name}:refuse") == {"failed": "ValueError: no such thing"}


def test_what_is_compiled_in_one_process_is_run_in_another():
    target = "tests.experiments.test_measure:compile_or_load"
    found = measure.compile_then_run(target, repeats=3, name="program")
    assert found == {"repeats": 3, "compile_seconds": 9.0, "whole_peak_bytes": 1, "compiling_peak_bytes": 5}


def test_all_calls_are_measured_in_every_round(monkeypatch):
    order, clock = [], itertools.count()
    fake_time = types.SimpleNamespace(perf_counter=lambda: float(next(clock)), sleep=lambda _: None)
    monkeypatch.setattr(measure, "time", fake_time)
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert measure.time_interleaved(calls, repeats=9, min_seconds=0.0) == {"a": 1.0, "b": 1.0}
    assert order[:2] == ["a", "b"]  # to see how long they take
    rounds = {tuple(order[start : start + 4]) for start in range(2, len(order), 4)}
    assert len(order) == 2 + 9 * 4
    assert rounds == {tuple("aabb"), tuple("bbaa")}  # each after one that is not timed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (1234.5, "1,234"),
        (56.78, "56.8"),
        (5.678, "5.68"),
        (0.1234, "0.123"),
        (0.01234, "0.0123"),
        (0, "0.0000"),
    ],
)
def test_numbers(value, text):
    assert measure.format_number(value) == text


def test_results_are_a_table_and_pictures(tmp_path):
    table = measure.format_table([{"a": 1, "b": "x"}, {"a": 2}])
    assert table == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 |  |"
    measure.write_results(tmp_path / "new", title="Title", sections={"": "first", "Head": table})
    assert (tmp_path / "new" / "results.md").read_text() == f"# Title\n\nfirst\n\n## Head\n\n{table}\n"
    measure.save_lines(tmp_path / "lines.png", {"p": {"l": {1: 2.0, 10: 3.0}}}, x_label="x", y_label="y")
    measure.save_bars(tmp_path / "bars.png", {str(i): {"a": 0.1, "b": 2.0} for i in range(4)}, x_label="x", log=True)
    for name in ("lines.png", "bars.png"):
        assert 5e3 < (tmp_path / name).stat().st_size < 1e5


HLO = """HloModule jit_step

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %e = f32[2]{0} exponential(%p)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %query = f32[2]{0} fusion(%x), calls=%fused, metadata={op_name="jit(s)/jvp(DAT)/stages_0/blocks_1/attn/proj_q/exp"}
  %back = f32[2]{0} copy(%query), metadata={op_name="jit(s)/transpose(jvp(DAT))/stages_0/blocks_0/attn/ab,b->a/mul"}
  ROOT %adam = f32[2]{0} copy(%back), metadata={op_name="jit(s)/add"}
}
"""


def make_event(name, start, duration, tid=1):
    return {"ph": "X", "pid": 1, "tid": tid, "ts": start, "dur": duration, "name": name, "args": {"hlo_op": name}}


def test_time_goes_to_the_module_and_direction_that_an_op_comes_from():
    events = [
        make_event("query", 0, 5000),
        make_event("back", 1000, 2000),  # inside of the other: not counted twice
        make_event("back", 0, 1000, tid=2),
        make_event("adam", 6000, 500),
        {**make_event("adam", 6500, 9000), "name": "end: adam"},
        {"ph": "M", "name": "thread_name"},
    ]
    times = trace.self_times(events)
    assert times == {"query": 3.0, "back": 3.0, "adam": 0.5}
    names = {"attn", "proj_q", "stages_0", "blocks_0", "blocks_1"}
    assert trace.attribute(times, trace.hlo.parse(HLO), stages=("ND",), names=names) == {
        ("D attention: proj_q", "fusion of elementwise ops", "forward"): 3.0,
        ("N attention", "copy", "backward"): 3.0,
        ("optimizer", "copy", "forward"): 0.5,
    }


def test_results_name_the_call_but_not_their_place(tmp_path):
    description = "Title.\n\nUsage.\n\nWhat is\nmeasured."
    parser = measure.make_parser("/somewhere/experiments/ops/benchmark.py", description, repeats=3, min_seconds=0.1)
    for output in ([f"--output={tmp_path}"], ["--output", str(tmp_path)]):
        options = parser.parse_args(["--repeats=5", *output])
        assert (options.repeats, options.output) == (5, tmp_path)
        assert options.command == "`python -m experiments.ops.benchmark --repeats=5`\n\nWhat is\nmeasured."
