"""The documents hold: commands and snippets run or at least parse, links lead somewhere, tables say what the code says."""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

import dat_jax
from dat_jax.__main__ import TOOLS
from dat_jax.config import make_schema
from dat_jax.conversion import official
from dat_jax.models.registry import VARIANTS
from tests import documents
from tests.document_stand_ins import (
    SMALL_VARIANTS,
    StandIns,
    create_small_segmentor,
    kept_programs,
    parse_config,
    parse_flags,
)
from tests.documents import DOCUMENTS, ROOT

WALKTHROUGH = "docs/add_stage_type.md"
# What is done with the first of these that a command matches. "run": with small stand-ins (document_stand_ins.py). "parse": its
# flags are read and its configuration is checked, or its target or extras are looked for. "page": by the test of its page.
RULES = (
    (r"make \w+", "parse", "installs packages, then takes minutes"),
    (r"pip install |python3? -m (pip|venv) ", "parse", "installs packages"),
    (r"python -m dat_jax\.compile_report ", "parse", "minutes of compilers; tests/test_compile_report.py runs it"),
    (
        r"python -m dat_jax\.main .*--config=configs/(upernet|mask_rcnn)",
        "parse",
        "the quickstarts, run, differ in values",
    ),
    (r"python -m dat_jax\.main ", "run", ""),
    (r"python -m dat_jax\.(predict|visualize|export|conversion|data\.prepare) ", "run", ""),
    (r"python -m dat_jax( |$)", "run", ""),
    (r"python -m experiments\.attention_pictures\.draw", "run", ""),
    (r"python -m pytest tests/ops/test_pooling.py|python -c .*NM", "page", "of a package with the page's changes"),
    (r"python -c .*digit\.png", "run", ""),
    (r"python -m pytest ", "parse", "these tests run anyway"),
)
# Languages of fenced blocks that are neither commands nor executed.
NOT_EXECUTED = {"text": "formulas, and the layout", "diff": "applied by the test of its page"}


def find_rule(command):
    return next((kind for pattern, kind, _ in RULES if re.match(pattern, command)), None)


COMMANDS = {command: find_rule(command) for command in documents.commands()}
PYTHON = sorted({block.document for block in documents.all_blocks() if block.language == "python"} - {WALKTHROUGH})


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Commands are run in its folder."""
    made = StandIns(tmp_path_factory.mktemp("documents"))
    with contextlib.chdir(made.root), kept_programs(tmp_path_factory.mktemp("programs")):
        yield made


def test_every_block_has_a_rule():
    known = {"", "python", *NOT_EXECUTED}
    assert {block.language for block in documents.all_blocks()} <= known
    assert [command for command, rule in COMMANDS.items() if rule is None] == []
    for pattern, _, _ in RULES:
        assert any(re.match(pattern, command) for command in COMMANDS), pattern
    assert find_rule("rm -rf runs") is None
    assert documents.read_blocks("```\nls\n```\n")[0].language == ""


@pytest.mark.parametrize("command", [command for command, rule in COMMANDS.items() if rule == "parse"])
def test_commands_are_understood(command, tmp_path):
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert re.fullmatch(r"\.\[(\w+)\]", words[-1])[1] in extras
    elif words[2] in ("venv", "pip"):
        assert words[-1] == ".venv" or (ROOT / words[-1]).is_file()
    elif words[2] == "pytest":
        assert all((ROOT / path).exists() for path in words[3:])
    else:
        tool = words[2].removeprefix("dat_jax.")
        with contextlib.chdir(ROOT):
            parse_config(tool, words[3:])


def test_commands_that_are_wrong_are_noticed():
    with contextlib.chdir(ROOT), pytest.raises(AttributeError, match="batch_size"):
        parse_config("main", ["--config=configs/dat_pp_t.py", "--config.batchsize=3"])


@pytest.mark.parametrize("command", [command for command, rule in COMMANDS.items() if rule == "run"])
def test_commands_run(command, stand_ins, capsys):
    words = shlex.split(command)
    if words[1] == "-c":
        exec(words[2], {})
        assert (stand_ins.root / "digit.png").exists()
        return
    module, arguments = words[2], words[3:]
    if module == "dat_jax":
        result = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert result.returncode == 0
        assert ("dat_pp_nano" if "--list_models" in command else "python -m dat_jax") in result.stdout
        return
    arguments = [stand_ins.place(argument) for argument in arguments if module != "dat_jax.conversion"] or arguments
    if module == "dat_jax.main":
        result = stand_ins.train(arguments)
        assert result or "--print_config" in arguments
    elif module == "dat_jax.data.prepare":
        values, _ = parse_flags("data.prepare", arguments)
        stand_ins.clear(os.path.relpath(values.output, stand_ins.root))
        from dat_jax.data.prepare import prepare

        said = prepare(train=values.train, validation=values.validation, output=values.output, incomplete=True)
        assert "complete: 16 train images, 0 damaged" in said
    elif module == "dat_jax.export":
        values, positional = parse_flags("export", arguments)
        stand_ins.clear(*positional[2:])
        importlib.import_module(module).main(positional, values)
        assert ("are as they were written" if values.check else "To load it") in capsys.readouterr().out
        assert all((stand_ins.root / place / "model.stablehlo").is_file() for place in positional[2:])
    elif module == "dat_jax.conversion":
        convert(stand_ins, arguments)
    elif module.startswith("experiments."):
        importlib.import_module(module).main([*arguments, "--output=drawn"])
        assert len(list((stand_ins.root / "drawn").glob("attention_*.png"))) == 4
    else:
        tool = importlib.import_module(module)
        values, rest = parse_flags(module.removeprefix("dat_jax."), arguments)
        outputs = [values[name].value for name in ("output", "json", "csv") if name in values and values[name].value]
        stand_ins.clear(*outputs)
        tool.main(rest, values)
        assert all((stand_ins.root / path).exists() for path in outputs)
        assert outputs or capsys.readouterr().out


def convert(stand_ins, arguments):
    """python -m dat_jax.conversion: weights of dat_pp_nano for those of a larger model, and another place to write to."""
    from dat_jax.conversion import __main__ as tool

    source, _, *rest = arguments
    stand_ins.need(source)
    for flag in rest:
        stand_ins.place(flag)
    out = f"converted{'.safetensors' if arguments[1].endswith('.safetensors') else ''}"
    stand_ins.clear(out)
    rest = [re.sub(r"--model=\w+", "--model=dat_pp_nano", flag) for flag in rest]
    values, positional = parse_flags("conversion.__main__", [source, out, *rest])
    tool.main(positional, values)
    assert (stand_ins.root / out).exists()


@pytest.mark.parametrize("document", PYTHON)
def test_snippets_run(document, stand_ins, monkeypatch):
    """The published models are too large to compile here: small ones have their names."""
    for name, settings in SMALL_VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, settings)
    monkeypatch.setattr(dat_jax, "create_segmentor", create_small_segmentor)
    blocks = [block for block in documents.all_blocks() if (block.document, block.language) == (document, "python")]
    assert blocks
    space = {}
    for block in blocks:  # the check is that none raises
        for path in re.findall(r'(?:load|open)\("([\w./]+)"', block.text):
            stand_ins.need(path)
        exec(compile(block.text, document, "exec"), space)


def test_the_walkthrough_holds(tmp_path):
    """The steps of the page, in a copy of the package."""
    for name in ("dat_jax", "configs", "tests", "pyproject.toml"):
        place = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.npz", "golden")
        shutil.copytree(place, tmp_path / name, ignore=ignored) if place.is_dir() else shutil.copy(place, tmp_path)
    blocks = documents.read_blocks((ROOT / WALKTHROUGH).read_text())
    for block in blocks:
        if block.named_file:
            (tmp_path / block.named_file).write_text(block.text.split("\n", 1)[1])
        elif block.language == "diff":
            applied = subprocess.run(
                ["git", "apply", "-"], input=block.text, text=True, cwd=tmp_path, capture_output=True, check=False
            )
            assert applied.returncode == 0, applied.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    options = dict(capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    for command in documents.commands():
        if find_rule(command) == "page":
            words = shlex.split(command)[1:]
            if words[1] == "pytest":  # of all block types the new one
                one = "::test_every_block_type_takes_any_map_and_differentiates[M]"
                words = [f"{word}{one}" if word.endswith("test_dat.py") else word for word in words]
                words += ["-p", "no:cacheprovider"]
            result = subprocess.run([sys.executable, *words], **options, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
    assert "('NM', 'ND', 'D', 'D')" in result.stdout


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


def known_keys():
    """Of any task and schedule, groups too, with dots."""
    found = set()

    def add(schema, prefix):
        for key, value in schema.items():
            found.add(prefix + key)
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")

    for task in ("classification", "segmentation", "detection"):
        for kind in ("cosine", "poly", "step"):
            add(make_schema({"task": task, "schedule": {"kind": kind}}), "")
    return found


def test_the_migration_table_has_every_key():
    text = (ROOT / "docs/migration.md").read_text()
    rows = documents.table_rows(text, "## From the published YAML: `MODEL.DAT`")
    keys = [row[0].strip("`") for row in rows]
    assert sorted(keys) == sorted({*official._DEFAULTS, *official._IGNORED_KEYS})
    assert {key for key, row in zip(keys, rows, strict=True) if "ignored" in row[2]} == official._IGNORED_KEYS
    changes = dict(num_classes=7, dim_stem=48, expansion=2, drop_path_rate=0.3, img_size=96, use_conv_patches=True)
    lists = dict(window_sizes=5, heads=1, offset_range_factor=7, sr_ratios=1, ksizes=5, nat_ksizes=5, groups=1)
    lists |= dict(layer_scale_values=0.5, use_lpus=True, use_dwc_mlps=True, no_offs=True, strides=3)
    plain = official.model_from_official({})
    for key, attribute, _ in rows:
        name, attribute = key.strip("`"), attribute.strip("`")
        assert attribute == "-" or hasattr(plain, attribute)
        value = changes.get(name, [lists[name]] * 4 if name in lists else None)
        if value is not None:  # what the table says is what changes
            changed = official.model_from_official({name: value})
            differing = {
                field for field in type(plain).__dataclass_fields__ if getattr(changed, field) != getattr(plain, field)
            }
            assert differing == {attribute}, name
    for name, kind in (("dwc_pes", "dwc"), ("fixed_pes", "fixed"), ("log_cpb", "log_cpb")):
        model = official.model_from_official({"use_pes": [True] * 4, name: [True] * 4})
        assert model.position_bias == (kind,) * 4


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
        assert words[2] == "dat_jax" or tool in TOOLS
        if words[3:]:
            with contextlib.chdir(ROOT):
                parse_config(tool, words[3:])
    assert "2026-11" in text


def test_the_citation_is_whole():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"title", "authors", "message", "license", "version"} <= set(cited)
    assert cited["version"] == runpy.run_path(str(ROOT / "dat_jax/__init__.py"))["__version__"]
    for reference in cited["references"]:
        assert [author["family-names"] for author in reference["authors"]] == ["Xia", "Pan", "Song", "Li", "Huang"]


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


def test_the_script_draws_every_picture(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        importlib.import_module("experiments.attention_pictures.draw").main([f"--output={tmp_path}"])
    assert said.getvalue() == ""
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in pathlib.Path(ROOT / "docs").glob("attention_*.png"))
