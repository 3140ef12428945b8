"""Serve another version in a running Triton, tried beside the old one first, and go back.

The server runs under explicit model control on the same repository (`python -m serving local
--explicit`). A variant is loaded as `chestct_candidate`, where no client looks, and has to answer
a golden set over the wire before `chestct` is switched. Triton answers with the old version until
the new one is ready, so no request fails. The old version stays in the repository.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chestct.contract import MODEL_NAME, ModelMetadata
from chestct.inference.proxies import url_opener, url_proxy
from chestct.inference.server_pool import ServerPool
from chestct.inference.wires import TLSOptions
from export.check.parity import (
    ENGINES,
    Outputs,
    ParityConfig,
    Runner,
    Tolerance,
    check_parity,
    compare,
    run_all,
    triton_runner,
)
from export.convert.onnx import OnnxConfig, write_onnx
from export.publish.repository import (
    CANDIDATE,
    DECODE,
    ENCODED,
    ServeConfig,
    follow,
    parsed_config,
    promote,
    roll_back,
    serve,
    served_version,
    write_repository,
)
from training.common.atomic_io import sha256_of
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.data.dataset import ScanSet, evenly_spread, read_split
from training.track.registry import model_folder

logger = logging.getLogger(__name__)

ADMIN_KEY = "CHESTCT_ADMIN_KEY"  # environment variable; never an argument, which `ps` shows
RECORD = "rollouts.jsonl"
SETTLE_S = 30.0
# Engines other than ONNX Runtime's FP32 choose kernels by the number of threads.
LOOSE = Tolerance(
    probabilities=0.02, activation_map=0.05, domain_distance=0.05, label_agreement=0.97
)


@dataclass(frozen=True)
class RolloutConfig:
    """What `export rollout` is told.

    Attributes:
        repository: Triton's model repository, which the server reads too.
        scans: Folder of scans.
        split: Labelled scans, CSV of `training split`.
        golden: Its part that is the golden set.
        most_golden: At most so many of its scans, evenly spread.
        accuracy_drop: Most that the accuracy on the golden set may be lower than what is served.
        least_agreement: Least fraction of golden scans that get the label that is served now; a
            network trained anew may differ, one that answers at random may not pass.
        load_timeout_s: How long Triton may take to load and warm up a version.
        keep_versions: Versions that stay in the repository, the served one included.
    """

    repository: Path = Path("model_repository")
    scans: Path = Path("data/scans")
    split: Path = Path("results/split/split.csv")
    golden: str = "valid"
    most_golden: int = 64
    accuracy_drop: float = 0.02
    least_agreement: float = 0.8
    load_timeout_s: float = 600.0
    keep_versions: int = 2

    def __post_init__(self) -> None:
        """Refuse settings that judge nothing or leave nothing to go back to.

        Raises:
            ValueError: A number out of range.
        """
        if self.most_golden < 1 or self.load_timeout_s <= 0 or self.keep_versions < 2:
            raise ValueError(
                f"most_golden {self.most_golden}, load_timeout_s {self.load_timeout_s}, "
                f"keep_versions {self.keep_versions}: expected at least 1, more than 0, at least 2"
            )


class Server:
    """The admin API of a running Triton over HTTP, and sessions with its models."""

    def __init__(
        self, url: str, admin_key: str, tls: TLSOptions | None = None, timeout_s: float = 600.0
    ) -> None:
        """Nothing is sent yet.

        Raises:
            ValueError: Another address than http:// or https://, or no key.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url}: the admin API is spoken to over http:// or https://")
        if not admin_key:
            raise ValueError(f"no admin key; put the server's into the environment as {ADMIN_KEY}")
        self.url, self._key, self._tls, self._timeout_s = url.rstrip("/"), admin_key, tls, timeout_s
        self._context: ssl.SSLContext | None = None
        if url.startswith("https://"):
            self._context = ssl.create_default_context(cafile=tls.ca if tls else None)
            if tls and tls.cert:
                self._context.load_cert_chain(tls.cert, tls.key)

    def session(self, model: str = MODEL_NAME) -> ServerPool:
        """A session with a model, not connected yet."""
        return ServerPool(self.url, model, tls=self._tls, connect_timeout_s=SETTLE_S)

    def load(self, model: str) -> None:
        """Load what the repository says of a model, or replace what is loaded; waits for it.

        Raises:
            ValueError: Triton refuses; what it served before it goes on serving.
            OSError: The server does not answer.
        """
        self._post(f"/v2/repository/models/{model}/load", b"{}")

    def unload(self, model: str) -> None:
        """Unload a model; nothing happens where it is not loaded.

        Raises:
            ValueError: Triton refuses.
            OSError: The server does not answer.
        """
        self._post(f"/v2/repository/models/{model}/unload", b"{}")

    def ready(self) -> set[str]:
        """Names of the models that are ready.

        Raises:
            ValueError: Triton refuses.
            OSError: The server does not answer.
        """
        index = json.loads(self._post("/v2/repository/index", b"{}"))
        return {item["name"] for item in index if item.get("state") == "READY"}

    def _post(self, path: str, body: bytes) -> bytes:
        request = urllib.request.Request(
            self.url + path, body, {"admin-key": self._key, "Content-Type": "application/json"}
        )
        try:
            opener = url_opener(self.url, self._context)
            with opener.open(request, timeout=self._timeout_s) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")[:500]
            if error.code in (401, 403):
                text += f" (is {ADMIN_KEY} the key of this server?)"
            raise ValueError(f"{self.url}{path}: HTTP {error.code}: {text}") from error
        except OSError as error:
            proxy = url_proxy(self.url)
            if proxy is None:
                raise
            raise ConnectionError(f"{self.url}{path}: {error} ({proxy})") from error


def roll_out(config: RolloutConfig, server: Server, variant: str) -> dict[str, Any]:
    """Serve the published version of a variant as `chestct`; returns the record of it.

    Order: the stored parity report, loading beside the old version (Triton runs the warm-up
    batches), a real inference, parity over the wire with the file itself, the golden set against
    what is served, the switch, and the same answers again from `chestct`.

    Raises:
        ValueError: One of these fails; what was served is served.
        chestct.errors.ChestCTError: A scan cannot be read, or the server fails.
        OSError: The server does not answer, or the repository cannot be written.
    """
    source = config.repository / f"{MODEL_NAME}_{variant}"
    _require_parity(source)
    scans = _golden_set(config, source)
    with server.session() as session:
        before = {"version": session.model_version, **_about(session.metadata)}
        old = run_all("served", triton_runner(session), scans.pixels)
        old_labels = session.metadata.class_names
    try:
        promote(config.repository, variant, config.keep_versions, name=CANDIDATE)
        server.load(CANDIDATE)
        with server.session(CANDIDATE) as session:
            latency_ms = session.health().latency_ms
            facts = session.metadata
            new = run_all("candidate", triton_runner(session), scans.pixels)
            _require_same_file(source, triton_runner(session), scans)
        figures = _judge(config, scans, (old_labels, old), (facts.class_names, new))
        logger.info("golden set: %s", json.dumps(figures))
        version = _switch(
            config, server, lambda: promote(config.repository, variant, config.keep_versions)
        )
        _require_switched(config, server, version, scans, new)
    finally:
        _discard_candidate(config, server)
    record = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "before": before,
        "after": {"version": str(version), **_about(facts)},
        "onnx_sha256": _sha256(config.repository / MODEL_NAME / str(version)),
        "golden": figures,
        "first_answer_ms": round(latency_ms, 1),
    }
    with (config.repository / MODEL_NAME / RECORD).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def undo(config: RolloutConfig, server: Server) -> int:
    """Serve the version before again; returns its number.

    Raises:
        ValueError: There is none, or Triton refuses it; what was served is served.
        OSError: The server does not answer, or the repository cannot be written.
    """
    version = _switch(config, server, lambda: roll_back(config.repository / MODEL_NAME))
    _require_version(server, version)
    return version


def status(server: Server) -> dict[str, Any]:
    """What the server says of the model that it serves: version, run, data hash, commit.

    Raises:
        chestct.errors.ChestCTError: The server fails or does not keep the contract.
    """
    with server.session() as session:
        return {"model": MODEL_NAME, "version": session.model_version, **_about(session.metadata)}


def publish_champion(serve_config: ServeConfig, config: RolloutConfig, model: str) -> str:
    """Export a model of MLflow and publish it as the variant `fp32`, if parity holds.

    Args:
        serve_config: How variants are served.
        config: The scans that parity is judged on.
        model: `models:/chestct@champion` and the like.

    Returns:
        The name of the variant.

    Raises:
        ValueError: The address names nothing, or parity fails.
        OSError: Files cannot be fetched or written.
    """
    folder = Path("results/rollout") / model_folder(model).name
    write_onnx(OnnxConfig(model=model, output=folder / "model.onnx"))
    engine = (
        serve_config.models()["fp32"].engine if "fp32" in serve_config.variants else "onnxruntime"
    )
    verdict = check_parity(
        ParityConfig(variant=folder, engines=(engine,), model=model, scans=config.scans)
    )
    logger.info("%s", verdict.in_words())
    published = dataclasses.replace(
        serve_config,
        variants={"fp32": {"folder": str(folder), "engine": engine}},
        promoted="fp32",
        repository=config.repository,
        card=None,  # the card that lies here is of the last run of the pipeline
    )
    write_repository(published.models()["fp32"])
    return "fp32"


def _about(facts: ModelMetadata) -> dict[str, str]:
    return {
        "run": facts.run,
        "data_hash": facts.data_hash,
        "git_commit": facts.git_commit or "unknown",
        "precision": facts.precision,
    }


def _version_folder(source: Path) -> Path:
    version = served_version(source)
    if version is None:
        raise ValueError(f"{source}: no such model; run python -m export repository")
    return source / str(version)


def _sha256(folder: Path) -> str:
    file = folder / "model.onnx"
    return sha256_of(file) if file.is_file() else ""


def _require_parity(source: Path) -> None:
    folder = _version_folder(source)
    try:
        parity = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable parity.json; publish the variant again") from error
    if parity.get("holds") is not True:
        raise ValueError(f"{folder}: parity does not hold; nothing is loaded")
    sha256 = _sha256(folder)
    if sha256 and parity.get("onnx_sha256") != sha256:
        raise ValueError(f"{folder}: parity.json is about another model.onnx; nothing is loaded")


def _golden_set(config: RolloutConfig, source: Path) -> ScanSet:
    message = parsed_config((source / "config.pbtxt").read_text(encoding="utf-8"))
    own = {key: value.string_value for key, value in message.parameters.items()}
    window = ModelMetadata.from_parameters(own).window
    sets = read_split(config.scans, config.split, window)
    if config.golden not in sets or not len(sets[config.golden]):
        raise ValueError(f"golden is {config.golden!r}; expected a split with scans: {list(sets)}")
    scans = sets[config.golden]
    chosen = evenly_spread(len(scans), config.most_golden)
    return ScanSet(
        scans.pixels[chosen],
        scans.labels[chosen],
        scans.groups[chosen],
        tuple(scans.paths[index] for index in chosen),
        scans.names,
    )


def _require_same_file(source: Path, candidate: Runner, scans: ScanSet) -> None:
    """Hold what the server answers to what the file itself answers here."""
    folder = _version_folder(source)
    message = parsed_config((folder / "config.pbtxt").read_text(encoding="utf-8"))
    accelerators = message.optimization.execution_accelerators.cpu_execution_accelerator
    engine = "openvino" if any(item.name == "openvino" for item in accelerators) else "onnxruntime"
    exact = engine == "onnxruntime" and message.parameters["precision"].string_value == "fp32"
    report = compare(
        scans.pixels,
        (engine, ENGINES[engine](folder / "model.onnx")),
        (f"triton {CANDIDATE}", candidate),
        Tolerance() if exact else LOOSE,
    )
    logger.info("%s", report.in_words())
    if not report:
        raise ValueError(f"nothing is switched: {report.in_words()}")


def _judge(
    config: RolloutConfig,
    scans: ScanSet,
    served: tuple[tuple[str, ...], Outputs],
    candidate: tuple[tuple[str, ...], Outputs],
) -> dict[str, Any]:
    """Accuracy of both on the golden set, and how often they agree.

    Raises:
        ValueError: The candidate is worse than allowed.
    """
    truth = [scans.names[label] for label in scans.labels]
    named = [
        [labels[index] for index in outputs["probabilities"].argmax(axis=1)]
        for labels, outputs in (served, candidate)
    ]
    before, after = (float(np.mean([a == b for a, b in zip(n, truth, strict=True)])) for n in named)
    agreement = float(np.mean([a == b for a, b in zip(*named, strict=True)]))
    figures = {
        "num_scans": len(truth),
        "accuracy_before": round(before, 4),
        "accuracy_after": round(after, 4),
        "label_agreement": round(agreement, 4),
    }
    reasons = []
    if before - after > config.accuracy_drop:
        reasons.append(
            f"accuracy {after:.4f} instead of {before:.4f}, may fall by {config.accuracy_drop}"
        )
    if agreement < config.least_agreement:
        reasons.append(f"same label {agreement:.4f}, expected at least {config.least_agreement}")
    if reasons:
        raise ValueError(
            f"nothing is switched: the golden set fails on {len(truth)} scans: {'; '.join(reasons)}"
        )
    return figures


def _switch(config: RolloutConfig, server: Server, change: Callable[[], int]) -> int:
    """Change the repository, let the server follow, and undo both where it cannot."""
    folder = config.repository / MODEL_NAME
    old = served_version(folder)
    version = change()
    try:
        _load_all(config, server)
    except (ValueError, OSError):
        if old is not None and old != version:
            serve(folder, old)
            follow(config.repository, config.keep_versions)
            _load_all(config, server)
        raise
    return version


def _load_all(config: RolloutConfig, server: Server) -> None:
    with_encoded = ENCODED in server.ready()
    server.load(MODEL_NAME)
    if with_encoded:
        for model in (DECODE, ENCODED):
            server.load(model)


def _require_switched(
    config: RolloutConfig, server: Server, version: int, scans: ScanSet, expected: Outputs
) -> None:
    try:
        _require_version(server, version)
        with server.session() as session:
            got = run_all("switched", triton_runner(session), scans.pixels)
        if not np.allclose(got["probabilities"], expected["probabilities"], atol=1e-3):
            raise ValueError("the version that was switched to answers otherwise than it was tried")
    except Exception:
        logger.warning("rolling back: version %d does not answer as it should", version)
        undo(config, server)
        raise


def _require_version(server: Server, version: int) -> None:
    deadline = time.monotonic() + SETTLE_S
    while (found := status(server)["version"]) != str(version):
        if time.monotonic() > deadline:
            raise ValueError(f"the server serves version {found}, expected {version}")
        time.sleep(0.1)
    logger.info("%s serves version %d of %s", server.url, version, MODEL_NAME)


def _discard_candidate(config: RolloutConfig, server: Server) -> None:
    folder = config.repository / CANDIDATE
    if folder.exists():
        try:
            server.unload(CANDIDATE)
        except (ValueError, OSError) as error:
            logger.warning("%s is not unloaded: %s", CANDIDATE, error)
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Serve another version in a running Triton, or the one before again; results on stdout."""
    parser = command_parser("export rollout", main.__doc__, "configs/rollout.yaml")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--variant", help="roll out this published variant")
    what.add_argument(
        "--champion",
        nargs="?",
        const=f"models:/{MODEL_NAME}@champion",
        metavar="MODEL",
        help="export this model of MLflow, without a value the champion, and roll it out",
    )
    what.add_argument("--roll-back", action="store_true", help="serve the version before again")
    what.add_argument("--status", action="store_true", help="what is served, and where it is from")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="http:// or https://")
    parser.add_argument("--serve-config", type=Path, default=Path("configs/serve.yaml"))
    for name, text in (
        ("ca", "authorities to trust"),
        ("cert", "own certificate"),
        ("key", "its key"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(RolloutConfig, arguments.config)
        given = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
        tls = TLSOptions(*given) if any(given) else None
        key = os.environ.get(ADMIN_KEY, "")
        server = Server(arguments.url, key, tls, config.load_timeout_s)
        if arguments.roll_back:
            undo(config, server)
        elif not arguments.status:
            variant = arguments.variant
            if arguments.champion:
                serve_config = load_config(ServeConfig, arguments.serve_config)
                variant = publish_champion(serve_config, config, arguments.champion)
            roll_out(config, server, variant)
        sys.stdout.write(json.dumps(status(server)) + "\n")

    return run_command(work, interrupted="interrupted: chestct serves what it served")
