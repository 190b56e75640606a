"""The recipes of docs/launch, with stand-ins for the schedulers' programs, which are not here: what each host would run."""

import contextlib
import os
import shlex
import subprocess

import yaml

from tests.helpers.document_stand_ins import parse_config
from tests.helpers.documents import ROOT

LAUNCH = ROOT / "docs" / "launch"


def run_script(name, *arguments, program, tmp_path, **variables):
    """The calls that a script makes of a program, each a list of words; and its status and what it says on stderr."""
    stand_in, calls = tmp_path / program, tmp_path / "calls"
    stand_in.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> {calls}\nprintf "\\n" >> {calls}\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    command = ["bash", str(LAUNCH / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line.rstrip("\0").split("\0") for line in lines], result.returncode, result.stderr


def check_main(words, *, config, workdir):
    """Words of a command that starts the training."""
    start = words.index("-m")
    assert words[start - 1].endswith("python")
    assert words[start + 1] == "dat_jax.main"
    with contextlib.chdir(ROOT):
        values, found = parse_config("main", words[start + 2 :])
    assert (values["config"].config_filename, values.workdir) == (config, workdir)
    return values, found


def test_all_hosts_of_a_tpu_pod_run_one_command(tmp_path):
    """Spaces and parentheses arrive as they were given."""
    config, workdir = "configs/upernet.py:dat_pp_s", "/mnt/our runs/s"
    arguments = ["pod", "us-east1-d", config, workdir, "--config.batch_size=32", "--config.eval.ratios=(0.5, 1.0)"]
    options = dict(program="gcloud", tmp_path=tmp_path, REPOSITORY="https://example.org/dat_jax")
    calls, status, said = run_script("tpu_pod.sh", *arguments, **options)
    assert (status, said) == (0, "")
    for words in calls:
        assert words[:5] == ["compute", "tpus", "tpu-vm", "ssh", "pod"]
        assert words[5:7] == ["--zone=us-east1-d", "--worker=all"]
    cloned, installed, started = (words[7].removeprefix("--command=") for words in calls)
    assert "git clone --depth=1 https://example.org/dat_jax dat_jax" in cloned
    assert installed.endswith("install --quiet '.[train,tpu,gcs]'")
    values, found = check_main(shlex.split(started), config=config, workdir=workdir)
    assert values.distributed == "on"
    assert (found.batch_size, found.eval.ratios) == (32, (0.5, 1.0))


def test_the_pod_is_not_touched_without_an_address_of_the_repository(tmp_path):
    options = dict(program="gcloud", tmp_path=tmp_path, REPOSITORY="")
    calls, status, said = run_script("tpu_pod.sh", "pod", "zone", "configs/dat_pp_s.py", "/runs", **options)
    assert (calls, status) == ([], 1)
    assert "the address of this repository" in said


def test_slurm_starts_one_process_a_node(tmp_path):
    arguments = ["configs/dat_pp_t.py", "/our runs/t", "--config.batch_size=32"]
    (words,), status, _ = run_script("slurm.sh", *arguments, program="srun", tmp_path=tmp_path)
    assert status == 0
    _, config = check_main(words, config=arguments[0], workdir=arguments[1])
    assert config.batch_size == 32
    assert "#SBATCH --ntasks-per-node=1" in (LAUNCH / "slurm.sh").read_text()


def test_gke_starts_one_process_a_host():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16 // 4  # chips of the slice, of a host
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    words = [word.replace("CONFIG", "configs/dat_pp_s.py") for word in container["command"]]
    values = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
    check_main(words, config="configs/dat_pp_s.py", workdir=values["workdir"])
    paths = (values["workdir"], values["config.data.directory"])
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert [path.startswith(mount) for path, mount in zip(paths, mounted, strict=True)] == [True, True]
