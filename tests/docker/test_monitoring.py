"""A real Prometheus scrapes a real Triton and the real page; every expression is asked of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.ports import free_port
from tests.support.triton import serve

CHECKOUT = Path(__file__).parents[2]
MONITORING = CHECKOUT / "deploy" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/chestct.json").read_text())
NEEDS_PROMETHEUS = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="no Prometheus: apt install prometheus",
)
# What nothing here has: a GPU, and errors that nobody made.
MAY_BE_EMPTY = ("nv_gpu", "chestct_web_uploads_refused", 'status="error",kind="OutOfDomainError"')


def expressions() -> list[str]:
    targets = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [target["expr"] for target in targets]


def answer(url: str, timeout_s: float = 10) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return response.read()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            answer(url)
            return
        time.sleep(0.1)
    pytest.fail(f"{url} does not answer: {log.read_text()[-2000:]}")


@contextlib.contextmanager
def running(command: list[str], log: Path, url: str) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(url, process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@NEEDS_PROMETHEUS
@pytest.mark.parametrize("file", ["alerts_test.yml", "alerts_drift_test.yml"])
def test_alerts_fire_when_they_should(file):
    done = subprocess.run(
        ["promtool", "test", "rules", file],
        cwd=MONITORING, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_PROMETHEUS
def test_prometheus_config_is_valid():
    done = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"],
        cwd=MONITORING, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do():
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 7
    for rule in rules:
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_dashboard_has_what_was_promised_and_uses_the_provisioned_source():
    source = yaml.safe_load(
        (MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    everything = " ".join(expressions())
    for metric in (
        "nv_inference_request_success", "nv_inference_queue_duration_us",
        "nv_inference_compute_infer_duration_us", "nv_inference_request_failure",
        "nv_gpu_utilization", "chestct_web_scans_total", "chestct_web_scans_out_of_domain_total",
    ):  # fmt: skip
        assert metric in everything


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, triton_environment) -> Iterator[str]:
    """Address of a Prometheus that has scraped Triton and the page while they answered scans."""
    pytest.importorskip("fastapi", reason="the page needs the extra web")
    from docker_images_check import write_small_repository

    from training.data.phantom import make_phantom, write_png

    folder = tmp_path_factory.mktemp("monitoring")
    repository = write_small_repository(folder / "small")
    write_png(make_phantom("normal", 1), folder / "scan.png")
    (folder / "broken.png").write_bytes(b"no picture")
    page, own = free_port(), free_port()
    chestct = [sys.executable, "-c", "from chestct.cli.__main__ import entry_point; entry_point()"]
    with contextlib.ExitStack() as stack:
        triton = stack.enter_context(serve(repository, triton_environment))
        command = [*chestct, "web", "--port", str(page), "--url", triton.grpc_url]
        stack.enter_context(
            running(command, folder / "page.log", f"http://127.0.0.1:{page}/metrics")
        )
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        addresses = {
            "triton": urllib.parse.urlsplit(triton.metrics_url).netloc,
            "page": f"127.0.0.1:{page}",
            "prometheus": f"127.0.0.1:{own}",
        }
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [addresses[job["job_name"]]]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(MONITORING / "alerts.yml", folder)
        url = f"http://127.0.0.1:{own}"
        stack.enter_context(
            running(
                [
                    "prometheus", f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{own}",
                ],
                folder / "prometheus.log", f"{url}/-/ready",
            )
        )  # fmt: skip
        for _ in range(4):
            time.sleep(1.5)  # increases need scans between two scrapes
            post_scan(page, folder / "scan.png")
            post_scan(page, folder / "broken.png")
            with contextlib.suppress(urllib.error.HTTPError):
                answer(f"{triton.http_url}/v2/models/absent/infer")
        time.sleep(2.5)
        yield url


def post_scan(page: int, scan: Path) -> None:
    boundary = "phantom"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; '
        f'filename="{scan.name}"\r\n\r\n'
    ).encode()
    body += scan.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{page}/api/classify",
        body,
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()


def ask(prometheus: str, expression: str) -> list[dict]:
    for name, value in (("$__rate_interval", "10s"), ("$model", ".*")):
        expression = expression.replace(name, value)
    query = urllib.parse.urlencode({"query": expression})
    said = json.loads(answer(f"{prometheus}/api/v1/query?{query}"))
    assert said["status"] == "success", said
    return said["data"]["result"]


@NEEDS_PROMETHEUS
@pytest.mark.server
@pytest.mark.slow
@pytest.mark.xdist_group("monitoring")
class TestScraped:
    def test_all_targets_are_up(self, prometheus):
        targets = {row["metric"]["job"]: row["value"][1] for row in ask(prometheus, "up")}
        assert targets == {"triton": "1", "page": "1", "prometheus": "1"}

    @pytest.mark.parametrize("expression", expressions())
    def test_every_expression_of_the_dashboard_has_an_answer(self, prometheus, expression):
        rows = ask(prometheus, expression)
        assert rows or any(name in expression for name in MAY_BE_EMPTY), "no series"

    def test_label_mix_sums_to_one_and_errors_are_counted(self, prometheus):
        [mix] = [e for e in expressions() if "[1h]" in e and "by (kind)" in e]
        shares = [float(row["value"][1]) for row in ask(prometheus, mix)]
        assert sum(shares) == pytest.approx(1)
        [row] = ask(prometheus, 'chestct_web_scans_total{status="error"}')
        assert row["value"][1] == "4"

    def test_every_metric_that_an_alert_reads_is_there(self, prometheus):
        rules = json.loads(answer(f"{prometheus}/api/v1/rules"))["data"]["groups"]
        states = {
            rule["name"]: (rule["health"], rule["state"]) for g in rules for rule in g["rules"]
        }
        assert set(states) == {
            "TritonDown", "PageHasNoModel", "RequestsFail", "QueueIsLong", "GpuMemoryIsFull",
            "ScansAreOutOfDomain", "LabelMixDrifts",
        }  # fmt: skip
        assert {health for health, _ in states.values()} == {"ok"}
        assert states["TritonDown"][1] == states["PageHasNoModel"][1] == "inactive"
