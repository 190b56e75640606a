"""Folders that an earlier version wrote: a work directory is resumed and evaluated, weights are loaded or refused."""

import pathlib
import re
import tarfile

import jax
import numpy as np
import pytest

import dat_jax
from dat_jax.checkpoints.exports import load_export
from dat_jax.errors import UserError
from dat_jax.training import loop
from dat_jax.training.monitoring.metrics import read_metrics
from tests.helpers import tiny_config

ARCHIVE = pathlib.Path(__file__).parents[1] / "golden" / "written_by_0_1_0.tar.xz"
CHECKSUM = "222dc0eb6606916a2cbf0773f599bbe64f98540756d1d167aa20943d49fd4c6f"


def get_config(steps: int):
    """The configuration of the archived run, with another number of steps."""
    config = tiny_config.get_config(dim_stem=4, dims=(4,), num_heads=(1,), stages=("D",), key_strides=(4,)).unlock()
    config.steps = steps
    config.log_every = 1
    config.logs = ()
    config.batch_size = 16
    config.eval.batch_size = 56
    config.schedule.warmup_epochs = 0.1
    return config.lock()


@pytest.fixture
def folder(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.slow
def test_a_run_is_evaluated_and_resumed(folder, capsys):
    saved = read_metrics(folder / "run" / "metrics.jsonl")
    metrics = loop.evaluate(get_config(2), str(folder / "run"))
    assert metrics["top1"] == saved["eval/top1"][2]
    assert metrics["loss"] == pytest.approx(saved["eval/loss"][2], rel=1e-5)
    loop.train(get_config(4), str(folder / "run"))
    printed = capsys.readouterr().out
    assert "Resumed at step 2 of 4" in printed
    assert "set_aside" not in printed
    assert list(read_metrics(folder / "run" / "metrics.jsonl")["train/loss"]) == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == ["2", "4"]


def test_weights_of_a_run_and_of_its_export_are_loaded(folder):
    of_run, of_export = (dat_jax.load(folder / name) for name in ("run", "export"))
    assert of_run[0] == of_export[0]
    assert of_run[0].deformable_form == "dat_pp"
    jax.tree.map(np.testing.assert_array_equal, of_run[1], of_export[1])
    assert sum(leaf.size for leaf in jax.tree.leaves(of_run[1])) == 887
    assert load_export(folder / "export")[1]["checksum"] == CHECKSUM


def test_weights_of_a_dat_v1_are_refused_until_the_form_is_specified(folder):
    with pytest.raises(UserError, match=r"dat_jax\.load\(\.\.\., deformable_form=FORM\)") as info:
        dat_jax.load(folder / "export_v1")
    assert "\n" not in str(info.value)
    for form in re.findall(r"cvpr2022|dat_pp", str(info.value)):
        model, _ = dat_jax.load(folder / "export_v1", deformable_form=form)
        assert model.deformable_form == form
