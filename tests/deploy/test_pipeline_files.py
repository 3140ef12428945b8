"""The Jenkinsfile and the GitHub workflow: what they run, who gets which secret, and no address."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
JENKINSFILE = (CHECKOUT / "Jenkinsfile").read_text()
WORKFLOW = CHECKOUT / ".github" / "workflows" / "main.yaml"
SCRIPTS = sorted((CHECKOUT / "deploy").glob("*/*.sh"))
PARTS = ["check", "unit", "servers", "pipeline"]
ADDRESS = re.compile(r"\b(?!127\.0\.0\.1\b|0\.0\.0\.0\b)\d{1,3}(\.\d{1,3}){3}\b|ec2-\d")


def stages() -> dict[str, str]:
    parts = re.split(r"stage\('(\w+)'\)", JENKINSFILE.partition("post {")[0])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_stages_run_the_real_checks_in_order():
    found = stages()
    assert list(found) == ["Checkout", "Check", "Test", "Build", "Scan", "Push", "Deploy"]
    steps = {
        name: re.findall(r"'(make [\w-]+|deploy/\S+\.sh[^']*)'", found[name]) for name in found
    }
    assert steps["Check"] == ["make check"]
    assert steps["Test"] == ["make test-all"]
    scripts = re.findall(r"'(deploy/\S+\.sh)", JENKINSFILE)
    assert len(scripts) == 5
    for script in scripts:
        assert os.access(CHECKOUT / script, os.X_OK), script


def test_secrets_reach_only_the_stages_that_need_them():
    before, _, _ = JENKINSFILE.partition("stages {")
    assert "credentials(" not in before
    of_stage = {
        name: set(re.findall(r"credentials(?:Id: |\()'(\w+)'", text))
        for name, text in stages().items()
    }
    key = {"AWS_ACCOUNT_ID", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert of_stage == {
        "Checkout": set(),
        "Check": set(),
        "Test": set(),
        "Build": {"ECR_REPOSITORY"},
        "Scan": {"ECR_REPOSITORY"},
        "Push": {"ECR_REPOSITORY"} | key,
        "Deploy": {"deploy_host", "ssh_key", "known_hosts"},
    }


def test_builds_end_and_do_not_overlap():
    assert "disableConcurrentBuilds()" in JENKINSFILE
    for name, text in stages().items():
        assert name == "Checkout" or "timeout(time:" in text, name


@pytest.mark.parametrize("path", [CHECKOUT / "Jenkinsfile", WORKFLOW, *SCRIPTS], ids=str)
def test_no_address_no_blind_trust_and_no_moving_tag(path):
    text = path.read_text()
    assert not ADDRESS.search(text)
    for fault in ("StrictHostKeyChecking=no", ":latest", "system prune", "apt-key", "wget "):
        assert fault not in text


def test_workflow_has_least_rights_and_pinned_actions():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["permissions"] == {}
    test, deploy = workflow["jobs"]["test"], workflow["jobs"]["deploy"]
    assert list(workflow["jobs"]) == ["test", "deploy"]
    assert deploy["needs"] == "test"  # all of its parts
    assert test["strategy"] == {"fail-fast": False, "matrix": {"part": PARTS}}
    assert "refs/heads/main" in deploy["if"]
    assert "push" in deploy["if"]
    assert "secrets." not in str(test)
    for job in (test, deploy):
        assert job["permissions"] == {"contents": "read"}
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", "a@" + "0" * 40))
            assert "secrets." not in step.get("run", "")
            assert "${{" not in step.get("run", "")


@pytest.mark.slow
def test_linters_of_jenkinsfile_and_workflow_find_nothing():
    if shutil.which("npm") is None or shutil.which("java") is None:
        pytest.skip("no npm or no Java: apt-get install npm default-jre-headless")
    done = subprocess.run(
        ["make", "lint-deploy"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Jenkins(http.server.BaseHTTPRequestHandler):
    """Jenkins' two answers that the trigger reads: a place in the queue, then a build."""

    def do_POST(self) -> None:
        self.seen.append(("POST", self.path, self.headers["Authorization"]))
        if self.path.startswith("/job/unknown/"):
            self.send_error(404)
            return
        self.send_response(201)
        self.send_header("Location", "https://jenkins.example.org/queue/item/7/")
        self.end_headers()

    def do_GET(self) -> None:
        self.seen.append(("GET", self.path, self.headers["Authorization"]))
        body = self.answers[min(len(self.seen) - 2, len(self.answers) - 1)].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def jenkins() -> Iterator[Any]:
    waiting = json.dumps({"why": "In the quiet period"})
    started = '{"executable":{"_class":"WorkflowRun","number":42,"url":"https://x/"}}'
    handler = type("Handler", (Jenkins,), {"seen": [], "answers": [waiting, started]})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            handler.url = f"http://127.0.0.1:{server.server_address[1]}"
            yield handler
        finally:
            server.shutdown()
            thread.join(10)


def trigger(url: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {"URL": url, "USER": "me", "TOKEN": "a-token", "JOB": "chest/main"} | changes
    return subprocess.run(
        ["bash", "-x", str(CHECKOUT / "deploy/jenkins/trigger.sh")],
        env={"PATH": os.environ["PATH"], "QUEUE_POLL_S": "0.05", "QUEUE_POLLS": "3"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_trigger_starts_the_job_and_waits_for_its_number(jenkins):
    done = trigger(jenkins.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trigger: started 42\n"
    assert [(verb, path) for verb, path, _ in jenkins.seen] == [
        ("POST", "/job/chest/job/main/buildWithParameters?delay=0sec"),
        ("GET", "/queue/item/7/api/json"),
        ("GET", "/queue/item/7/api/json"),
    ]
    assert {header for *_, header in jenkins.seen} == {"Basic bWU6YS10b2tlbg=="}


def test_trigger_on_this_machine_takes_no_proxy(jenkins):
    with socket.create_server(("127.0.0.1", 0)) as dead:
        proxy = f"http://127.0.0.1:{dead.getsockname()[1]}"
    done = trigger(jenkins.url, http_proxy=proxy, https_proxy=proxy, ALL_PROXY=proxy)
    assert (done.returncode, done.stdout) == (0, "trigger: started 42\n"), done.stderr


def test_trigger_gives_the_token_to_no_command_line(jenkins, tmp_path):
    real = shutil.which("curl")
    (tmp_path / "curl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/seen\nexec {real} "$@"\n')
    (tmp_path / "curl").chmod(0o755)
    assert trigger(jenkins.url, PATH=f"{tmp_path}:{os.environ['PATH']}").returncode == 0
    assert len((tmp_path / "seen").read_text().splitlines()) == 3
    assert "a-token" not in (tmp_path / "seen").read_text()


def test_trigger_behind_another_build_is_no_failure(jenkins):
    jenkins.answers = jenkins.answers[:1]
    done = trigger(jenkins.url)
    assert (done.returncode, done.stdout) == (0, "trigger: queued behind another build\n")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"TOKEN": ""}, "the secret TOKEN is not set"),
        ({"URL": "http://jenkins.example.org"}, "the token would travel in clear"),
        ({"URL": "https://me:secret@jenkins.example.org"}, "URL must be https"),
        ({"JOB": "chest?token=1"}, "JOB must be the job's name"),
        ({"TOKEN": 'a"\nurl = "file:///etc/passwd'}, "holds a character"),
        ({"JOB": "unknown"}, "404"),
    ],
)
def test_trigger_that_cannot_start_fails_and_says_why(jenkins, changes, reason):
    done = trigger(jenkins.url, **changes)
    assert done.returncode != 0
    assert reason in done.stderr
    assert done.stdout == ""
