"""A real sshd on loopback as the application host, in front of a real Triton.

What cannot run here is `docker`: a recording stand-in takes its place on the host's PATH. It starts
and stops a forwarder on the published port, so a release that does not listen does not answer.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serving.local import LocalTriton
from tests.support.ports import free_port
from tests.support.triton import SMALL_FACTS, config_parameters, serve
from tests.support.waiting import until

CHECKOUT = Path(__file__).parents[2]
REPOSITORY = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/chestct"

DOCKER = """\
#!/usr/bin/env bash
# Stands in for docker: records what it is asked, and publishes the port while the service runs.
set -eu
echo "docker $*" >> "$FAKE/commands"
down() { if [ -s "$FAKE/pid" ]; then kill "$(cat "$FAKE/pid")" 2>/dev/null || true; fi
         rm -f "$FAKE/pid"; }
case "$*" in
  login*) read -r secret; [ "$secret" = a-password ]; test -d "$DOCKER_CONFIG" ;;
  push*) [ ! -e "$FAKE/no-push" ]
         tag=${2##*:}; printf 'sha256:%s' "$(printf %s "$tag" | sha256sum | cut -c -64)" \
           > "$FAKE/tags/$tag" ;;
  compose*)
    previous=
    for word; do
      [ "$previous" != --env-file ] || environment=$word
      previous=$word
    done
    server=$(sed -n 's/^CHESTCT_SERVER_IMAGE=//p' "$environment")
    fault=$(cat "$FAKE/faults/${server##*:}" 2>/dev/null || true)
    case " $* " in
      *" pull "*) [ "$fault" != pull ] ;;
      *" down "*) down ;;
      *" up "*)
        down
        echo "$server" > "$FAKE/running"
        [ "$fault" != slow ] || { touch "$FAKE/starting"; sleep 3; }
        [ "$fault" != unhealthy ] || exit 1
        [ "$fault" = silent ] || {
          setsid "$PYTHON" "$FAKE/forward.py" "$FAKE/published" "$FAKE/target$fault" \
            </dev/null >/dev/null 2>&1 9>&- &
          echo $! > "$FAKE/pid"
          for _ in $(seq 100); do
            [ ! -e "$FAKE/listening" ] || { rm "$FAKE/listening"; exit 0; }
            sleep 0.05
          done
          exit 1
        } ;;
    esac ;;
esac
"""

AWS = """\
#!/usr/bin/env bash
# Stands in for the AWS CLI: a registry that is a folder of tags.
set -eu
echo "aws $*" >> "$FAKE/commands"
case "$*" in
  *get-login-password*) echo a-password ;;
  *describe-images*)
    [ ! -e "$FAKE/denied" ] || { echo "An error occurred (AccessDeniedException)" >&2; exit 254; }
    for word; do case $word in imageTag=*) tag=${word#*=} ;; esac; done
    cat "$FAKE/tags/$tag" 2>/dev/null ||
      { echo "An error occurred (ImageNotFoundException) when calling" >&2; exit 254; } ;;
esac
"""

FORWARD = """\
import asyncio, pathlib, sys

async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def answer(reader, writer):
    target = int(pathlib.Path(sys.argv[2]).read_text())
    other = await asyncio.open_connection("127.0.0.1", target)
    await asyncio.gather(copy(reader, other[1]), copy(other[0], writer))

async def main():
    port = int(pathlib.Path(sys.argv[1]).read_text())
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    pathlib.Path(sys.argv[1]).with_name("listening").touch()
    async with server:
        await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(scope="session")
def model_repository(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Path:
    """A tiny model that keeps the contract, called chestct."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, "chestct", config_parameters(SMALL_FACTS))
    return folder


@pytest.fixture(scope="session")
def triton(model_repository: Path, triton_environment: Path) -> Iterator[LocalTriton]:
    """A real Triton for all tests that leave it as it is."""
    with serve(model_repository, triton_environment) as running:
        yield running


@dataclass
class Host:
    """The application host, and the checkout of Jenkins that deploys to it."""

    root: Path
    fake: Path
    checkout: Path
    port: int
    environment: dict[str, str]
    commits: list[str] = field(default_factory=list)

    def run(self, script: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.checkout / "deploy" / "jenkins" / script), *arguments],
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def commit(self, fault: str = "") -> str:
        """Another commit of the checkout with its release.env, as push.sh leaves it.

        Args:
            fault: What its images do wrong: pull, slow, unhealthy, silent, or elsewhere.
        """
        compose = self.checkout / "docker" / "compose.yaml"
        compose.parent.mkdir(exist_ok=True)
        compose.write_text(f"# release {len(self.commits)}\n")
        git(self.checkout, "add", "docker", "deploy")
        git(self.checkout, "commit", "--quiet", "--message", f"Release {len(self.commits)}")
        commit = git(self.checkout, "rev-parse", "HEAD")
        self.commits.append(commit)
        digest = f"{len(self.commits):064x}"
        release = self.checkout / "results" / "deploy" / "release.env"
        release.parent.mkdir(parents=True, exist_ok=True)
        release.write_text(
            f"CHESTCT_COMMIT={commit}\nCHESTCT_PROFILE=edge\n"
            f"CHESTCT_SERVER_IMAGE={REPOSITORY}@sha256:{digest}\n"
            f"CHESTCT_CLIENT_IMAGE={REPOSITORY}@sha256:{digest[::-1]}\n"
        )
        self.set_fault(fault)
        return commit

    def serve(self) -> str:
        """Another release that serves, put there as deploy.sh does it but without its tests."""
        commit = self.commit()
        incoming = self.root / "incoming.test"
        shutil.copytree(self.checkout, incoming, symlinks=True)
        shutil.copy(self.checkout / "results" / "deploy" / "release.env", incoming)
        script = self.root / "releases" / commit / "deploy" / "host" / "release.sh"
        for command in (
            [incoming / "deploy" / "host" / "release.sh", "receive", incoming, commit],
            [script, "activate", commit],
            [script, "confirm", commit],
        ):
            subprocess.run(
                ["bash", *map(str, command)],
                env=self.environment | {"CHESTCT_ROOT": str(self.root), "PYTHON": sys.executable},
                check=True,
                timeout=60,
            )
        (self.fake / "commands").unlink()
        return commit

    def set_fault(self, fault: str, release: int = -1) -> None:
        number = range(1, len(self.commits) + 1)[release]
        (self.fake / "faults" / f"{number:064x}").write_text(fault)

    @property
    def current(self) -> str | None:
        return self._pointed("current")

    @property
    def previous(self) -> str | None:
        return self._pointed("previous")

    def _pointed(self, name: str) -> str | None:
        link = self.root / name
        return link.readlink().name if link.is_symlink() else None

    @property
    def running(self) -> str | None:
        """The commit whose server image was started last."""
        file = self.fake / "running"
        if not file.is_file():
            return None
        return self.commits[int(file.read_text().strip()[-64:], 16) - 1]

    @property
    def commands(self) -> list[str]:
        file = self.fake / "commands"
        return file.read_text().splitlines() if file.is_file() else []


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout.strip()


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path: Path, triton: LocalTriton) -> Iterator[Host]:
    """An application host that has never been deployed to."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        pytest.skip("no sshd: apt-get install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd refuses to start without it
    keys, fake, programs = (tmp_path / name for name in ("keys", "fake", "programs"))
    for folder in (keys, programs, fake / "tags", fake / "faults"):
        folder.mkdir(parents=True)
    for name in ("host", "jenkins"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)],
            check=True,
            timeout=30,
        )
    shutil.copy(keys / "jenkins.pub", keys / "authorized")
    write_program(programs / "docker", DOCKER)
    write_program(programs / "aws", AWS)
    published, port = free_port(), free_port()
    (fake / "forward.py").write_text(FORWARD)
    (fake / "published").write_text(str(published))
    (fake / "target").write_text(triton.grpc_url.rpartition(":")[2])
    (fake / "targetelsewhere").write_text(triton.http_url.rpartition(":")[2])  # speaks no gRPC
    root = tmp_path / "opt"
    config = tmp_path / "sshd_config"
    variables = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "FAKE": fake,
        "CHESTCT_ROOT": root,
        "PYTHON": sys.executable,
    }
    root.mkdir()
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys / 'host'}\nPidFile none\n"
        f"AuthorizedKeysFile {keys / 'authorized'}\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"SetEnv {' '.join(f'{name}={value}' for name, value in variables.items())}\n"
        # The files that a login shell reads may set another PATH.
        f'ForceCommand PATH={variables["PATH"]} exec bash --norc -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    host_key = " ".join((keys / "host.pub").read_text().split()[:2])
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    unwanted = shutil.ignore_patterns("node_modules", "__pycache__")
    shutil.copytree(CHECKOUT / "deploy", checkout / "deploy", ignore=unwanted)
    for name in ("training", "configs", "client", "pyproject.toml"):
        (checkout / name).symlink_to(CHECKOUT / name)
    git(checkout, "init", "--quiet")

    with (tmp_path / "sshd.log").open("wb") as log:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(config)], stderr=log)
    try:

        def listens() -> bool:
            assert process.poll() is None, (tmp_path / "sshd.log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(listens, "sshd")
        yield Host(
            root,
            fake,
            checkout,
            port,
            {
                "PATH": f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin",
                "PYTHONPATH": str(CHECKOUT / "client" / "src"),
                "HOME": str(tmp_path),
                "FAKE": str(fake),
                "DEPLOY_HOST": "127.0.0.1",
                "SSH_PORT": str(port),
                "SSH_USER": getpass.getuser(),
                "SSH_KEY": str(keys / "jenkins"),
                "KNOWN_HOSTS": str(keys / "known_hosts"),
                "GRPC_PORT": str(published),
                "SMOKE_TIMEOUT_S": "20",
                "ECR_REPOSITORY": REPOSITORY,
                "AWS_ACCOUNT_ID": "123456789012",
                "AWS_ACCESS_KEY_ID": "an-id",
                "AWS_SECRET_ACCESS_KEY": "a-secret",
            },
        )
    finally:
        process.terminate()
        process.wait(10)
        if (fake / "pid").is_file():
            os.kill(int((fake / "pid").read_text()), signal.SIGTERM)
