"""The number of programs of an evaluation."""

import json

import pytest

from dat_jax.profiling import command
from dat_jax.profiling.evaluation_report import report_evaluation
from tests.helpers import tiny_config, tiny_segmentation


@pytest.mark.slow
def test_programs_of_an_evaluation_are_counted_and_compiled():
    config = tiny_segmentation.get_config().unlock()
    report = report_evaluation(config, topology="cpu")
    shapes = [program["shape"] for program in report["programs"]]
    assert len(set(shapes)) == len(shapes) < report["sizes"]
    assert sum(program["images"] for program in report["programs"]) == 21 * len(config.eval.ratios)
    seconds = sum(program["lower_seconds"] + program["compile_seconds"] for program in report["programs"])
    assert report["seconds"] == pytest.approx(seconds)
    assert min(program["compile_seconds"] for program in report["programs"]) > 0
    config.eval.buckets = "exact"
    exact = report_evaluation(config, topology="cpu")
    assert len(exact["programs"]) == exact["sizes"] == report["sizes"]


def test_a_classifier_has_one_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_configure", lambda: None)
    config = tiny_config.get_config()
    command.report_evaluation(config, topology="cpu", json_file=str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    (program,) = report["programs"]
    assert program["shape"] == [config.data.image_size, config.data.image_size]
    assert (program["images"], report["sizes"]) == (50, 1)
    assert "batches of" in capsys.readouterr().out
