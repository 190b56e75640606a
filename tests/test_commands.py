"""Every command of the documents, and every snippet of Python, is executed.

With small stand-ins for data, weights and long runs (document_stand_ins.py), in a copy of the project, or, what installs packages
and trains, as it stands, by test_new_user.py.
"""

import contextlib
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys

import jax
import pytest

import dat_jax
from dat_jax.models.registry import VARIANTS
from experiments.soak.bucket_server import make_bucket
from tests.helpers import documents
from tests.helpers.document_stand_ins import (
    SMALL_VARIANTS,
    StandIns,
    create_small_segmentor,
    kept_programs,
    parse_config,
    parse_flags,
)
from tests.helpers.documents import ROOT, WALKTHROUGHS
from tests.helpers.hub_server import run_hub_server, use_hub
from tests.helpers.launch_stand_ins import LAUNCH_PROGRAMS
from tests.helpers.xla_flags import fast_compilation_flags
from tests.test_new_user import INSTALLS

pytestmark = pytest.mark.slow

# How the first of these that a command matches is executed; each is the name of a test below, but for "new user", "launch", which
# test_launch.py executes, and "program of others", which is not executed.
RULES = (
    (r"make (test|test-all|lint|docs)$", "ci"),
    (INSTALLS, "new user"),
    (
        r"pre-commit |python -m (notebooks|tests\.models\.test_registry|pytest tests/ops/layers/test_depthwise\.py)\b",
        "copy",
    ),
    (r"python -m pytest tests/ops/layers/test_pooling\.py|python -c .*NM|python -m .*configs/regression", "page"),
    (
        r"python -m dat_jax\.(main|conversion|data\.(prepare|split)|check|tune|compile_report|predict|visualize|export)"
        r"( --steps=\w+)?$",
        "help",
    ),
    (r"python -m dat_jax\.compile_report (?!.*--topology)", "help"),
    (r"python -m (dat_jax( |$)|dat_jax\.predict --help)", "program"),
    (r"python -m dat_jax\.", "small"),
    (r"python -m experiments\.", "experiment"),
    (r"python -c .*digit\.png", "small"),
    (LAUNCH_PROGRAMS, "launch"),
    (r"gcsfuse --implicit-dirs my-bucket /mnt/my-bucket$", "program of others"),
)
# Languages of fenced blocks that are neither commands nor executed.
NOT_EXECUTED = {"text": "formulas, and the layout", "diff": "applied by the test of its page", "bibtex": "citations"}
# Package that an experiment needs and the tests do not.
NEEDED = {"pytorch": "torch", "gpu_kernels": "jax_cuda12_plugin", "tuning.large_maps": "libtpu"}
# Arguments with which an experiment takes seconds.
_FAST = "--repeats=1 --min-seconds=0"
SMALL_EXPERIMENTS = {
    "ops": f"--ops=gelu --stages=3 --batch=1 {_FAST}",
    "model": f"--models=dat_pp_nano:1 --steps=eval --image-side=32 {_FAST}",
    "scaling": f"--parts=modules --model=dat_pp_nano --module-sides=32,64 {_FAST}",
    "compile_time": "--configs=tiny --topologies=cpu",
    "soak": "--parts=signal",
    "image_sizes": "--parts=plan",
    "costs": "--configs=dat_pp_t",
    "transfer": "--images=5 --seeds=0 --ways=head --steps=2 --pretraining-steps=2",
    "recipe": "--seeds=0 --runs=plain --steps=2",
    "tuning.benchmark": "--parts=differences --model=quickstart",
    "tuning.large_maps": "--ops=conv_mlp --topologies=v5e",
    "gpu_kernels": "--batch=2 --dtypes=bfloat16",
    "pytorch.benchmark": f"--batches=1 --steps=eval --memory-batch=0 {_FAST}",
    "pytorch.parts": f"--batch=1 --no-compile {_FAST}",
}


def find_rule(command):
    return next((kind for pattern, kind in RULES if re.match(pattern, command)), None)


COMMANDS = {command: find_rule(command) for command in documents.commands()}
PYTHON = sorted({block.document for block in documents.all_blocks() if block.language == "python"} - {*WALKTHROUGHS})


def commands_of(kind):
    return pytest.mark.parametrize(
        "command", [command for command, rule in COMMANDS.items() if rule == kind], ids=lambda command: command[:90]
    )


def run_program(words, *, cwd, **changes):
    """``python ...`` with this environment; what it prints."""
    options = dict(capture_output=True, text=True, cwd=cwd, env={**os.environ, **changes}, timeout=300, check=False)
    result = subprocess.run([sys.executable, *words], **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, bucket_server):
    """Commands are run in its folder. The bucket that they name exists, and hf:// is a server of this machine."""
    make_bucket(bucket_server, "my-bucket")
    made = StandIns(tmp_path_factory.mktemp("documents"))
    with run_hub_server() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(hub, tmp_path_factory.mktemp("hub_cache"), patch)
        with contextlib.chdir(made.root), kept_programs(tmp_path_factory.mktemp("programs")):
            yield made


def test_every_block_has_a_rule():
    known = {"", "python", *NOT_EXECUTED}
    assert {block.language for block in documents.all_blocks()} <= known
    assert [command for command, rule in COMMANDS.items() if rule is None] == []
    for pattern, _ in RULES:
        assert any(re.match(pattern, command) for command in COMMANDS), pattern
    assert find_rule("rm -rf runs") is None
    assert documents.read_blocks("```\nls\n```\n")[0].language == ""


@commands_of("ci")
def test_commands_of_continuous_integration(command):
    """It calls them, on a clean checkout; they end with its status."""
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert re.search(rf"^ *{command}( |$)", script, re.MULTILINE)


@commands_of("help")
def test_tools_that_are_named_without_arguments(command):
    words = shlex.split(command)
    printed = run_program([*words[1:], "--help"], cwd=ROOT)
    assert "python -m dat_jax." in printed


@commands_of("program")
def test_the_list_of_tools(command):
    printed = run_program(shlex.split(command)[1:], cwd=ROOT)
    assert ("dat_pp_nano" if "models" in command else "python -m dat_jax") in printed


@commands_of("copy")
def test_commands_in_a_copy(command, tmp_path):
    """What writes into the project writes what is there."""
    documents.copy_project(tmp_path)
    words = shlex.split(command)
    if words[0] == "pre-commit":
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        run_program(["-m", "pre_commit", *words[1:]], cwd=tmp_path)
        assert (tmp_path / ".git" / "hooks" / "pre-commit").is_file()
        return
    if words[2] == "pytest":
        words += ["-p", "no:cacheprovider"]
    assert run_program(words[1:], cwd=tmp_path, PYTHONPATH=str(tmp_path)) or words[2].startswith("tests.")
    for path in (*ROOT.glob("notebooks/*.ipynb"), ROOT / "tests" / "models" / "parameters.json"):
        assert (tmp_path / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_commands_that_are_wrong_are_noticed():
    with contextlib.chdir(ROOT), pytest.raises(AttributeError, match="batch_size"):
        parse_config("main", ["--config=configs/dat_pp_t.py", "--config.batchsize=3"])


@commands_of("experiment")
def test_experiments_run(command, tmp_path, monkeypatch, capsys):
    """With few or small cases; what they write is where they are told."""
    _, folder, name = shlex.split(command)[2].split(".")
    module = importlib.import_module(f"experiments.{folder}.{name}")
    if folder == "multiply_adds":
        for variant, side in list(module.PUBLISHED):
            if variant not in ("dat_pp_tiny", "dat_pp_nano"):
                monkeypatch.delitem(module.PUBLISHED, (variant, side))
        module.main()
        assert "23,962,876" in capsys.readouterr().out
    elif folder == "input_pipeline":
        monkeypatch.setattr(module, "ROUNDS", 1)
        monkeypatch.setattr(module, "FED_BATCHES", 1)
        module.main()
        assert "| decode, crop, flip, RandAugment |" in capsys.readouterr().out
    else:
        for needed in {folder, f"{folder}.{name}"} & NEEDED.keys():
            pytest.importorskip(NEEDED[needed])
        if name == "large_maps":
            monkeypatch.setattr(module, "MAPS", ((16, 16, 16, 2, 1, 4, 16),))
        if folder == "transfer":  # its batches cannot be split over the devices of the tests
            devices = jax.devices()[:1]
            monkeypatch.setattr(jax, "devices", lambda *_: devices)
        if folder == "soak":
            monkeypatch.setattr(module, "CONFIG", "configs/tiny.py")
            monkeypatch.setattr(module, "ONE_EPOCH", {"steps": 200, "log_every": 1, "checkpoint.every": 10})
            quickly = functools.partial(module.processes.start, xla_flags=" ".join(fast_compilation_flags()))
            monkeypatch.setattr(module.processes, "start", quickly)
        small = SMALL_EXPERIMENTS.get(folder, SMALL_EXPERIMENTS.get(f"{folder}.{name}", ""))
        module.main([*shlex.split(command)[3:], *small.split(), f"--output={tmp_path}"])
        written = sorted(path.name for path in tmp_path.iterdir())
        if folder == "attention_pictures":
            assert written == sorted(path.name for path in (ROOT / "docs").glob("attention_*.png"))
        else:
            assert any(name in written for name in ("results.md", "profile.md", "parts.md", "large_maps.md"))


@commands_of("small")
def test_commands_run(command, stand_ins, capsys):
    words = shlex.split(command)
    if words[1] == "-c":
        exec(words[2], {})
        assert (stand_ins.root / "digit.png").exists()
        return
    module, arguments = words[2], words[3:]
    arguments = [stand_ins.place(argument) for argument in arguments if module != "dat_jax.conversion"] or arguments
    if module == "dat_jax.main":
        result = stand_ins.train(arguments)
        assert result or "--print_config" in arguments
    elif module == "dat_jax.check":
        stand_ins.check(arguments)
        assert "No problem was found" in capsys.readouterr().out
    elif module == "dat_jax.tune":
        stand_ins.tune(arguments)
        assert "another implementation than the default is the best" in capsys.readouterr().out
    elif module == "dat_jax.compile_report":
        stand_ins.report(arguments)
        assert ("eval.buckets" if "--evaluation" in arguments else "temporaries") in capsys.readouterr().out
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
        assert all(list((stand_ins.root / place).glob("model*.stablehlo")) for place in positional[2:])
    elif module == "dat_jax.conversion":
        convert(stand_ins, arguments)
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
        for path in re.findall(r'(?:(?:load(?:_backbone)?|open|Path)\(|directory=)"([\w./:-]+)"', block.text):
            stand_ins.need(path)
        exec(compile(block.text, document, "exec"), space)


def test_the_walkthrough_holds(tmp_path):
    """The steps of the page, in a copy of the package."""
    documents.copy_project(tmp_path)
    for block in [block for page in WALKTHROUGHS for block in documents.read_blocks((ROOT / page).read_text())]:
        if block.named_file:
            (tmp_path / block.named_file).parent.mkdir(exist_ok=True)
            (tmp_path / block.named_file).write_text(block.text.split("\n", 1)[1])
        elif block.language == "diff":
            applied = subprocess.run(
                ["git", "apply", "-"], input=block.text, text=True, cwd=tmp_path, capture_output=True, check=False
            )
            assert applied.returncode == 0, applied.stderr
    for command, rule in COMMANDS.items():
        if rule == "page":
            words = shlex.split(command)[1:]
            if words[1] == "pytest":  # of all block types the new one
                one = "::test_every_block_type_takes_any_map_and_differentiates[M]"
                words = [f"{word}{one}" if word.endswith("test_dat.py") else word for word in words]
                words += ["-p", "no:cacheprovider"]
            printed = run_program(words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
            if "NM" in command:
                assert "('NM', 'ND', 'D', 'D')" in printed
            elif "regression" in command:
                assert "negative_error" in printed
                assert (tmp_path / "runs/regression/predictions.png").is_file()
