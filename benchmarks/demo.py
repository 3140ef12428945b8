"""Demo: run the pipeline on phantoms, serve the model, classify a directory."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.environment import describe_environment
from benchmarks.variants import describe_interval
from chestct.client import ScanClient
from chestct.contract import MODEL_NAME, NOT_A_MEDICAL_DEVICE
from export.check.parity import ParityReport, Tolerance, compare
from export.check.runners import Outputs, Runner, keras_runner, triton_runner
from serving.local import LocalTriton, LocalTritonError
from training.common.atomic_io import replaced, write_json
from training.common.cli import run_command
from training.common.config import read_overrides
from training.data.dataset import evenly_spread, load_pixels
from training.network.vgg16 import load_trained
from training.pipeline import (
    Screen,
    StageFailedError,
    only_run,
    reproduce,
    run_step,
    stage_descriptions,
)

logger = logging.getLogger(__name__)

EXACT = f"{MODEL_NAME}_fp32"
COMPARED = 8  # scans that Keras answers too, evenly spread
LATENCY = Path("results/benchmark/latency.json")
NEXT = """Written:    results/demo/classified.jsonl    one line a scan
            results/evaluate/report.md        scores with intervals and baselines
            results/card/model_card.html      model card, beside it the data card
            results/benchmark/latency.md      latency, batch sizes, parts of a request
            results/logs/                     what each stage printed
Next:       make serve                        Triton on what was published
            .venv/bin/chestct web             a page on it, in a second terminal
            make pipeline DATA=/path/to/scans your scans with the full settings
"""
# The promoted variant may be allowed to differ: its gate was kept before it was published.
ANY = Tolerance(1.0, 1e9, 1e9, label_agreement=0.0)


def classify(url: str, scans: Path) -> list[dict[str, Any]]:
    """The lines that `chestct classify --json` prints for a folder.

    Raises:
        ValueError: The command failed or a scan could not be read.
    """
    chestct = str(Path(sys.executable).with_name("chestct"))
    command = [chestct, "classify", str(scans), "--url", url, "--json", "--no-series"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1800)
    if done.returncode not in (0, 1):
        raise ValueError(f"chestct classify exited with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest difference between two classifications' probabilities of the same scans.

    Raises:
        ValueError: They do not hold the same scans.
    """
    first, second = ({line["path"]: line for line in lines} for lines in (one, other))
    if first.keys() != second.keys() or not first:
        raise ValueError("the two classifications hold different scans, or none")
    return max(
        (
            abs(p - second[path]["probabilities"][label])
            for path, line in first.items()
            if line["status"] == "ok"
            for label, p in line["probabilities"].items()
        ),
        default=float("nan"),
    )


@dataclass(frozen=True)
class Served:
    """Answers that clients got for one folder, and their distance from Keras.

    Attributes:
        over_grpc: JSON lines of the model `chestct`.
        over_http: The same over HTTP.
        precision: Of `chestct`.
        exact: The FP32 model against Keras, None where the server has none.
        promoted: `chestct` against Keras; without a limit unless it is FP32 too.
        labels: Class names.
    """

    over_grpc: list[dict[str, Any]]
    over_http: list[dict[str, Any]]
    precision: str
    exact: ParityReport | None
    promoted: ParityReport
    labels: tuple[str, ...]


def remembered(runner: Runner) -> Runner:
    """The same runner, which computes each batch only once."""
    answers: dict[bytes, Outputs] = {}

    def infer(scans: npt.NDArray[np.uint8]) -> Outputs:
        key = scans.tobytes()
        if key not in answers:
            answers[key] = runner(scans)
        return answers[key]

    return infer


def serve_and_classify(scans: Path) -> Served:
    """Start Triton on the published model and classify `scans` by both protocols.

    Raises:
        ValueError: Nothing is trained, or the client failed.
        serving.local.LocalTritonError: Triton does not start.
    """
    model, facts = load_trained(Path("results/train"))
    with LocalTriton(Path("model_repository")) as server:
        logger.info("Triton answers at %s and %s", server.grpc_url, server.http_url)
        over_grpc = classify(server.grpc_url, scans)
        over_http = classify(server.http_url, scans)
        paths = [Path(line["path"]) for line in over_grpc if line["status"] == "ok"]
        chosen = [paths[index] for index in evenly_spread(len(paths), COMPARED)]
        pixels = load_pixels(chosen, "decode for Keras", facts.window)
        reference = ("keras", remembered(keras_runner(model)))
        with ScanClient(server.grpc_url) as client:
            precision = client.metadata.precision
            name = f"triton {MODEL_NAME} over gRPC"
            limits = Tolerance() if precision == "fp32" else ANY
            promoted = compare(pixels, reference, (name, triton_runner(client)), limits)
        exact = None
        if EXACT in dict(server.models()):
            with ScanClient(server.grpc_url, EXACT) as client:
                name = f"triton {EXACT} over gRPC"
                exact = compare(pixels, reference, (name, triton_runner(client)), Tolerance())
    return Served(over_grpc, over_http, precision, exact, promoted, facts.class_names)


def describe_served(served: Served, scans: Path) -> list[str]:
    """The served model and the classified scans, a sentence each."""
    readable = [line for line in served.over_grpc if line["status"] == "ok"]
    folders = [Path(line["path"]).parent.name for line in readable]
    right = sum(line["label"] == folder for line, folder in zip(readable, folders, strict=True))
    known = sum(folder in served.labels for folder in folders)
    outside = sum(not line["in_domain"] for line in readable)
    counts = Counter(line["label"] for line in readable)
    labels = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    broken = len(served.over_grpc) - len(readable)
    difference = largest_difference(served.over_grpc, served.over_http)
    promoted = served.promoted
    error = next(item for item in promoted.errors if item.output == "probabilities")
    exact = "no FP32 model is served" if served.exact is None else served.exact.describe()
    return [
        f"Served:     by a real Triton; {exact}.",
        f"Promoted:   {MODEL_NAME} is {served.precision}; it gives Keras' label to "
        f"{promoted.label_agreement:.1%} of {promoted.num_scans} scans, its probabilities differ "
        f"by {error.mean:.1e} on average and {error.max:.1e} at most.",
        f"Classified: {len(readable)} scans of {scans}: {labels}; {right} of {known} as their "
        f"folder says; {outside} out of domain; {broken} unreadable.",
        f"Protocols:  gRPC and HTTP differ by at most {difference:.0e}.",
    ]


def short_table(latency: dict[str, Any]) -> list[str]:
    """The latency of one scan a request, every engine and variant beside both Keras baselines."""
    rows = [row for row in latency["rows"] if row["batch"] == 1]
    texts = [("engine", "variant", "p50 ms", "x predict", "x tf.function", "accuracy")] + [
        (
            row["engine"],
            row["variant"],
            f"{row['p50_ms']:.1f}",
            f"{row['times_faster_than_keras_predict']:.2f} x",
            f"{row['times_faster_than_keras_compiled']:.2f} x",
            describe_interval(row["accuracy"]),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    left = (0, 1, 5)
    return [
        "  ".join(
            f"{text:{'<' if column in left else '>'}{width}}"
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in texts
    ]


def describe_pipeline() -> list[str]:
    """Results of the pipeline: scores, a sentence each, and the latency table."""
    source = json.loads(Path("data/ingest.json").read_text())["source"]
    latency = json.loads(LATENCY.read_text())
    lines = []
    for name, values in json.loads(Path("results/evaluate/scores.json").read_text()).items():
        lines.append(
            f"Trained:    VGG-16 on {source}; {name} test split, n = {values['n']}: accuracy "
            f"{values['accuracy']} (the commonest class alone: {values['majority_accuracy']}), "
            f"macro AUROC {values.get('macro_auroc', 'undefined')}."
        )
    for point in json.loads(Path("results/compressed/curve.json").read_text())["points"]:
        if point["name"] != "full":
            refused = "; ".join(point["valid"]["refused_for"])
            said = (
                f"refused by its gate and not published: {refused}"
                if refused
                else "within its gate"
            )
            lines.append(f"Compressed: student {point['name']} is {said}.")
    place = describe_environment(latency["environment"])
    return ["Latency:    one scan a request; " + place, "", *short_table(latency), "", *lines]


def serve(scans: Path, output: Path) -> str:
    """Serve, classify `scans`, write lines and parity report into `output`; returns the summary.

    Raises:
        ValueError: Nothing is trained, or an FP32 model and Keras differ.
        serving.local.LocalTritonError: Triton does not start.
        OSError: The output cannot be written.
    """
    served = serve_and_classify(scans)
    lines = output / "classified.jsonl"
    with replaced(lines) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in served.over_grpc))
    reports = {MODEL_NAME: served.promoted}
    if served.exact is not None:
        reports[EXACT] = served.exact
    write_json(output / "parity.json", {name: item.to_json() for name, item in reports.items()})
    for report in reports.values():
        if not report:
            raise ValueError(report.describe())
    said = [*describe_pipeline(), *describe_served(served, scans)]
    return "\n".join(said) + "\n"


def measure_latency(screen: Screen, record: Path) -> None:
    """Run `benchmarks latency` unless this very model was measured with these very settings.

    Args:
        screen: Gets the line of this step.
        record: Where the hash of what was measured is kept.

    Raises:
        training.pipeline.StageFailedError: The benchmark failed.
    """
    config, overrides = Path("configs/latency.yaml"), Path("data/overrides.yaml")
    digest = hashlib.sha256(json.dumps(read_overrides(overrides).get("latency", {})).encode())
    for file in (config, Path("model_repository") / MODEL_NAME / "config.pbtxt"):
        digest.update(file.read_bytes())
    measured = {"sha256": digest.hexdigest()}
    name, what = "benchmark", "Measure latency against Keras"
    if record.is_file() and json.loads(record.read_text()) == measured and LATENCY.is_file():
        screen.begin(name, what)
        screen.end("unchanged")
        return
    command = [sys.executable, "-m", "benchmarks", "latency", "--config", str(config)]
    command += ["--overrides", str(overrides), "--output", str(LATENCY)]
    run_step(screen, name, what, command)
    write_json(record, measured)


def whole(scans: Path, output: Path) -> str:
    """Run the pipeline, then `serve` as one more stage on the screen; returns the summary.

    Raises:
        training.pipeline.StageFailedError: A stage failed.
    """
    screen = Screen(len(stage_descriptions()) + 2)
    with only_run(screen):
        return _whole(screen, scans, output)


def _whole(screen: Screen, scans: Path, output: Path) -> str:
    reproduce(screen)
    measure_latency(screen, output / "measured.json")
    summary = output / "summary.txt"
    command = [sys.executable, "-m", "benchmarks", "demo", "--serve-only", "--scans", str(scans)]
    command += ["--output", str(output)]
    run_step(screen, "serve", "Serve and classify a directory", command)
    return f"\n{summary.read_text()}{NEXT}{NOT_A_MEDICAL_DEVICE}\n"


def main(argv: list[str] | None = None) -> int:
    """Run the pipeline, serve what it published, classify a directory, and sum it up."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=main.__doc__)
    parser.add_argument("--scans", type=Path, default=Path("data/scans/test"))
    parser.add_argument("--output", type=Path, default=Path("results/demo"))
    parser.add_argument(
        "--serve-only", action="store_true", help="serve what is published; no pipeline before it"
    )
    arguments = parser.parse_args(argv)

    def work() -> None:
        if arguments.serve_only:
            summary = serve(arguments.scans, arguments.output)
            with replaced(arguments.output / "summary.txt") as temporary:
                temporary.write_text(summary, encoding="utf-8")
        else:
            summary = whole(arguments.scans, arguments.output)
        sys.stdout.write(summary)

    return run_command(
        work,
        errors=(LocalTritonError, StageFailedError, subprocess.TimeoutExpired),
        interrupted="interrupted: finished stages are kept; the same command goes on",
    )
