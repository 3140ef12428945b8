"""Results of `benchmarks latency` and `benchmarks throughput` as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.batch_limits import describe_limits
from benchmarks.encoded import describe_encoded
from benchmarks.environment import describe_environment
from benchmarks.perf_analyzer import STABLE_WITHIN_PERCENT
from benchmarks.variants import SCORES, describe_interval
from training.common.markdown import table

LOOPS = {
    "keras_predict": "loop of load_scan and model.predict",
    "keras_compiled": "loop of load_scan and compiled tf.function",
}


def latency_report(result: dict[str, Any]) -> str:
    """Speed with accuracy, a table for each batch size; parts of a request; footprint."""
    rows = result["rows"]
    lines = [describe_environment(result["environment"]) + f" {result['method']}.", ""]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        lines += [*_speed_table(result, batch), ""]
    lines += _parts_table([row for row in rows if "wire" in row["parts_ms"]])
    if "cold_start_s" in rows[0]:
        lines += _footprint_table(rows)
    decode = ", ".join(
        f"{item['p50_ms']:.1f} ms for {kind} (n = {item['n']})"
        for kind, item in result["decode"].items()
    )
    lines.append(
        f"Decoding one file to a scan comes on top: {decode}. The run took {result['minutes']} "
        "minutes."
    )
    if result.get("encoded"):
        lines.append(describe_encoded(result["encoded"]))
    return _joined([*lines, *_not_measured(result)])


def _speed_table(result: dict[str, Any], batch: int) -> list[str]:
    head = (
        "engine", "variant", "n", "p50 ms", "p99 ms", "scans/s", "against predict",
        "against tf.function", "accuracy", "macro AUROC",
    )  # fmt: skip
    cells = [
        (
            _engine(row),
            row["variant"],
            row["n"],
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['scans_per_s']:.1f}",
            f"{row['times_faster_than_keras_predict']:.2f} x",
            f"{row['times_faster_than_keras_compiled']:.2f} x",
            *(describe_interval(row[key]) for key in SCORES),
        )
        for row in result["rows"]
        if row["batch"] == batch
    ]
    title = f"Batch {batch}, times of a request; accuracy on {result['scored_on']}, 95 % intervals:"
    return [title, "", *table(head, cells)]


def _engine(row: dict[str, Any]) -> str:
    """The engine of a row; for a protocol of Triton with the engine inside."""
    engine, inside = str(row["engine"]), row["runs_on"]
    return engine if engine == inside else f"{engine} ({inside})"


def _parts_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = (
        "protocol", "variant", "batch", "wire", "queue", "compute", "Triton's share ms", "%",
    )  # fmt: skip
    cells = []
    for row in rows:
        share, shown = row.get("share_of_triton"), ["not measured", ""]
        if share:
            shown = [
                f"{item['value']:.1f} ({item['low']:.1f} to {item['high']:.1f})"
                for item in (share["ms"], share["percent"])
            ]
        parts = (f"{row['parts_ms'][part]:.2f}" for part in ("wire", "queue", "compute"))
        cells.append((row["engine"], row["variant"], row["batch"], *parts, *shown))
    title = (
        "Parts of a request to Triton, medians in ms, and what Triton adds to the same engine "
        "in-process, paired by round, with 95 % interval:"
    )
    return [title, "", *table(head, cells), ""]


def _footprint_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each engine and variant; the server stands there once, by gRPC."""
    cells = [
        (
            _engine(row),
            row["variant"],
            f"{row['model_mb']:.1f}",
            f"{row['cold_start_s']:.2f}",
            f"{row['peak_memory_mb']:.0f}",
        )
        for row in rows
        if row["batch"] == rows[0]["batch"] and row["engine"] in (row["runs_on"], "triton_grpc")
    ]
    title = (
        "Footprint: cold start is from starting the process to its first answer; peak memory "
        f"after a request of {max(row['batch'] for row in rows)} scans:"
    )
    head = ("engine", "variant", "model MB", "cold start s", "peak memory MB")
    return [title, "", *table(head, cells), ""]


def throughput_report(result: dict[str, Any]) -> str:
    """Files to JSON lines, then layouts under load for each variant."""
    files = result["files"]
    head = (
        "way", "scans/s", "against load + predict", "against load + tf.function", "accuracy",
        "macro AUROC",
    )  # fmt: skip
    cells = [
        (
            LOOPS.get(row["way"], f"`chestct classify`, {row['way']}"),
            f"{row['scans_per_s']:.1f}",
            f"{row['times_faster_than_keras_predict']:.1f} x",
            f"{row['times_faster_than_keras_compiled']:.1f} x",
            *(describe_interval(row[key]) for key in SCORES),
        )
        for row in files["rows"]
    ]
    lines = [
        describe_environment(result["environment"]),
        "",
        f"{files['num_files']} scans {result['files_method']}; accuracy on {result['scored_on']}, "
        "95 % intervals:",
        "",
        *table(head, cells),
        *describe_limits(result["limits"]),
        "",
        f"Under load: {result['method']}.",
    ]
    for variant, settings in result["served"].items():
        lines += _load_tables(variant, settings, result["rows"])
    if result["perf_analyzer"]:
        lines += _perf_analyzer_table(result["perf_analyzer"])
    lines += ["", f"The run took {result['minutes']} minutes."]
    return _joined([*lines, *_not_measured(result)])


def _load_tables(variant: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Two tables of a variant, a line for each concurrency and a column for each layout."""
    mine = [row for row in rows if row["variant"] == variant]
    layouts = list(dict.fromkeys(_layout(row) for row in mine))
    cell = {(_layout(row), row["concurrency"]): row for row in mine}
    numbers = list(dict.fromkeys(row["concurrency"] for row in mine))
    accuracy, auroc = (describe_interval(mine[0][key]) for key in SCORES)
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "scans/s (mean batch executed; cores that the client took)": lambda row: (
            f"{row['scans_per_s']:.1f} ({row['mean_batch']:.1f}; {row['client_cores']:.1f})"
        ),
        "p50 / p99 in ms": lambda row: f"{row['p50_ms']:.1f} / {row['p99_ms']:.1f}",
    }
    lines = []
    for title, text in shown.items():
        lines += [
            "",
            f"{variant} by {settings['engine']}, accuracy {accuracy}, macro AUROC {auroc}; "
            f"{title}:",
            "",
            *table(
                ("concurrency", *layouts),
                [(n, *(text(cell[layout, n]) for layout in layouts)) for n in numbers],
            ),
        ]
    alone = [row for row in mine if row["concurrency"] == min(numbers)]
    quickest = min(alone, key=lambda row: float(row["p50_ms"]))
    most = max(mine, key=lambda row: float(row["scans_per_s"]))
    return [
        *lines,
        "",
        f"Quickest answer: {_layout(quickest)}, {quickest['p50_ms']:.1f} ms. Most scans: "
        f"{_layout(most)} at concurrency {most['concurrency']}, {most['scans_per_s']:.1f} a "
        "second.",
    ]


def _layout(row: dict[str, Any]) -> str:
    batching = "batching" if row["dynamic_batching"] else "no batching"
    return f"{row['instances']}x{row['threads']}, {batching}"


def _perf_analyzer_table(rows: list[dict[str, Any]]) -> list[str]:
    figures = ("scans_per_s", "p50_ms", "p99_ms")
    cells = [
        (
            row["model"],
            row["concurrency"],
            *([f"{row[key]:.1f}" for key in figures] if row["stable"] else ["not stable", "", ""]),
        )
        for row in rows
    ]
    title = (
        "NVIDIA's perf_analyzer, whose load comes from C++, on the models as they are published; "
        f"latency and throughput of three windows lie within {STABLE_WITHIN_PERCENT} %:"
    )
    head = ("model", "concurrency", "scans/s", "p50 ms", "p99 ms")
    return ["", title, "", *table(head, cells)]


def _not_measured(result: dict[str, Any]) -> list[str]:
    return [f"Not measured: {name}: {why}." for name, why in result["not_measured"].items()]


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
