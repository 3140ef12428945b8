"""From pushed images to a tested service over a real SSH connection, and back at every fault."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.waiting import until

pytestmark = pytest.mark.server

CHECKOUT = Path(__file__).parents[2]
DONE, ROLLED_BACK, STUCK = 0, 1, 3
IMPATIENT = {"SMOKE_TIMEOUT_S": "3"}  # where nothing will answer


def test_first_release_serves_and_is_answered_for_by_phantoms(host):
    commit = host.commit()
    done = host.run("deploy.sh")
    assert done.returncode == DONE, done.stderr
    assert (host.current, host.previous, host.running) == (commit, None, commit)
    health, *lines = done.stdout.splitlines()
    assert "run run-7" in health
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(answers) == 8
    assert {answer["status"] for answer in answers} == {"ok"}
    assert {Path(answer["path"]).suffix for answer in answers} == {".png", ".dcm"}
    # Pulled before started, by digest, with the password of the host's own role.
    words = [re.search(r"^docker.* (login|pull|up) ", command) for command in host.commands]
    assert [word[1] for word in words if word] == ["login", "pull", "up"]
    assert not list(host.root.glob("incoming.*"))


def test_files_are_those_of_the_commit_not_of_the_working_tree(host):
    commit = host.commit()
    (host.checkout / "docker/compose.yaml").write_text("# edited since\n")
    assert host.run("deploy.sh").returncode == DONE
    assert (host.root / "releases" / commit / "docker/compose.yaml").read_text() == "# release 0\n"


def test_two_releases_are_kept_and_the_images_of_older_ones_deleted(host):
    first, second = host.serve(), host.serve()
    third = host.commit()
    assert host.run("deploy.sh").returncode == DONE
    assert (host.current, host.previous) == (third, second)
    assert {path.name for path in (host.root / "releases").iterdir()} == {second, third}
    removed = [command for command in host.commands if "image rm" in command]
    assert len(removed) == 2
    assert f"{1:064x}" in removed[0]
    assert first not in (host.current, host.previous)


@pytest.mark.parametrize(
    "fault",
    [
        "pull",
        "unhealthy",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("silent", "elsewhere")),
    ],
)
def test_a_release_that_fails_gives_way_to_the_one_before(host, fault):
    before = host.serve()
    host.commit(fault)
    done = host.run("deploy.sh", **IMPATIENT)
    assert done.returncode == ROLLED_BACK, done.stderr
    assert f"rolled back: {before} serves again" in done.stderr
    assert (host.current, host.running) == (before, before)


def test_a_failed_first_release_is_stopped(host):
    host.commit("silent")
    done = host.run("deploy.sh", **IMPATIENT)
    assert done.returncode == ROLLED_BACK
    assert "there was no release before; the service is stopped" in done.stderr
    assert host.current is None
    assert any("compose" in command and "down" in command for command in host.commands)


def test_a_release_that_cannot_be_confirmed_is_rolled_back(host):
    before = host.serve()
    host.commit()
    (host.root / "current.new").mkdir()  # where the link is made
    (host.root / "current.new" / "file").touch()
    done = host.run("deploy.sh")
    assert done.returncode == ROLLED_BACK, done.stderr
    assert (host.current, host.running) == (before, before)


def test_a_stopped_job_rolls_back(host):
    before = host.serve()
    host.commit("slow")
    process = subprocess.Popen(
        ["bash", str(host.checkout / "deploy/jenkins/deploy.sh")],
        env=host.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    starting = host.fake / "starting"
    until(lambda: starting.exists() or process.poll() is not None, "the start of the service")
    assert process.poll() is None, process.communicate()[0]
    # As Jenkins does: every process of the step gets the signal.
    subprocess.run(["kill", "-TERM", "--", f"-{process.pid}"], check=True, timeout=10)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == ROLLED_BACK, output
    assert (host.current, host.running) == (before, before)
    assert f"FAILED with exit code {128 + signal.SIGTERM}; rolling back" in output


def test_a_roll_back_that_fails_says_so_with_a_code_of_its_own(host):
    host.serve()
    host.set_fault("unhealthy")
    host.commit("silent")
    done = host.run("deploy.sh", **IMPATIENT)
    assert done.returncode == STUCK
    assert "THE ROLL-BACK FAILED" in done.stderr


def test_a_roll_back_after_which_nothing_answers_has_failed(host):
    host.serve()
    host.set_fault("silent")
    host.commit("unhealthy")
    done = host.run("deploy.sh", **IMPATIENT)
    assert done.returncode == STUCK
    assert "does not answer" in done.stderr


def test_roll_back_by_one_command_and_forth_again(host):
    first, second = host.serve(), host.serve()
    for current, previous in ((first, second), (second, first)):
        done = host.run("deploy.sh", "--roll-back")
        assert done.returncode == DONE, done.stderr
        assert (host.current, host.previous, host.running) == (current, previous, current)


def test_roll_back_without_a_release_before_changes_nothing(host):
    only = host.serve()
    done = host.run("deploy.sh", "--roll-back")
    assert done.returncode == ROLLED_BACK
    assert "keeps no release before" in done.stderr
    assert (host.current, host.running) == (only, only)


def test_the_same_commit_again_changes_nothing(host):
    commit = host.serve()
    assert host.run("deploy.sh").returncode == DONE
    assert (host.current, host.previous) == (commit, None)


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ("", "Host key verification failed"),
        ("[127.0.0.1]:{port} {other}", "Host key verification failed"),
    ],
    ids=["unknown", "changed"],
)
def test_a_host_with_another_key_is_not_spoken_to(host, tmp_path, known, reason):
    host.commit()
    other = " ".join((tmp_path / "keys" / "jenkins.pub").read_text().split()[:2])
    Path(host.environment["KNOWN_HOSTS"]).write_text(
        known.format(port=host.port, other=other) + "\n"
    )
    done = host.run("deploy.sh")
    assert done.returncode != DONE
    assert reason in done.stderr
    assert host.commands == []
    assert list(host.root.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (r"(_SERVER_IMAGE=[^@]*)@.*", "names no server image by its digest"),
        (r"(_CLIENT_IMAGE=[^@]*)@.*", "names no client image by its digest"),
    ],
)
def test_an_image_named_by_a_tag_is_not_taken_in(host, line, reason):
    before = host.serve()
    host.commit()
    release = host.checkout / "results/deploy/release.env"
    release.write_text(re.sub(line, r"\1:latest", release.read_text()))
    done = host.run("deploy.sh")
    assert done.returncode != DONE
    assert reason in done.stderr
    assert (host.current, host.running) == (before, before)


def test_digests_of_another_commit_are_refused(host):
    host.commit()
    release = host.checkout / "results/deploy/release.env"
    release.write_text(release.read_text().replace("CHESTCT_COMMIT=", "CHESTCT_COMMIT=0"))
    done = host.run("deploy.sh")
    assert (done.returncode, host.commands) == (1, [])
    assert "is of another commit" in done.stderr


@pytest.mark.parametrize("name", ["DEPLOY_HOST", "SSH_KEY", "KNOWN_HOSTS"])
def test_a_missing_variable_is_named(host, name):
    done = host.run("deploy.sh", **{name: ""})
    assert done.returncode == 1
    assert f"the variable {name} is not set" in done.stderr


def test_push_names_images_by_commit_and_writes_digests(host):
    commit = host.commit()
    (host.checkout / "results/deploy/release.env").unlink()
    done = host.run("push.sh")
    assert done.returncode == 0, done.stderr
    written = (host.checkout / "results/deploy/release.env").read_text().splitlines()
    tags = {path.name: path.read_text() for path in (host.fake / "tags").iterdir()}
    repository = host.environment["ECR_REPOSITORY"]
    assert set(tags) == {f"edge-{commit}", f"client-{commit}"}
    assert written == [
        f"CHESTCT_COMMIT={commit}",
        "CHESTCT_PROFILE=edge",
        f"CHESTCT_SERVER_IMAGE={repository}@{tags[f'edge-{commit}']}",
        f"CHESTCT_CLIENT_IMAGE={repository}@{tags[f'client-{commit}']}",
    ]
    assert not any("latest" in command for command in host.commands)
    assert "a-password" not in done.stdout + done.stderr + "".join(host.commands)


def test_push_leaves_a_tag_that_is_there(host):
    host.commit()
    assert host.run("push.sh").returncode == 0
    again = host.run("push.sh")
    assert again.returncode == 0
    assert "in the registry already" in again.stderr
    assert sum(command.startswith("docker push") for command in host.commands) == 2


@pytest.mark.parametrize(
    ("changes", "file", "reason"),
    [
        ({}, "denied", "AccessDeniedException"),
        ({}, "no-push", ""),
        ({"AWS_ACCOUNT_ID": "210987654321"}, None, "push only to your own registry"),
        ({"ECR_REPOSITORY": "chestct"}, None, "no ECR address"),
        ({"SERVER": "latest"}, None, "expected edge (CPU) or server (GPU)"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, None, "AWS_SECRET_ACCESS_KEY is not set"),
    ],
)
def test_push_that_fails_writes_no_release(host, changes, file, reason):
    host.commit()
    (host.checkout / "results/deploy/release.env").unlink()
    if file:
        (host.fake / file).touch()
    done = host.run("push.sh", **changes)
    assert done.returncode != 0
    assert reason in done.stderr
    assert not (host.checkout / "results/deploy/release.env").exists()


def test_build_labels_images_with_version_and_commit(host):
    commit = host.commit()
    assert host.run("build.sh", SERVER="server").returncode == 0
    server, client = host.commands
    for command, image in ((server, "server"), (client, "client")):
        assert f"--file docker/{image}.Dockerfile" in command
        assert f"COMMIT={commit}" in command
        assert re.search(r"VERSION=\d+\.\d+\.\d+ ", command)
        assert f":{image}-{commit} ." in command


def test_scan_fails_on_findings_and_on_packages_that_it_could_not_look_up(host):
    host.commit()
    (host.checkout / "deploy/jenkins/accepted.txt").write_text("# why\nCVE-2026-1 # not reached\n")
    programs = Path(host.environment["PATH"].partition(":")[0])
    record = host.fake / "scans"
    for name in ("pip-audit", "trivy"):
        (programs / name).write_text(
            f"#!/bin/sh\necho {name} $* >> {record}\n"
            "case $* in *${FINDING:-none}*) exit 1; esac\n"
        )
        (programs / name).chmod(0o755)
    hashed = sorted(
        str(path.relative_to(CHECKOUT))
        for pattern in ("*.txt", "*/*.txt")
        for path in CHECKOUT.glob(pattern)
        if "--hash=sha256:" in path.read_text()
    )
    assert {"locks/test.txt", "locks/uv.txt", "docker/edge.txt", "locks/client.txt"} < set(hashed)
    for name in hashed:
        (host.checkout / name).parent.mkdir(exist_ok=True)
        (host.checkout / name).touch()
    assert host.run("scan.sh").returncode == 0
    lines = record.read_text().splitlines()
    audits = [line for line in lines if line.startswith("pip-audit")]
    assert sorted(line.split()[-1] for line in audits) == hashed
    assert all("--strict" in line and "--ignore-vuln CVE-2026-1 " in line for line in audits)
    assert sum("--severity HIGH,CRITICAL" in line for line in lines) == 2
    for finding in ("locks/gpu.txt", "client-"):
        done = host.run("scan.sh", FINDING=finding)
        assert done.returncode == 1
        assert f"vulnerabilities in {finding.rstrip('-')}" in done.stderr
    record.unlink()
    assert host.run("scan.sh", "--locks", ECR_REPOSITORY="").returncode == 0
    assert len(record.read_text().splitlines()) == len(hashed)
    (programs / "trivy").unlink()
    assert "NOT SCANNED" in host.run("scan.sh").stderr
