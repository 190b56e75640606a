"""Every benchmark reads its arguments; the cheap ones run with tiny settings."""

import pytest

from experiments.compile_time import benchmark as compile_time
from experiments.model import benchmark as model
from experiments.ops import benchmark as ops
from experiments.scaling import benchmark as scaling

pytestmark = pytest.mark.slow


def test_the_ops_benchmark_writes_its_table(tmp_path):
    arguments = "--ops=position_bias,neighborhood_attention,gelu --stages=3 --batch=1 --repeats=1 --min-seconds=0"
    ops.main([*arguments.split(), f"--output={tmp_path}"])
    text = (tmp_path / "results.md").read_text()
    assert "| 7 x 7 x 512 | auto |" in text
    assert "| 7 x 7 x 512 | model's own |" in text
    assert "## neighborhood_attention" not in text  # the map is one window
    assert (tmp_path / "results.png").exists()


def test_every_implementation_is_measured():
    assert ops.uncovered_ops() == set()
    names = ops.implementations(ops.CASES["position_bias"])
    assert names[:2] == ["plain", "auto"]
    assert "pallas" not in names


@pytest.mark.parametrize("kind", ["N", "D"])
def test_attention_modules_on_growing_maps(kind):
    found = scaling.measure_modules(variant="dat_pp_nano", stage=0, sides=[32, 64], repeats=1, min_seconds=0.0)
    rows = {(row[0], row[1]): row for row in found["rows"]}
    assert set(rows) == {("N", 8), ("N", 16), ("D", 8), ("D", 16)}
    keys = [rows[kind, side][2] for side in (8, 16)]
    assert keys == ([49, 49] if kind == "N" else [16, 64])


def test_the_backbone_is_compiled_for_a_topology():
    options = dict(variant="dat_pp_nano", batch=1, height=64, width=32, topology="cpu", whole_map=False, model={})
    found = scaling.compile_features(**options)
    assert found["peak_bytes"] > found["temporary_bytes"] > 0


def test_the_slope_of_a_square_is_two():
    assert scaling.slope((2.0, 12.0), (6.0, 108.0)) == pytest.approx(2)


def test_arguments_are_read():
    options = model.parse(["--models=dat_pp_tiny:1,8;dat_pp_nano:2", "--remat=blocks", "--steps=train"])
    assert options.models == {"dat_pp_tiny": [1, 8], "dat_pp_nano": [2]}
    assert options.model == {"remat": "blocks", "scan_blocks": False}
    assert model.parse([]).models == {"dat_pp_tiny": [1, 8, 16], "dat_pp_small": [1, 8]}
    assert model.parse(["--profile"]).models == {"dat_pp_tiny": [8]}
    assert scaling.parse(["--parts=large", "--large=64,96"]).large == [64, 96]
    assert compile_time.parse(["--configs=quickstart", "--topologies=cpu"]).topologies == ["cpu"]


@pytest.mark.parametrize(
    ("program", "argument"), [(ops, "--ops=gulu"), (model, "--steps=tran"), (scaling, "--parts=image")]
)
def test_mistakes_are_refused_with_the_choices(program, argument, capsys):
    with pytest.raises(SystemExit):
        program.main([argument])
    message = capsys.readouterr().err
    assert "expected some of" in message
    assert f"got {argument.partition('=')[2]}" in message


def test_failed_rows_say_why():
    failed = {"failed": "ended by SIGKILL"}
    assert model.format_row("m", 1, "train", failed)["s"] == "ended by SIGKILL"
    assert scaling.format_step({"batch": "1"}, failed)["s"] == "ended by SIGKILL"
    assert "ended by SIGKILL" in compile_time.format_row("c", "cpu", True, failed).values()
