"""After the pipeline: serve, classify a directory over gRPC and HTTP, say what was done."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from chestct.client import ScanClient
from chestct.contract import NOT_A_MEDICAL_DEVICE
from chestct.errors import ChestCTError
from chestct.scan import load_scan
from export.parity import Tolerance, compare, keras_runner, triton_runner
from serving.local import LocalTriton, LocalTritonError
from training.files import write_json
from training.model import load_trained

logger = logging.getLogger(__name__)


def classify(url: str, scans: Path) -> list[dict[str, Any]]:
    """The lines that `chestct classify --json` prints for a folder.

    Raises:
        ValueError: The command failed or a scan could not be read.
    """
    chestct = str(Path(sys.executable).with_name("chestct"))
    command = [chestct, "classify", str(scans), "--url", url, "--json"]
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


def run(scans: Path, output: Path) -> str:
    """Serve the repository, classify `scans` over gRPC and HTTP, compare with Keras.

    Args:
        scans: Folder of test scans, `CLASS/*`.
        output: Folder for the JSON lines and the parity report.

    Returns:
        What was done, in plain words.

    Raises:
        ValueError: Nothing trained, or the answers of server and Keras differ.
    """
    model, _ = load_trained(Path("results/train"))
    with LocalTriton(Path("model_repository")) as server:
        logger.info("Triton answers at %s and %s", server.grpc_url, server.http_url)
        over_grpc = classify(server.grpc_url, scans)
        over_http = classify(server.http_url, scans)
        readable = [line for line in over_grpc if line["status"] == "ok"]
        pixels = np.stack([load_scan(Path(line["path"])) for line in readable])
        with ScanClient(server.grpc_url) as client:
            report = compare(
                pixels,
                ("keras", keras_runner(model)),
                ("triton over gRPC", triton_runner(client)),
                Tolerance(),
            )
    output.mkdir(parents=True, exist_ok=True)
    (output / "classified.jsonl").write_text("".join(json.dumps(x) + "\n" for x in over_grpc))
    write_json(output / "parity.json", report.to_json())
    if not report:
        raise ValueError(report.in_words())
    right = sum(line["label"] == Path(line["path"]).parent.name for line in readable)
    outside = sum(not line["in_domain"] for line in readable)
    labels = ", ".join(f"{n} {name}" for name, n in Counter(x["label"] for x in readable).items())
    protocols = json.loads(Path("results/evaluate/scores.json").read_text())
    scores = "; ".join(
        f"{name}: accuracy {values['accuracy']} (always the commonest class: "
        f"{values['majority_accuracy']}), macro AUROC {values.get('macro_auroc', '-')}, "
        f"n = {values['n']}"
        for name, values in protocols.items()
    )
    latency = Path("results/benchmark/latency.md").read_text()
    return "\n".join(
        [
            "",
            latency,
            f"Trained:    VGG-16 on {json.loads(Path('data/ingest.json').read_text())['source']}; "
            f"scores on the test split, {scores}.",
            f"Served:     by a real Triton; {report.in_words()}.",
            f"Classified: {len(readable)} scans of {scans} ({labels}), {right} as their folder "
            f"says, {outside} out of domain, {len(over_grpc) - len(readable)} unreadable; gRPC and "
            f"HTTP differ by at most {largest_difference(over_grpc, over_http):.0e}.",
            f"Written:    {output / 'classified.jsonl'}, results/evaluate/report.md, "
            "results/benchmark/latency.json.",
            NOT_A_MEDICAL_DEVICE,
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Serve what the pipeline has published and show that it works."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=main.__doc__)
    parser.add_argument("--scans", type=Path, default=Path("data/scans/test"))
    parser.add_argument("--output", type=Path, default=Path("results/demo"))
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        sys.stdout.write(run(arguments.scans, arguments.output))
    except (ValueError, OSError, ChestCTError, LocalTritonError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
