"""Checks of .github/: workflows and templates parse, use known actions and call existing Makefile targets."""

import re

import pytest
import yaml

from tests.helpers.documents import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
ACTIONS = {"actions/checkout", "actions/setup-python", "pypa/gh-action-pypi-publish"}


def read_steps(path):
    """Steps of all jobs of a workflow."""
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_existing_targets_and_known_actions(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = read_steps(path)
    commands = "\n".join(step.get("run", "") for step in steps)
    called = set(re.findall(r"\bmake ([\w-]+)", commands))
    assert called
    assert called <= targets
    assert {step["uses"].partition("@")[0] for step in steps if "uses" in step} <= ACTIONS


def test_every_push_is_linted_tested_and_documented():
    commands = {step.get("run") for step in read_steps(ROOT / ".github/workflows/ci.yml")}
    assert {"make lint", "make test", "make docs"} <= commands
    commands = {step.get("run") for step in read_steps(ROOT / ".github/workflows/nightly.yml")}
    assert "make test-all" in commands


def test_only_the_publishing_job_may_request_a_token():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        allowed = [name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})]
        assert allowed == (["publish"] if path.stem == "release" else [])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_is_complete(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "labels", "body"} == set(form)
    names = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(names) == len(set(names))
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    if path.stem == "bug_report":
        assert "dat-jax --version" in path.read_text()
