"""Compilation reports for the CPU, and for TPUs if libtpu is installed."""

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

from dat_jax.errors import UserError
from dat_jax.ops import dispatch
from dat_jax.profiling import command, step_report, topologies
from dat_jax.profiling.flops import count_product_flops
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cpu_report():
    return step_report.compile_report(tiny_config.get_config(stages=("D",)), topology="cpu", top=3)


def test_report_for_the_cpu(cpu_report):
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


def test_report_is_printed_and_written(cpu_report, tmp_path):
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    command.print_report(console, cpu_report)
    console.file.close()
    text = console.export_text()
    said = (
        "dat_pp_nano, crops of 32 x 32 pixels, float32, for 8 x cpu",
        "optimizer state",
        "all-reduce",
        "train, by module",
    )
    for words in said:
        assert words in text
    command.write_json(tmp_path / "report.json", cpu_report)
    assert json.loads((tmp_path / "report.json").read_text()) == cpu_report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(UserError, match="cannot be written"):
        command.write_json(tmp_path / "report.json" / "report.json", cpu_report)


def test_steps_for_another_platform_use_its_dtype_and_algorithms():
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


def test_a_step_that_runs_out_of_memory_does_not_fit(monkeypatch):
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.25G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://openxla.org"
    )

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    config = tiny_config.get_config(stages=("D",))
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    report = step_report.compile_report(config, topology="cpu")["steps"]["train"]
    assert not report["fits"]
    assert "(18.25G) exceeds available HBM (15.75G)" in report["message"]
    message = "INTERNAL: Mosaic failed to compile the kernel.\nmore"
    with pytest.raises(UserError, match="train step failed: INTERNAL: Mosaic failed to compile the kernel.$"):
        step_report.compile_report(config, topology="cpu")


def test_report_of_a_compiled_program_that_cannot_be_read(monkeypatch):
    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: operands\nmore")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
    config = tiny_config.get_config(stages=("D",))
    report = step_report.compile_report(config, topology="cpu", steps=("train",))
    train = report["steps"]["train"]
    assert train["fits"]
    assert train["memory"]["temporaries"] > 0
    assert train["cost"]["product_flops"] > 0
    assert train["cost"]["bytes"] is None
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    command.print_report(console, report)
    printed = console.export_text()
    assert "temporaries" in printed
    assert "cannot be read, so collectives are unknown: INTERNAL: RET_CHECK failure: operands" in printed


def test_largest_batch_that_fits_is_found(monkeypatch, logs):
    """Here 48 examples per chip fit."""
    sizes = []

    def report_step(run, step, *, chip, top):
        batch = run.config.batch_size // run.mesh.size
        sizes.append(batch)
        return {"fits": batch <= 48, "memory": {"peak": 2**20 * batch}}

    monkeypatch.setattr(step_report, "report_step", report_step)
    config = tiny_config.get_config(stages=("D",))
    sources = step_report.make_sources(config, classes=0, examples=0)
    report = step_report.find_batch(config, "train", topology="cpu", sources=sources)
    assert report["steps"]["train"]["memory"]["peak"] == 48 * 2**20
    assert sizes == [8, 16, 32, 64, 48, 56]
    assert logs[0] == "train: batch size 8 per chip fits, peak 8.00 MiB."
    assert logs[-1] == "train: batch size 56 per chip does not fit."
    monkeypatch.setattr(step_report, "report_step", lambda *_, **__: {"fits": False, "memory": {}})
    with pytest.raises(UserError, match="eval step does not fit on cpu even with a batch size of 8 per chip"):
        step_report.find_batch(config, "eval", topology="cpu", sources=sources)


@pytest.mark.parametrize("capacity", [0, 7, 8, 15, 16, 100, 127, 128, 1000])
@pytest.mark.parametrize("unit", [8, 24])
def test_bisection_finds_the_largest_multiple_that_fits(capacity, unit):
    expected = min(capacity, 192) // unit * unit
    assert step_report.largest_that_fits(lambda n: n <= capacity, unit=unit, limit=192) == expected


def test_flops_include_all_accumulated_steps():
    flops = {}
    for parts in (1, 2):
        config = tiny_config.get_config(stages=("D",)).unlock()
        config.accumulate_steps = parts
        trainer = Trainer(config)
        step, arguments, _ = step_report.step_function(trainer, "train")
        flops[parts] = count_product_flops(step.trace(*arguments).jaxpr.jaxpr)
    assert math.isclose(flops[1], flops[2], rel_tol=0.05)


def test_unknown_topologies_and_missing_compilers_are_reported(monkeypatch, tmp_path):
    for name in ("v5e", "v5e:2", "v5e:2x2x1", "v5p:2x2", "v4:2x2x1", "h100:2", "cpu:8", "v5e:0x2", ""):
        with pytest.raises(UserError, match=f"Unknown topology '{name}'; choose v5e:2x2"):
            topologies.find_devices(name)
    with pytest.raises(UserError, match=r"--slices=2 needs a TPU topology such as v5e:2x2, got cpu\."):
        topologies.find_devices("cpu", slices=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install libtpu\.$"):
        topologies.find_devices("v5e:2x2")
    with pytest.raises(UserError, match=r'not installed: pip install "jax\[cuda12\]"\.$'):
        topologies.find_devices("h100")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"--target_config .*none\.txtpb cannot be read: No such file"):
        topologies.find_devices("h100", target_config=tmp_path / "none.txtpb")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/quickstart.py", "--find-batch"], "--topology=NAME"),
        (["--config=configs/dat_pp_t.py", "--topology=cpu", "--config.batch_size=60"], "60 is not a multiple of 8"),
        (["--config=configs/dat_pp_t.py", "--topology=h100", "--slices=2"], "--slices=2 needs a TPU topology"),
        (
            ["--config=configs/quickstart_segmentation.py", "--topology=v5e:2x2", "--slices=2", "--evaluation"],
            "--evaluation and --slices cannot be combined",
        ),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run_program(*arguments)
    assert result.returncode == 1
    lines = [
        line for line in result.stderr.splitlines() if not line.startswith("WARNING:absl:Grain")
    ]  # logged with older JAX
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def run_program(*arguments):
    command = [sys.executable, "-m", "dat_jax.compile_report", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_report_for_a_tpu():
    """Report for four chips with sharded parameters, and for a batch that does not fit."""
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
    # The bytes of the compiled program are close to the compiler's estimate.
    assert 0.5 < train["cost"]["padded_bytes"] / train["cost"]["bytes_accessed"] < 2
    assert train["roofline"]["binds"] == "memory"
    config.batch_size = 4 * 2**13
    config.data.image_size = config.data.eval_resize = 64
    sources = (step_report.StandIn(2**30, ("left", "right")),) * 2
    report = step_report.compile_report(config, **options, sources=sources)["steps"]["train"]
    assert not report["fits"]
    assert "15.75G" in report["message"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_kernels_in_a_step_on_several_chips():
    """Each chip runs the kernels on its part of the batch, without gathering it."""
    config = tiny_config.get_config(dtype="auto", implementation="pallas", dim_stem=32, dims=(32,))
    report = step_report.compile_report(config, topology="v5e:2x2", steps=("train",), top=30)
    train = report["steps"]["train"]
    kernels = [row for row in train["top"]["op"] if row["name"] == "custom-call tpu_custom_call"]
    # Forward and backward of two attentions, a sampling and two MLPs.
    assert [row["ops"] for row in kernels] == [10]
    assert set(train["collectives"]) == {"all-reduce"}
