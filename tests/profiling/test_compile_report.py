"""The report of what a compiler says, on the CPU's own, and on a TPU's where libtpu is installed."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from dat_jax import compile_report
from dat_jax.errors import UserError
from dat_jax.ops import dispatch
from dat_jax.profiling import step_report
from dat_jax.profiling import topologies as targets
from dat_jax.profiling.flops import count_product_flops
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cpu_report():
    return step_report.compile_report(tiny_config.get_config(stages=("D",)), topology="cpu", top=3)


def test_the_report_of_the_cpu(cpu_report):
    assert (cpu_report["chips"], cpu_report["dtype"]) == (8, "float32")
    train, evaluation = cpu_report["steps"]["train"], cpu_report["steps"]["eval"]
    assert (train["batch_size_per_chip"], evaluation["batch_size_per_chip"]) == (2, 4)
    assert train["fits"]
    assert train["roofline"] == {}
    memory = train["memory"]
    parts = ("parameters", "averaged_parameters", "optimizer_state", "other_arguments")
    arguments = sum(memory[name] for name in parts)
    outputs = memory["outputs"] - memory["outputs_in_place"]
    assert memory["peak"] == arguments + outputs + memory["temporaries"] + memory["generated_code"]
    assert 2 * memory["parameters"] <= memory["optimizer_state"] < 2 * memory["parameters"] + 100
    assert memory["averaged_parameters"] == 0
    assert train["collectives"]["all-reduce"]["bytes"] >= memory["parameters"]
    assert train["cost"]["flops"] > evaluation["cost"]["flops"] > 0
    assert 2 < (train["cost"]["product_flops"] / 2) / (evaluation["cost"]["product_flops"] / 4) < 4
    assert len(train["top"]["op"]) == 3
    assert any(row["name"].startswith("stages_0/blocks_0") for row in train["top"]["module"])


def test_the_report_is_printed_and_written(cpu_report, tmp_path):
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    compile_report.print_report(console, cpu_report)
    console.file.close()
    text = console.export_text()
    for words in ("dat_pp_nano, 32 x 32, float32, for 8 x cpu", "optimizer state", "all-reduce", "train, by module"):
        assert words in text
    compile_report.write_json(tmp_path / "report.json", cpu_report)
    assert json.loads((tmp_path / "report.json").read_text()) == cpu_report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(UserError, match="cannot be written"):
        compile_report.write_json(tmp_path / "nowhere" / "report.json", cpu_report)


def test_what_is_compiled_for_another_platform_is_what_it_would_run():
    config = tiny_config.get_config(dtype="auto")
    donated = {}
    for platform in ("cpu", "tpu"):
        with dispatch.compiling_for(platform):
            trainer = Trainer(config)
            step, arguments, _ = step_report.step_function(trainer, "train")
            lowered = step.lower(*arguments)
            donated[platform] = {leaf.donated for leaf in jax.tree.leaves(lowered.args_info[0][0])}
            assert ("bf16" in lowered.as_text()) == (platform == "tpu")
            assert dispatch.target_platform() == platform
    assert donated == {"cpu": {jax.__version_info__ >= (0, 9, 1)}, "tpu": {True}}
    assert dispatch.target_platform() == "cpu"
    assert dispatch.choose("depthwise_conv", "auto", map_shape=(8, 8)) == "shifts"


def test_a_step_that_needs_more_memory_than_there_is(monkeypatch):
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.25G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://openxla.org"
    )

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    config = tiny_config.get_config(stages=("D",))
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    report = step_report.compile_report(config, topology="cpu")["steps"]["train"]
    assert not report["fits"]
    assert "(18.25G) exceeds available HBM (15.75G)" in report["message"]
    message = "INTERNAL: Mosaic failed to compile the kernel.\nmore"
    with pytest.raises(UserError, match="refuses the train step: INTERNAL: Mosaic failed to compile the kernel.$"):
        step_report.compile_report(config, topology="cpu")


def test_a_compiled_text_that_cannot_be_read_costs_its_rows_only(monkeypatch):
    def refuse(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: operands\nmore")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", refuse)
    config = tiny_config.get_config(stages=("D",))
    report = step_report.compile_report(config, topology="cpu", steps=("train",))
    train = report["steps"]["train"]
    assert train["fits"]
    assert train["memory"]["temporaries"] > 0
    assert train["cost"]["product_flops"] > 0
    assert train["cost"]["bytes"] is None
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    compile_report.print_report(console, report)
    printed = console.export_text()
    assert "temporaries" in printed
    assert "cannot be read, so collectives are not known: INTERNAL: RET_CHECK failure: operands" in printed


def test_a_step_fits_where_its_peak_is_at_most_the_memory_of_the_chip(monkeypatch):
    """The search is told by the batch alone: here 48 examples a chip have room."""
    seen, notes = [], []

    def report_step(trainer, step, *, chip, top):
        batch = trainer.config.batch_size // trainer.mesh.size
        seen.append(batch)
        return {"fits": batch <= 48, "memory": {"peak": 2**20 * batch}}

    monkeypatch.setattr(step_report, "report_step", report_step)
    config = tiny_config.get_config(stages=("D",))
    sources = step_report.make_sources(config, classes=0, examples=0)
    report = step_report.find_batch(config, "train", topology="cpu", sources=sources, note=notes.append)
    assert report["steps"]["train"]["memory"]["peak"] == 48 * 2**20
    assert seen == [8, 16, 32, 64, 48, 56]
    assert notes[0] == "train: a batch of 8 a chip fits, peak 8.00 MiB."
    assert notes[-1] == "train: a batch of 56 a chip does not fit."
    monkeypatch.setattr(step_report, "report_step", lambda *_, **__: {"fits": False, "memory": {}})
    with pytest.raises(UserError, match="Not even a batch of 8 a chip fits the eval step on cpu"):
        step_report.find_batch(config, "eval", topology="cpu", sources=sources, note=notes.append)


@pytest.mark.parametrize("capacity", [0, 7, 8, 15, 16, 100, 127, 128, 1000])
@pytest.mark.parametrize("unit", [8, 24])
def test_the_largest_that_fits(capacity, unit):
    wanted = min(capacity, 192) // unit * unit
    assert step_report.largest_that_fits(lambda n: n <= capacity, unit=unit, limit=192) == wanted


def test_accumulated_parts_are_all_counted():
    flops = {}
    for parts in (1, 2):
        config = tiny_config.get_config(stages=("D",)).unlock()
        config.accumulate_steps = parts
        trainer = Trainer(config)
        step, arguments, _ = step_report.step_function(trainer, "train")
        flops[parts] = count_product_flops(step.trace(*arguments).jaxpr.jaxpr)
    assert math.isclose(flops[1], flops[2], rel_tol=0.05)


def test_mistakes_are_said_in_one_sentence(monkeypatch, tmp_path):
    for name in ("v5e", "v5e:2", "v5e:2x2x1", "v5p:2x2", "v4:2x2x1", "h100:2", "cpu:8", "v5e:0x2", ""):
        with pytest.raises(UserError, match=f"Unknown topology '{name}'; choose v5e:2x2"):
            targets.find_devices(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install libtpu\.$"):
        targets.find_devices("v5e:2x2")
    with pytest.raises(UserError, match=r'not installed: pip install "jax\[cuda12\]"\.$'):
        targets.find_devices("h100")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"--target_config .*none\.txtpb cannot be read: No such file"):
        targets.find_devices("h100", target_config=tmp_path / "none.txtpb")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py", "--find-batch"], "Expected --config=CONFIG --topology=NAME"),
        (["--config=configs/dat_pp_t.py", "--topology=cpu", "--config.batch_size=60"], "60 is not a multiple of 8"),
    ],
)
def test_the_program_ends_with_one_sentence(arguments, message):
    result = run_program(*arguments)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("WARNING:absl:Grain")]  # with older JAX
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def run_program(*arguments):
    command = [sys.executable, "-m", "dat_jax.compile_report", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_report_of_a_tpu():
    """On four chips with the parameters split, and a batch that no chip holds."""
    config = tiny_config.get_config(stages=("D",), dtype="auto", dim_stem=128, dims=(128,), num_heads=(4,)).unlock()
    config.mesh.fsdp = 4
    options = dict(topology="v5e:2x2", steps=("train",))
    report = step_report.compile_report(config, **options, top=5)
    train = report["steps"]["train"]
    assert (report["chips"], report["dtype"], train["fits"]) == (4, "bfloat16", True)
    assert train["memory"]["available"] == 16 * 2**30
    assert train["memory"]["outputs_in_place"] > 0
    assert train["collectives"].keys() & {"all-gather", "all-reduce", "reduce-scatter"}
    assert train["cost"]["padded_bytes"] > train["cost"]["bytes"] > 0
    # What is read from the text is near what the compiler counts, without knowing how it counts.
    assert 0.5 < train["cost"]["padded_bytes"] / train["cost"]["bytes_accessed"] < 2
    assert train["roofline"]["binds"] == "memory"
    config.batch_size = 4 * 2**13
    config.data.image_size = config.data.eval_resize = 64
    sources = (step_report.StandIn(2**30, ("left", "right")),) * 2
    report = step_report.compile_report(config, **options, sources=sources)["steps"]["train"]
    assert not report["fits"]
    assert "15.75G" in report["message"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_kernels_in_a_step_of_several_chips():
    """Each chip runs them on its part of the batch: nothing of it is gathered."""
    config = tiny_config.get_config(dtype="auto", implementation="pallas", dim_stem=32, dims=(32,))
    report = step_report.compile_report(config, topology="v5e:2x2", steps=("train",), top=30)
    train = report["steps"]["train"]
    kernels = [row for row in train["top"]["op"] if row["name"] == "custom-call tpu_custom_call"]
    # Forward and backward of two attentions, a sampling and two MLPs.
    assert [row["ops"] for row in kernels] == [10]
    assert set(train["collectives"]) == {"all-reduce"}
