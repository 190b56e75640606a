"""Behavior that all commands share: --help, --version, misspelled names, Ctrl-C and output; and public names."""

import importlib
import importlib.util
import pathlib
import subprocess
import sys

import pytest
import yaml
from absl import flags

import dat_jax
from dat_jax import __main__ as tools
from dat_jax import conversion
from dat_jax.cli import flags as cli_flags
from dat_jax.cli.console import make_console, print_table
from dat_jax.storage import atomic_path

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [tool.module for tool in tools.TOOLS.values() if tool.module]


def run(code, *arguments):
    command = [sys.executable, *code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def run_reporting_jax(tool, *arguments):
    """Run ``python -m dat_jax.TOOL``, with "True" or "False" at the end of stderr if jax was imported or not."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('jax' in sys.modules, file=sys.stderr))\n"
        "tool = sys.argv.pop(1)\n"
        "runpy.run_module(tool, run_name='__main__', alter_sys=True)\n"
    )
    return run(["-c", code], f"dat_jax.{tool}", *arguments)


@pytest.mark.parametrize("tool", MODULES)
def test_help_has_examples_and_does_not_import_jax(tool):
    result = run_reporting_jax(tool, "--help")
    assert (result.returncode, result.stderr) == (0, "False\n")
    assert result.stdout.count(f"python -m dat_jax.{tool} ") >= 3  # examples
    assert "--helpfull" in result.stdout
    assert "--logtostderr" not in result.stdout  # a flag of absl
    assert max(map(len, result.stdout.splitlines())) <= 130


@pytest.mark.parametrize(
    "tool",
    [
        "main",
        "check",
        "predict",
        "visualize",
        "export",
        "conversion.__main__",
        "data.prepare",
        "data.split",
        "compile_report",
        "tune",
    ],
)
def test_help_lists_every_flag(tool):
    module, values = importlib.import_module(f"dat_jax.{tool}"), flags.FlagValues()
    if hasattr(module, "define_flags"):
        module.define_flags(values)
        names = set(values) - {"find-batch", "q"}
    else:
        names = {flag.name for flag in flags.FLAGS.flags_by_module_dict()["dat_jax.main"]}
    assert names == {form.partition("=")[0] for forms in module._FLAGS.values() for form in forms}


def test_the_package_lists_its_tools_and_their_examples():
    result = run(["-m", "dat_jax"])
    assert result.returncode == 0
    for name, tool in tools.TOOLS.items():
        assert tool.purpose in result.stdout
        assert f"    dat-jax {name} {tool.example}\n" in result.stdout
    for arguments in (["-m", "dat_jax"], ["-m", "dat_jax.predict"], ["-m", "dat_jax", "main"]):
        assert run(arguments, "--version").stdout == f"dat_jax {dat_jax.__version__}\n"


def test_a_tool_may_be_named_and_an_unknown_one_is_told_the_nearest():
    assert run(["-m", "dat_jax", "predict"], "--help").stdout == run(["-m", "dat_jax.predict"], "--help").stdout
    result = run(["-m", "dat_jax"], "visualise", "x")
    assert result.returncode == 1
    assert result.stderr == "error: There is no tool 'visualise'; did you mean visualize? `dat-jax` lists all tools.\n"


@pytest.mark.parametrize("form", ["--print_config", "--config.print"])
def test_the_resolved_configuration_is_printed_without_jax(form):
    arguments = ["--config=configs/quickstart.py", "--config.batch_size=7", "--config.logs=('wandb',)", form]
    result = run_reporting_jax("main", *arguments)
    assert (result.returncode, result.stderr) == (0, "False\n")
    config = yaml.safe_load(result.stdout)
    assert (config["batch_size"], config["logs"], config["model"]["name"]) == (7, ["wandb"], "dat_pp_nano")
    wrong = run(["-m", "dat_jax.main"], "--config=configs/quickstart.py", "--config.logs=('csv',)", form)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith(
        "error: config.logs must be a tuple with some of tensorboard, wandb, such as ('tensorboard',), got"
    )


def test_ctrl_c_prints_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli_flags.run_interruptible(interrupted, "Interrupted: all is complete.")
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "Interrupted: all is complete.\n")


def test_ctrl_c_leaves_no_incomplete_file(tmp_path):
    def write():
        with atomic_path(tmp_path / "a.png", overwrite=True) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", [dat_jax, conversion])
def test_public_names_exist(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_the_package_does_not_import_jax():
    code = "import sys, dat_jax; assert 'jax' not in sys.modules; dat_jax.list_models(); dat_jax.conversion.to_official"
    assert run(["-c", code]).returncode == 0


def test_piped_output_is_neither_wrapped_nor_styled(capsys):
    console, long = make_console(), "word " * 60 + "[red]/" + "x" * 300
    console.print(long)
    print_table(console, "Title", {"a": long, "long name": "1"})
    assert capsys.readouterr().out.splitlines() == [long, "Title", f"  a          {long}", "  long name  1"]
    make_console(quiet=True).print(long)
    assert capsys.readouterr().out == ""
