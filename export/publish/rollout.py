"""Roll out another version in a running Triton, or roll back.

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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from chestct.contract import MODEL_NAME, ModelMetadata
from chestct.inference.wires import TLSOptions
from export.check.parity import ParityConfig, Tolerance, check_parity, compare
from export.check.runners import ENGINES, Outputs, Runner, run_all, triton_runner
from export.convert.onnx import OnnxConfig, write_onnx
from export.publish.admin import ADMIN_KEY, SETTLE_S, TritonAdmin
from export.publish.config_pbtxt import engine_of, facts_of_config
from export.publish.repository import (
    promote,
    roll_back,
    sync_encoded_ensemble,
    write_repository,
)
from export.publish.settings import CANDIDATE, DECODE, ENCODED, ServeConfig, VariantConfig
from export.publish.versions import served_config, served_version, set_served_version
from training.common.atomic_io import sha256_of
from training.common.cli import command_parser, run_command
from training.common.config import config_class, load_config
from training.data.dataset import ScanSet, evenly_spread, read_split
from training.track.registry import model_folder

logger = logging.getLogger(__name__)

RECORD = "rollouts.jsonl"
# Engines other than ONNX Runtime's FP32 choose kernels by the number of threads.
LOOSE = Tolerance(
    probabilities=0.02, activation_map=0.05, domain_distance=0.05, label_agreement=0.97
)


@config_class
class RolloutConfig:
    """Settings of `export rollout`.

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
    golden: Literal["train", "valid", "test"] = "valid"
    most_golden: PositiveInt = 64
    accuracy_drop: float = 0.02
    least_agreement: float = 0.8
    load_timeout_s: PositiveFloat = 600.0
    keep_versions: Annotated[int, Field(ge=2)] = 2


def roll_out(config: RolloutConfig, server: TritonAdmin, variant: str) -> dict[str, Any]:
    """Serve the published version of a variant as `chestct`; returns the record of it.

    Order: the stored parity report, loading beside the old version (Triton runs the warm-up
    batches), a real inference, parity over the wire with the file itself, the golden set against
    the served version, the switch, and the same answers again from `chestct`.

    Raises:
        ValueError: One of these fails; the version served before is served.
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


def undo(config: RolloutConfig, server: TritonAdmin) -> int:
    """Serve the version before again; returns its number.

    Raises:
        ValueError: There is none, or Triton refuses it; the version served before is served.
        OSError: The server does not answer, or the repository cannot be written.
    """
    version = _switch(config, server, lambda: roll_back(config.repository / MODEL_NAME))
    _require_version(server, version)
    return version


def status(server: TritonAdmin) -> dict[str, Any]:
    """The served model: version, training run, data hash, commit.

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
    models = serve_config.models()
    engine = models["fp32"].engine if "fp32" in models else "onnxruntime"
    verdict = check_parity(
        ParityConfig(variant=folder, engines=(engine,), model=model, scans=config.scans)
    )
    logger.info("%s", verdict.describe())
    published = dataclasses.replace(
        serve_config,
        variants={"fp32": VariantConfig(folder, engine)},
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
    window = facts_of_config(served_config(source)).window
    sets = read_split(config.scans, config.split, window)
    if config.golden not in sets or not len(sets[config.golden]):
        raise ValueError(f"golden is {config.golden!r}; expected a split with scans: {list(sets)}")
    scans = sets[config.golden]
    keep = np.zeros(len(scans), bool)
    keep[evenly_spread(len(scans), config.most_golden)] = True
    return scans.where(keep)


def _require_same_file(source: Path, candidate: Runner, scans: ScanSet) -> None:
    """Require that the server answers as the file itself does in this process."""
    folder = _version_folder(source)
    message = served_config(folder)
    engine = "openvino" if engine_of(message) == "openvino" else "onnxruntime"
    exact = engine == "onnxruntime" and message.parameters["precision"].string_value == "fp32"
    report = compare(
        scans.pixels,
        (engine, ENGINES[engine](folder / "model.onnx")),
        (f"triton {CANDIDATE}", candidate),
        Tolerance() if exact else LOOSE,
    )
    logger.info("%s", report.describe())
    if not report:
        raise ValueError(f"nothing is switched: {report.describe()}")


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


def _switch(config: RolloutConfig, server: TritonAdmin, change: Callable[[], int]) -> int:
    """Change the repository, let the server follow, and undo both where it cannot."""
    folder = config.repository / MODEL_NAME
    old = served_version(folder)
    version = change()
    try:
        _load_all(config, server)
    except (ValueError, OSError):
        if old is not None and old != version:
            set_served_version(folder, old)
            sync_encoded_ensemble(config.repository, config.keep_versions)
            _load_all(config, server)
        raise
    return version


def _load_all(config: RolloutConfig, server: TritonAdmin) -> None:
    with_encoded = ENCODED in server.ready()
    server.load(MODEL_NAME)
    if with_encoded:
        for model in (DECODE, ENCODED):
            server.load(model)


def _require_switched(
    config: RolloutConfig, server: TritonAdmin, version: int, scans: ScanSet, expected: Outputs
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


def _require_version(server: TritonAdmin, version: int) -> None:
    deadline = time.monotonic() + SETTLE_S
    while (found := status(server)["version"]) != str(version):
        if time.monotonic() > deadline:
            raise ValueError(f"the server serves version {found}, expected {version}")
        time.sleep(0.1)
    logger.info("%s serves version %d of %s", server.url, version, MODEL_NAME)


def _discard_candidate(config: RolloutConfig, server: TritonAdmin) -> None:
    folder = config.repository / CANDIDATE
    if folder.exists():
        try:
            server.unload(CANDIDATE)
        except (ValueError, OSError) as error:
            logger.warning("%s is not unloaded: %s", CANDIDATE, error)
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Serve another version in a running Triton, or the version before; results on stdout."""
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
    what.add_argument(
        "--status", action="store_true", help="show the served version and its training run"
    )
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
        server = TritonAdmin(arguments.url, key, tls, config.load_timeout_s)
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
