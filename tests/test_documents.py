"""The documents hold: links lead somewhere, tables say what the code says, the site builds. Commands: test_commands.py."""

import contextlib
import fnmatch
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import yaml

import dat_jax
from dat_jax.__main__ import TOOLS
from dat_jax.config import TASKS, get_keys, load_config
from dat_jax.conversion import backbone_settings, official
from dat_jax.conversion.detector_settings import trace_detector
from dat_jax.conversion.segmentors import trace_segmentor
from dat_jax.training.schedule import plan_run
from tests.helpers import documents, published_configs
from tests.helpers.document_stand_ins import parse_config, parse_flags
from tests.helpers.documents import DOCUMENTS, ROOT


def test_links_lead_somewhere():
    wrong = []
    for path in DOCUMENTS:
        for link in documents.links(path.read_text()):
            place, _, anchor = link.partition("#")
            if place.startswith("http"):
                if not re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./-]*)?", place):
                    wrong.append(f"{path.name}: {link}")
                continue
            target = (path.parent / place).resolve() if place else path
            if not target.exists() or (anchor and anchor not in documents.anchors(target.read_text())):
                wrong.append(f"{path.name}: {link}")
    assert wrong == []


def test_every_page_is_linked_from_the_readme():
    linked = {
        (ROOT / link).resolve() for link in documents.links((ROOT / "README.md").read_text()) if "://" not in link
    }
    assert {path for path in DOCUMENTS if path.parent == ROOT / "docs"} - linked == {ROOT / "docs" / "index.md"}


def test_inline_code_names_what_there_is():
    """Keys of configurations, files and modules."""
    wrong = []
    for path in DOCUMENTS:
        for code in documents.inline_code(path.read_text()):
            for key in re.findall(r"(?<![\w.])config\.([a-z]\w*(?:\.\w+)*)", code):
                if key not in known_keys() and not re.match(r"model\.|get\b", key):
                    wrong.append(f"{path.name}: config.{key}")
            for name in re.findall(r"^(?:dat_jax|configs|tests|experiments|docs)/[\w/]+\.(?:py|md)$", code):
                if not (ROOT / name).exists() and "pooling" not in name:
                    wrong.append(f"{path.name}: {name}")
            match = re.match(r"python -m ([\w.]+)", code)
            if match and importlib.util.find_spec(match[1]) is None:
                wrong.append(f"{path.name}: {code}")
    others = [
        line for line in wrong if "migration.md: config." not in line
    ]  # of big_vision's names, in the left column
    assert others == []


def test_flags_in_the_prose_are_of_some_tool():
    """Of commands in blocks test_commands.py parses all. Two pages name the flags of other projects beside ours."""
    known = {"help", "version", "list_models", "profile"}  # of all tools, of the list of tools, of a benchmark
    for module in (tool.module for tool in TOOLS.values() if tool.module):
        arguments = ["--config=tiny"] if module == "main" else []
        known |= set(parse_flags("conversion.__main__" if module == "conversion" else module, arguments)[0])
    wrong = set()
    for path in DOCUMENTS:
        if path.stem not in ("migration", "features"):
            for code in documents.inline_code(path.read_text()):
                wrong |= {flag for flag in re.findall(r"(?:^|\s)--(?!config\.)([\w-]+)", code) if flag not in known}
    assert wrong == set()


def known_keys():
    """Of any task and schedule, groups too, with dots."""
    found = set()

    def add(keys, prefix):
        for key, value in keys.items():
            found.add(prefix + key)
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")

    for task in TASKS:
        for kind in ("cosine", "poly", "step"):
            add(get_keys(task, kind), "")
    return found


def test_the_migration_table_has_every_key():
    text = (ROOT / "docs/migration.md").read_text()
    rows = documents.table_rows(text, "## From the published YAML: `MODEL.DAT`")
    keys = [row[0].strip("`") for row in rows]
    known = {*official._DEFAULTS, *backbone_settings.CHECKED, *backbone_settings.IGNORED}
    assert sorted(keys) == sorted(known)
    ignored = {key for key, row in zip(keys, rows, strict=True) if "ignored" in row[2]}
    assert ignored == set(backbone_settings.IGNORED)
    changes = dict(num_classes=7, dim_stem=48, expansion=2, drop_path_rate=0.3, img_size=96, use_conv_patches=True)
    lists = dict(window_sizes=5, heads=1, offset_range_factor=7, sr_ratios=1, ksizes=5, nat_ksizes=5, groups=1)
    lists |= dict(layer_scale_values=0.5, use_lpus=True, use_dwc_mlps=True, no_offs=True, strides=3)
    base = dict(log_cpb=[False] * 4, groups=[1, 1, 3, 6], strides=[1] * 4)  # of the code published with DAT++
    plain = official.model_from_official(base)
    for key, attribute, _ in rows:
        name, attribute = key.strip("`"), attribute.strip("`")
        assert attribute == "-" or hasattr(plain, attribute)
        value = changes.get(name, [lists[name]] * 4 if name in lists else None)
        if value is not None:  # what the table says is what changes
            changed = official.model_from_official({**base, name: value})
            differing = {
                field for field in type(plain).__dataclass_fields__ if getattr(changed, field) != getattr(plain, field)
            }
            assert differing == {attribute}, name
    for name, kind in (("dwc_pes", "dwc"), ("fixed_pes", "fixed"), ("log_cpb", "log_cpb")):
        model = official.model_from_official({**base, "use_pes": [True] * 4, name: [True] * 4})
        assert model.position_bias == (kind,) * 4


def test_the_migration_table_of_dense_models_has_every_key():
    rows = documents.table_rows(
        (ROOT / "docs/migration.md").read_text(), "## From the published configurations of segmentors and detectors"
    )
    rows = [(re.findall(r"`([^`]+)`", row[0]), row[1]) for row in rows if row[1] != "use"]
    matched = set()
    backbone = {*official._DEFAULTS, *backbone_settings.CHECKED, *backbone_settings.IGNORED}
    for name in published_configs.FILES:
        trace = trace_segmentor if name.startswith(("semfpn", "upernet")) else trace_detector
        *_, uses = trace(published_configs.make_config(name))
        for key, use in uses.items():
            key = re.sub(r"\.\d+\.", ".", key)
            if key.removeprefix("backbone.") in backbone and key.startswith("backbone."):
                continue
            found = [row for row in rows if any(fnmatch.fnmatchcase(key, pattern) for pattern in row[0])]
            exact = [row for row in found if key in row[0]]
            assert len(exact or found) == 1, (key, found)
            row = (exact or found)[0]
            assert use.split(":")[0] in row[1].split(), (key, use)
            matched |= {pattern for pattern in row[0] if fnmatch.fnmatchcase(key, pattern)}
    assert {pattern for patterns, _ in rows for pattern in patterns} == matched


def test_the_migration_table_of_training_names_our_keys():
    text = (ROOT / "docs/migration.md").read_text()
    rows = documents.table_rows(text, "## From the published YAML: the rest")
    ours = [row[1].strip("`").removeprefix("config.") for row in rows]
    unknown = {key for key in ours if key not in known_keys() and not key.startswith(("model.", "--workdir", "--mode"))}
    assert unknown == set()
    for code in documents.inline_code(text):
        for key in re.findall(r"--config\.([\w.]+)=", code):
            assert key in known_keys() or key.startswith("model.")


def test_features_are_true_by_what_they_name():
    text = (ROOT / "docs/features.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(rows) > 15
    for row in rows:
        assert len(row) == 7
        evidence = row[2].strip("`")
        if not evidence.startswith("python "):
            assert (ROOT / evidence).is_file(), evidence
            continue
        words = shlex.split(evidence)
        tool = words[2].removeprefix("dat_jax.")
        assert words[2] == "dat_jax" or tool in {tool.module for tool in TOOLS.values()}
        if words[3:]:
            with contextlib.chdir(ROOT):
                parse_config(tool, words[3:])
    assert "2026-11" in text


def test_the_api_reference_has_every_public_name():
    pages = (ROOT / "docs/api.md", *(ROOT / "docs/api").glob("*.md"))
    text = "".join(path.read_text() for path in pages)
    documented = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    public = {f"dat_jax.{name}" for name in dat_jax.__all__} | {
        f"dat_jax.conversion.{name}" for name in dat_jax.conversion.__all__
    }
    assert public - documented == {"dat_jax.VARIANTS", "dat_jax.conversion", "dat_jax.inference", "dat_jax.load"}


def test_the_citation_is_whole():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"title", "authors", "message", "license", "version"} <= set(cited)
    assert cited["version"] == runpy.run_path(str(ROOT / "dat_jax/__init__.py"))["__version__"]
    for reference in cited["references"]:
        assert [author["family-names"] for author in reference["authors"]] == ["Xia", "Pan", "Song", "Li", "Huang"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed; it is in requirements-dev.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    for path in DOCUMENTS:
        if path.parent == ROOT / "docs":
            assert (tmp_path / ("index.html" if path.stem == "index" else f"{path.stem}/index.html")).is_file()
    page = (tmp_path / "benchmarks" / "index.html").read_text()
    assert (tmp_path / "experiments" / "ops" / "results.png").is_file()
    assert 'href="../experiments/ops/results/"' in page
    outside = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="https?://')
    assert [found for found in outside.findall(page) if "canonical" not in found] == []


def test_commands_are_read_as_modules():
    split = documents.split_command
    assert split(".venv/bin/python -m dat_jax.main --quiet  # a comment") == ["python", "-m", "dat_jax.main", "--quiet"]
    assert split("dat-jax train --config=tiny") == ["python", "-m", "dat_jax.main", "--config=tiny"]
    assert split("dat-jax models 'dat_pp*'") == ["python", "-m", "dat_jax", "models", "dat_pp*"]
    assert split("dat-jax") == ["python", "-m", "dat_jax"]
    assert split("# nothing") == []


def test_the_table_of_batch_sizes_is_that_of_the_configuration():
    rows = {
        row[0]: row[1:] for row in documents.table_rows((ROOT / "docs/many_hosts.md").read_text(), "### Batch size")
    }
    config = load_config("dat_pp_s").unlock()
    for column, batch_size in enumerate((1024, 4096)):
        config.batch_size = batch_size
        plan = plan_run(config, examples=1_281_167, parts=1)
        warmup = round(config.schedule.warmup_epochs * plan.steps_per_epoch)
        peak = max(float(plan.schedule(step)) for step in (warmup, warmup + 1))
        cells = {name: cells[column] for name, cells in rows.items()}
        assert float(cells["peak learning rate"]) == pytest.approx(peak, rel=0.02)  # the cosine is counted from step 0
        assert cells["steps per epoch"] == f"{plan.steps_per_epoch:,}"
        assert cells["steps of the run"] == f"{plan.total_steps:,}"
        assert cells["warm-up, 20 epochs"] == f"{warmup:,} steps"
        for chips in (64, 256):
            assert cells[f"images per chip on {chips} chips"] == f"{batch_size // chips}"
