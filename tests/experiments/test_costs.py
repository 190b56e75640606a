"""The estimated costs: formulas, and the tables of the page."""

import re

import pytest

from dat_jax.profiling.topologies import CHIPS
from experiments.costs import estimate as costs
from tests.helpers.documents import ROOT

RESULTS = (ROOT / "experiments" / "costs" / "results.md").read_text()
ONE_HOUR = {"steps": 1, "images": 3600, "flops": CHIPS["v6e"].flops_per_second / 2, "eval_share": None}


def test_chip_hours_are_inverse_to_the_utilization():
    assert costs.chip_hours(ONE_HOUR, "v6e", 0.5) == pytest.approx(1)
    assert costs.chip_hours(ONE_HOUR, "v6e", 0.25) == pytest.approx(2)


def test_memory_traffic_limits_the_speed():
    speed, utilization = costs.memory_limit(ONE_HOUR, "v6e", CHIPS["v6e"].bytes_per_second / 1e9)
    assert (speed, utilization) == (pytest.approx(1), pytest.approx(0.5))
    assert costs.format_limit("m", "h100", 10.0, "s", ONE_HOUR)["chip"] == "H100"


def test_hours_have_two_digits():
    assert [costs.format_hours(hours) for hours in (1234.5, 9.96, 9.94, 0.123)] == ["1,234", "10", "9.9", "0.12"]


def test_the_tables_of_the_page_are_those_of_the_script():
    page = (ROOT / "docs" / "costs.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert set(rows) <= set(RESULTS.splitlines())
    assert {re.match(r"\| `(\w+)`", row)[1] for row in rows if re.match(r"\| `\w+`", row)} >= {
        path.stem for path in ROOT.glob("configs/dat_*.py")
    }


def test_the_memory_traffic_is_that_of_the_documents():
    benchmarks, hosts = ((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "many_hosts.md"))
    bandwidth = CHIPS["v5e"].bytes_per_second / 1e9
    (hbm, everything), others = (row[2] for row in costs.TRAFFIC[:2]), costs.TRAFFIC[2:]
    assert f"between {hbm / bandwidth * 16e3:.1f} ms" in hosts
    assert f"and {everything / bandwidth * 16e3:.0f} ms" in hosts
    for _, _, gigabytes, _ in others:
        assert re.search(rf"\| {gigabytes:.2f} \||\| {gigabytes:.0f}[, |]", benchmarks), gigabytes


def test_unknown_configurations_are_refused(capsys):
    with pytest.raises(SystemExit):
        costs.parse(["--configs=dat_pp_t,dat_pp_x"])
    assert "got dat_pp_x" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_pp_t", "dat_pp_b_384", "upernet:dat_pp_t", "mask_rcnn:dat_pp_t_1x"])
def test_the_results_are_up_to_date(name):
    row = costs.format_row(name, costs.estimate(name))
    assert f"| {' | '.join(row.values())} |" in RESULTS
