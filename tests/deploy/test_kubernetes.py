"""The manifests as kustomize builds them, against Kubernetes' schemas; the probe on Triton."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import requests
import yaml

from tests.support.triton import serve

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
PROBE = FOLDER / "probe" / "probe.py"
OVERLAYS = ("overlays/cpu", "overlays/gpu")
VERSIONS = ("1.31", "1.37")


def built(overlay: str) -> dict[tuple[str, str], Any]:
    """What kustomize makes of it, by kind and name; a generated name without its hash."""
    program = shutil.which("kubectl") or shutil.which("kustomize")
    if program is None:
        pytest.skip("no kubectl: install Kubernetes' command line")
    verb = "kustomize" if Path(program).name == "kubectl" else "build"
    done = subprocess.run(
        [program, verb, str(FOLDER / overlay)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        (one["kind"], re.sub(r"-[a-z0-9]{10}$", "", one["metadata"]["name"])): one
        for one in yaml.safe_load_all(done.stdout)
    }


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> dict[tuple[str, str], Any]:
    return built(request.param)


def pod_of(manifests: dict[tuple[str, str], Any]) -> dict[str, Any]:
    pod: dict[str, Any] = manifests["Deployment", "chestct"]["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_keep_the_schemas(manifests, version):
    kinds = {kind for kind, _ in manifests}
    assert {
        *("Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"),
        *("NetworkPolicy", "PersistentVolumeClaim", "ConfigMap"),
    } <= kinds
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelt_field_would_be_found(manifests):
    manifest = manifests["HorizontalPodAutoscaler", "chestct"]
    broken = manifest | {"spec": manifest["spec"] | {"minReplica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_everything_that_is_named_is_there(manifests):
    deployment = manifests["Deployment", "chestct"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= deployment["spec"]["selector"]["matchLabels"].items()
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = manifests[kind, "chestct"]["spec"]
        chosen = spec.get("selector", spec.get("podSelector"))
        assert labels.items() >= chosen["matchLabels"].items()
    target = manifests["HorizontalPodAutoscaler", "chestct"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in manifests
    names = {(kind, one["metadata"]["name"]) for (kind, _), one in manifests.items()}
    pod = pod_of(manifests)
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in names
    (container,) = pod["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    ports = {port["name"] for port in container["ports"]}
    for name in ("chestct", "chestct-pods"):
        service = manifests["Service", name]["spec"]
        assert labels.items() >= service["selector"].items()
        assert {port["targetPort"] for port in service["ports"]} <= ports


def test_the_server_has_no_rights_that_it_does_not_need(manifests):
    pod = pod_of(manifests)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    models = next(m for m in container["volumeMounts"] if m["name"] == "models")
    assert models["readOnly"] is True
    policy = manifests["NetworkPolicy", "chestct"]["spec"]
    assert policy["egress"] == []
    assert all(rule["from"] for rule in policy["ingress"])
    # Metrics are for the monitoring alone, and not behind the Service of the clients.
    metrics = [r for r in policy["ingress"] if {"protocol": "TCP", "port": 8002} in r["ports"]]
    assert [list(rule["from"][0]) for rule in metrics] == [["namespaceSelector"]]
    assert 8002 not in {p["port"] for p in manifests["Service", "chestct"]["spec"]["ports"]}


def test_every_probe_runs_the_probe_that_infers(manifests):
    (container,) = pod_of(manifests)["containers"]
    mapped = manifests["ConfigMap", "chestct-probe"]["data"]
    assert mapped == {"probe.py": PROBE.read_text()}
    for name, question in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        probe = container[f"{name}Probe"]
        assert probe["exec"]["command"] == ["python3", "/probe/probe.py", question]
        assert probe["timeoutSeconds"] > 10  # the probe's own limit, so that its reason is seen


def test_queue_time_that_the_autoscaler_asks_for_is_what_the_adapter_makes(manifests):
    (metric,) = manifests["HorizontalPodAutoscaler", "chestct"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((FOLDER / "adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_gpu_overlay_asks_for_one_gpu_and_keeps_its_plans():
    manifests = built("overlays/gpu")
    (container,) = pod_of(manifests)["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    assert mounts["/results"]["name"] == "models"
    kept = [mounts[path] for path in ("/var/lib/chestct", "/var/cache/chestct/tensorrt")]
    assert {mount["name"] for mount in kept} == {"tensorrt"}
    assert all(mount["subPathExpr"].startswith("$(NODE_NAME)/") for mount in kept)
    # A plan takes minutes: the start may take longer than on a CPU.
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 1800


def test_kserve_runtime_serves_what_the_service_asks_for():
    manifests = built("kserve")
    runtime = manifests["ServingRuntime", "chestct"]
    service = manifests["InferenceService", "chestct"]
    assert runtime["apiVersion"] == "serving.kserve.io/v1alpha1"
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert model["modelFormat"]["name"] in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    # What KServe copies into pods is a pod's; the rest of its own fields is known by name.
    pod = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod},
        VERSIONS[-1],
        strict=True,
    )
    assert set(runtime["spec"]) - set(pod) == {
        *("supportedModelFormats", "protocolVersions", "multiModel", "annotations"),
    }
    names = {(kind, one["metadata"]["name"]) for (kind, _), one in manifests.items()}
    (mapped,) = (v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v)
    assert ("ConfigMap", mapped) in names


def ask(question: str, port: int, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(PROBE), question],
        env={**os.environ, "CHESTCT_HTTP_PORT": str(port), **changes},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.server
def test_probe_infers_on_a_real_triton(triton):
    port = int(triton.http_url.rpartition(":")[2])
    for question in ("ready", "live"):
        done = ask(question, port)
        assert (done.returncode, done.stderr) == (0, "")
        missing = ask(question, port, CHESTCT_MODEL="another")
        assert missing.returncode == 1
        assert "another" in missing.stderr


@pytest.mark.server
def test_probe_finds_a_dead_backend_that_triton_calls_ready(model_repository, triton_environment):
    with serve(model_repository, triton_environment) as server:
        port = int(server.http_url.rpartition(":")[2])
        assert ask("ready", port).returncode == 0
        stubs = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and is_stub_of(entry, server.pid)
        ]
        assert stubs
        for stub in stubs:
            os.kill(stub, signal.SIGKILL)
        ready = requests.get(f"http://127.0.0.1:{port}/v2/models/chestct/ready", timeout=20)
        assert ready.status_code == 200
        for question in ("ready", "live"):
            done = ask(question, port)
            assert done.returncode == 1
            assert "500" in done.stderr


def is_stub_of(entry: Path, server: int) -> bool:
    try:
        parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        return (
            parent == server and b"triton_python_backend_stub" in (entry / "cmdline").read_bytes()
        )
    except OSError:
        return False


def test_probe_without_a_server_says_so():
    done = ask("live", 1)
    assert done.returncode == 1
    assert "no answer on port 1" in done.stderr


def test_a_busy_server_is_alive_and_not_ready():
    import http.server
    import threading

    class Busy(http.server.BaseHTTPRequestHandler):
        """Answers as Triton does when a queue is full."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(503, "Exceeds maximum queue size")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = server.server_address[1]
            assert [ask(q, port).returncode for q in ("live", "ready")] == [0, 1]
        finally:
            server.shutdown()
            thread.join(10)
