"""The recipes of docs/launch, with stand-ins for the clouds' and schedulers' programs: what each host would run."""

import concurrent.futures
import contextlib
import os
import pathlib
import pty
import re
import shlex
import signal
import time
import tomllib

import pytest
import yaml

from tests.helpers import documents
from tests.helpers.document_stand_ins import parse_config
from tests.helpers.documents import ROOT
from tests.helpers.launch_stand_ins import LAUNCH, LAUNCH_PROGRAMS, is_alive, wait_until

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
START = ("--config=configs/upernet.py:dat_pp_s", "--workdir=gs://bucket/our runs/s")


def check_main(words):
    """Parse the words of a command that starts the training."""
    start = words.index("-m")
    assert words[start + 1] == "dat_jax.main"
    with contextlib.chdir(ROOT):
        return parse_config("main", words[start + 2 :])


def check_extras(text):
    """The extras of a requirement such as .[train,tpu] exist."""
    extras = re.fullmatch(r"\.\[([\w,]+)\]", text)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    return extras


# TPU pod


def pod(machines, action, *arguments, **variables):
    result = machines.run("tpu_pod.sh", action, "our-pod", "us-east1-d", *arguments, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_machines_are_requested_and_deleted_as_a_queued_resource(machines):
    pod(machines, "create", "v5litepod-64", "v2-alpha-tpuv5-lite", "--spot")
    pod(machines, "state")
    pod(machines, "delete")
    resource = ["compute", "tpus", "queued-resources"]
    created, described, deleted = machines.calls("gcloud")
    assert created[:6] == [*resource, "create", "our-pod", "--zone=us-east1-d"]
    assert created[6:] == [
        "--node-id=our-pod",
        "--accelerator-type=v5litepod-64",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    ]
    assert described == [*resource, "describe", "our-pod", "--zone=us-east1-d", "--format=value(state.state)"]
    assert deleted == [*resource, "delete", "our-pod", "--zone=us-east1-d", "--force", "--quiet"]


def test_all_hosts_of_a_pod_run_one_command(machines):
    """Spaces and parentheses arrive as they were given. Commands can be repeated."""
    flags = ("--config.batch_size=32", "--config.eval.ratios=(0.5, 1.0)")
    assert pod(machines, "start", *START, *flags).count("started, log in") == 2
    for host in machines.hosts:
        wait_until(lambda host=host: machines.processes(host))
        (words,) = machines.calls("python", host=host)
        values, config = check_main(words)
        assert (values["config"].config_filename, values.workdir) == (
            "configs/upernet.py:dat_pp_s",
            "gs://bucket/our runs/s",
        )
        assert values.distributed == "on"
        assert (config.batch_size, config.eval.ratios) == (32, (0.5, 1.0))
    assert pod(machines, "start", *START).count("already running") == 2
    assert pod(machines, "status").count(": running; ") == 2
    assert pod(machines, "stop").count("stopped") == 2
    assert all((host / "saved").exists() and len(machines.processes(host)) == 1 for host in machines.hosts)
    assert pod(machines, "stop").count("stopped") == 2
    assert pod(machines, "status").count(": not running; ") == 2
    (host / "saved").unlink()
    pod(machines, "start", *START)  # it resumes
    wait_until(lambda: len(machines.processes(host)) == 2)
    for words in machines.calls("gcloud"):
        assert words[:7] == ["compute", "tpus", "tpu-vm", "ssh", "our-pod", "--zone=us-east1-d", "--worker=all"]


def test_all_hosts_of_a_pod_check_the_run_together(machines):
    for host in machines.hosts:
        program = host / "dat_jax" / ".venv" / "bin" / "python"
        program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {shlex.quote(str(host))}/words; echo checked\n')
    assert pod(machines, "check", *START) == "checked\n" * 2
    for host in machines.hosts:
        words = (host / "words").read_text().splitlines()
        assert words == ["-m", "dat_jax.check", "--distributed=on", *START]
        values, _ = parse_config("check", words[2:])
        assert values.workdir == "gs://bucket/our runs/s"


def test_a_host_starts_one_run_and_none_that_it_cannot_stop(machines):
    host = machines.hosts[0]
    script, options = ["bash", "docs/launch/tpu_host.sh"], dict(cwd=host / "dat_jax", HOME=str(host))
    assert machines.run_command([*script, "strat"], **options).returncode == 2
    assert machines.run_command(script, **options).returncode == 2
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starts = [pool.submit(machines.run_command, [*script, "start", *START], **options) for _ in range(4)]
    said = "".join(start.result().stdout for start in starts)
    assert (said.count("started, log"), said.count("already running")) == (1, 3)
    wait_until(lambda: machines.processes(host))
    machines.run_command([*script, "stop"], **options)
    (host / "dat_jax.pid").unlink()
    (host / "dat_jax.pid").symlink_to("/dev/full")
    assert machines.run_command([*script, "start", *START], **options).returncode == 1
    (host / "dat_jax.pid").unlink()
    time.sleep(0.3)
    assert not any(is_alive(pid) for pid in machines.processes(host)[1:])


def test_wrong_arguments_of_the_recipes_touch_nothing(machines):
    assert machines.run("tpu_pod.sh", "start", "our-pod", "--config=a", "--workdir=b").returncode == 2
    for bucket in ("gs://our-bucket", ""):
        assert "without gs://" in machines.run("tpu_pod.sh", "setup", "our-pod", "zone", bucket).stderr
    assert machines.calls("gcloud") == []
    machines.add("srun")
    assert machines.run("slurm.sh", "--config=a", "--workdir=b", SLURM_GPUS_ON_NODE="8").returncode == 2
    assert machines.calls("srun") == []


def test_a_crashed_run_of_a_pod_is_restarted(machines):
    for host in machines.hosts:
        (host / "statuses").write_text("1\n1\n1\n1\n")
    pod(machines, "start", *START, MAX_RESTARTS="1", PAUSE_SECONDS="0")
    for host in machines.hosts:
        log = host / "dat_jax.log"
        wait_until(lambda log=log: log.exists() and "after 1 restarts" in log.read_text())
        assert len(machines.processes(host)) == 2
    assert "after 1 restarts" in pod(machines, "status")


def test_the_run_outlives_the_terminal(machines):
    """The start returns, its terminal is closed, and the run goes on in a session of its own, without a terminal."""
    master, slave = pty.openpty()
    command = ["setsid", "--ctty", "--wait", "bash", str(LAUNCH / "tpu_pod.sh"), "start", "our-pod", "zone", *START]
    result = machines.run_command(command, stdin=slave, stdout=slave, stderr=slave, capture_output=False)
    os.close(slave)
    os.close(master)
    assert result.returncode == 0
    for host in machines.hosts:
        wait_until(lambda host=host: machines.processes(host))
        loop, (program,) = int((host / "dat_jax.pid").read_text()), machines.processes(host)
        fields = pathlib.Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()
        assert (int(fields[1]), int(fields[3]), fields[4]) == (loop, loop, "0")  # parent, session, terminal
        os.kill(loop, signal.SIGHUP)
        assert is_alive(program)
    pod(machines, "stop")
    assert not any(is_alive(pid) for host in machines.hosts for pid in machines.processes(host))


def test_only_the_first_host_prints_its_log(machines):
    machines.add("tail", 'cat "${@: -1}"')
    for index, host in enumerate(machines.hosts):
        (host / "dat_jax.log").write_text(f"step of host {index}\n")
    assert pod(machines, "logs") == "step of host 0\n"


def prepare_setup(machines):
    """Stand-ins of what the setup of a host calls. apt-get installs the package of gcsfuse."""
    for program in ("git", "uv", "curl"):
        machines.add(program)
    machines.add("mountpoint", "exit 1")
    folder = shlex.quote(str(machines._programs))
    machines.add("sudo", f'[[ "$*" == *install*.deb ]] && cp {folder}/git {folder}/gcsfuse; true')


def test_a_host_is_set_up_with_python_the_package_and_the_bucket(machines):
    prepare_setup(machines)
    (machines.hosts[0] / "dat_jax" / ".venv" / "bin" / "python").unlink()
    machines.run("tpu_pod.sh", "setup", "our-pod", "zone", "our-bucket", REPOSITORY="https://example.org/dat_jax")
    created, *installed = machines.calls("uv")
    minimum = tuple(map(int, re.search(r"(\d+)\.(\d+)", PROJECT["requires-python"]).groups()))
    assert created[:1] + created[2:] == ["venv", ".venv"]
    assert tuple(map(int, created[1].removeprefix("--python=").split("."))) >= minimum
    for words in installed:
        assert words[:-1] == ["pip", "install", "--quiet", "--python=.venv/bin/python", "--editable"]
        assert check_extras(words[-1]) == ["train", "tpu", "gcs"]
    assert len(installed) == len(machines.hosts)  # the environment of the second host is there
    installs = [words for words in machines.calls("sudo") if "install" in words]
    assert [words[0] for words in installs] == ["apt-get"]
    (download,) = machines.calls("curl")
    assert download[download.index("--output") + 1] == installs[0][-1]
    assert re.search(r"/gcsfuse/releases/download/v([\d.]+)/gcsfuse_\1_amd64.deb$", download[-1])
    mounts = [words for words in machines.calls("git") if "--implicit-dirs" in words]  # the copy of git records there
    assert mounts == [["-o", "ro", "--implicit-dirs", "our-bucket", "/mnt/our-bucket"]] * 2
    assert [words for words in machines.calls("git") if words[-1] == "--quiet"] == [
        ["-C", "dat_jax", "pull", "--quiet"]
    ] * 2


def test_the_repository_is_cloned_on_new_hosts(machines):
    prepare_setup(machines)
    for host in machines.hosts:
        (host / "dat_jax").rename(host / "elsewhere")
    machines.run("tpu_pod.sh", "setup", "our-pod", "zone", REPOSITORY="https://example.org/our code")
    clone = ["clone", "--quiet", "--depth=1", "https://example.org/our code", "dat_jax"]
    assert [words for words in machines.calls("git") if words[0] == "clone"] == [clone] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["setup", "our-pod", "zone"], "set REPOSITORY to the address of this repository"),
        (["start", "our-pod", "zone"], "the flags of dat_jax.main"),
        (["create", "our-pod", "zone"], "the type, such as v5litepod-64"),
        (["sotp", "our-pod", "zone"], "Unknown command sotp: expected create, state,"),
        (["start"], "Expected one of create, state,"),
    ],
)
def test_mistakes_touch_no_machine(machines, arguments, message):
    result = machines.run("tpu_pod.sh", *arguments, REPOSITORY="")
    assert machines.calls("gcloud") == []
    assert result.returncode != 0
    assert message in result.stderr


# SLURM


def test_slurm_starts_one_process_per_node_with_all_of_its_gpus(machines):
    machines.add("srun", 'echo "$JAX_LOCAL_DEVICE_IDS"')
    script = (LAUNCH / "slurm.sh").read_text()
    assert "#SBATCH --ntasks-per-node=1 " in script
    gpus = int(re.search(r"#SBATCH --gpus-per-node=(\d+)", script)[1])
    arguments = ["configs/dat_pp_t.py", "gs://bucket/our runs/t", "--config.batch_size=32"]
    result = machines.run("slurm.sh", *arguments, SLURM_GPUS_ON_NODE=str(gpus))
    assert (result.returncode, result.stdout) == (0, f"{','.join(map(str, range(gpus)))}\n")
    (words,) = machines.calls("srun")
    values, config = check_main(words)
    assert (values["config"].config_filename, values.workdir) == tuple(arguments[:2])
    assert config.batch_size == 32


# GKE and containers


def read_jobset():
    account, jobset = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    return account, jobset, jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_gke_starts_one_process_per_host():
    account, _, job = read_jobset()
    assert job["parallelism"] == job["completions"] == 16 // 4  # chips of the slice, of a host
    pods = job["template"]["spec"]
    assert pods["serviceAccountName"] == account["metadata"]["name"]
    (container,) = pods["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    check_main(container["command"])


def test_gke_restarts_all_pods_and_only_the_jobset_restarts():
    _, jobset, job = read_jobset()
    (container,) = job["template"]["spec"]["containers"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    assert container["command"][0] == "docs/launch/restart.sh"
    assert os.access(ROOT / container["command"][0], os.X_OK)
    assert {"name": "MAX_RESTARTS", "value": "0"} in container["env"]


def test_gke_mounts_the_bucket_where_the_command_reads_the_data():
    _, _, job = read_jobset()
    pods = job["template"]
    (container,) = pods["spec"]["containers"]
    assert pods["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    volumes = {volume["name"]: volume for volume in pods["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    values, config = check_main(container["command"])
    (place,) = (place for place in mounts if config.data.directory.startswith(f"{place}/"))
    data = volumes[mounts[place]]["csi"]
    assert (data["driver"], data["readOnly"]) == ("gcsfuse.csi.storage.gke.io", True)
    bucket = data["volumeAttributes"]["bucketName"]
    assert all(path.startswith(f"gs://{bucket}/") for path in (values.workdir, config.compilation_cache))
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def read_dockerfile():
    """Instructions with their words; a line is an instruction."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    return [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]


def test_the_image_contains_what_the_jobset_runs():
    instructions = read_dockerfile()
    assert [name for name, _ in instructions] == ["FROM", "ARG", "WORKDIR", *["COPY"] * 4, "RUN", "CMD"]
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    copied = set()
    for words in (words.split() for name, words in instructions if name == "COPY"):
        for source in words[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in rules
            copied.add(source)
        assert words[-1] in ("./", *words[:-1])
    assert "*" in rules
    assert {"pyproject.toml", "setup.py", PROJECT["readme"], *PROJECT["license-files"], "dat_jax", "configs"} <= copied
    _, _, job = read_jobset()
    command = job["template"]["spec"]["containers"][0]["command"]
    assert str(pathlib.Path(command[0]).parent) in copied
    assert check_main(command)[0]["config"].config_filename.split("/")[0] in copied


def test_the_image_installs_extras_on_a_python_that_the_package_supports():
    instructions = dict(read_dockerfile())
    assert instructions["FROM"] == "python:3.12-slim"
    assert any(line.endswith(":: 3.12") for line in PROJECT["classifiers"])
    name, default = instructions["ARG"].split("=")
    assert instructions["RUN"] == f'pip install --no-cache-dir ".[${name}]"'
    examples = re.findall(rf"--build-arg {name}=(\S+)", (LAUNCH / "Dockerfile").read_text())
    for extras in (default, *examples):
        assert "train" in check_extras(f".[{extras}]")
    assert instructions["CMD"] == '["python", "-m", "dat_jax.main", "--help"]'


# Commands of the documents

COMMANDS = [shlex.split(line) for line in documents.commands() if re.match(LAUNCH_PROGRAMS, line)]
# Flags of the subcommands in the documents, from the references of gcloud and the sources of xpk; "!" marks required ones.
_XPK = "cluster! project zone"
_FLAGS = {
    "gcloud container node-pools create": "cluster location node-locations machine-type tpu-topology num-nodes spot",
    "gcloud container node-pools delete": "cluster location",
    "gcloud storage buckets add-iam-policy-binding": "member! role!",
    "xpk storage attach": f"{_XPK} type! bucket mount-point! readonly! size auto-mount!",
    "xpk workload create": f"{_XPK} workload! command! tpu-type! docker-image max-restarts restart-on-exit-codes env",
    "xpk workload list": _XPK,
    "xpk workload delete": f"{_XPK} workload",
}


def documented(*prefix):
    """The commands that start with these words, without them."""
    return [words[len(prefix) :] for words in COMMANDS if words[: len(prefix)] == list(prefix)]


def read_flags(words):
    """name -> value of --name=value."""
    return dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))


def test_documented_commands_of_the_cloud_have_flags_of_its_programs():
    cloud = [words for words in COMMANDS if words[0] in ("gcloud", "xpk")]
    used = set()
    for words in cloud:
        (name,) = (name for name in _FLAGS if words[: len(name.split())] == name.split())
        known = _FLAGS[name].split()
        given = set(read_flags(words))
        assert given <= {flag.rstrip("!") for flag in known}, words
        assert {flag.rstrip("!") for flag in known if flag.endswith("!")} <= given, words
        used.add(name)
    assert used == set(_FLAGS)


def test_documented_commands_of_a_pod_go_from_creating_to_deleting(machines):
    prepare_setup(machines)
    machines.add("tail", 'cat "${@: -1}"')
    actions = documented("docs/launch/tpu_pod.sh")
    names = ["create", "state", "setup", "check", "start", "status", "logs", "stop", "delete"]
    assert [words[0] for words in actions] == names
    assert len({tuple(words[1:3]) for words in actions}) == 1
    created, _, prepared, checked, started, *_ = actions
    assert set(checked[3:]) <= set(started[3:])
    page = (ROOT / "docs" / "many_hosts.md").read_text()
    images = {
        row[1].strip("`").split("-")[0]: row[2].strip("`") for row in _rows(page, "| chips | type | runtime version |")
    }
    assert images[created[3].split("-")[0]] == created[4]
    _, config = check_main(["python", "-m", "dat_jax.main", *started[3:]])
    assert config.data.directory.startswith(f"/mnt/{prepared[3]}/")
    # The stand-in of the program does not end by itself, and that of tail does not wait, as stop needs.
    for words in (created, prepared, started):
        result = machines.run("tpu_pod.sh", *words, REPOSITORY="https://example.org/dat_jax")
        assert result.returncode == 0, result.stderr


def _rows(page, header):
    lines = page[page.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_documented_commands_of_xpk_mount_the_data_that_the_command_reads():
    (attached,), (created,) = (documented("xpk", *names) for names in (("storage", "attach"), ("workload", "create")))
    storage, workload = read_flags(attached), read_flags(created)
    words = shlex.split(workload["command"])
    values, config = check_main(words)
    assert config.data.directory.startswith(f"{storage['mount-point']}/")
    assert values.workdir.startswith(f"gs://{storage['bucket']}/")
    assert words[0] == "docs/launch/restart.sh"
    assert workload["env"] == "MAX_RESTARTS=0"


def test_documented_commands_of_clusters_name_files_of_the_project(machines):
    for words in documented("docker", "build"):
        assert (ROOT / words[words.index("-f") + 1]).samefile(LAUNCH / "Dockerfile")
        assert words[-1] == "."
    for words in (*documented("kubectl", "apply"), *documented("kubectl", "delete")):
        assert (ROOT / words[words.index("-f") + 1]).samefile(LAUNCH / "gke_jobset.yaml")
    (logs,) = documented("kubectl", "logs")
    account, jobset, _ = read_jobset()
    assert f"jobset.sigs.k8s.io/jobset-name={jobset['metadata']['name']}" in read_flags(logs)["selector"].split(",")
    (binding,) = documented("gcloud", "storage", "buckets", "add-iam-policy-binding")
    assert read_flags(binding)["member"].endswith(f"/subject/ns/default/sa/{account['metadata']['name']}")
    machines.add("srun")
    ((script, *arguments),) = documented("sbatch")
    assert machines.run(pathlib.Path(script).name, *arguments, SLURM_GPUS_ON_NODE="8").returncode == 0
    check_main(machines.calls("srun")[0])
