"""Results of `benchmarks latency` and `benchmarks throughput` as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.batch_limits import PLACES
from benchmarks.encoded import describe_encoded
from benchmarks.environment import describe_environment
from benchmarks.perf_analyzer import STABLE_WITHIN_PERCENT
from benchmarks.variants import SCORES, describe_interval
from training.common.markdown import table

Row = dict[str, Any]

# The columns of each table: head and format of its cells.
SCORE_COLUMNS = {"accuracy": "{accuracy}", "macro AUROC": "{macro_auroc}"}
SPEED_COLUMNS = {
    "engine": "{engine}",
    "variant": "{variant}",
    "n": "{n}",
    "p50 ms": "{p50_ms:.1f}",
    "p99 ms": "{p99_ms:.1f}",
    "scans/s": "{scans_per_s:.1f}",
    "against predict": "{times_faster_than_keras_predict:.2f} x",
    "against tf.function": "{times_faster_than_keras_compiled:.2f} x",
    **SCORE_COLUMNS,
}
PARTS_COLUMNS = {
    "protocol": "{engine}",
    "variant": "{variant}",
    "batch": "{batch}",
    "wire": "{parts_ms[wire]:.2f}",
    "queue": "{parts_ms[queue]:.2f}",
    "compute": "{parts_ms[compute]:.2f}",
    "Triton's share ms": "{share_ms}",
    "%": "{share_percent}",
}
FOOTPRINT_COLUMNS = {
    "engine": "{engine}",
    "variant": "{variant}",
    "model MB": "{model_mb:.1f}",
    "cold start s": "{cold_start_s:.2f}",
    "peak memory MB": "{peak_memory_mb:.0f}",
}
FILES_COLUMNS = {
    "way": "{way}",
    "scans/s": "{scans_per_s:.1f}",
    "against load + predict": "{times_faster_than_keras_predict:.1f} x",
    "against load + tf.function": "{times_faster_than_keras_compiled:.1f} x",
    **SCORE_COLUMNS,
}
LIMITS_COLUMNS = {
    "cores": "{place}",
    "variant": "{variant}",
    "decoding": "{decode:.1f}",
    "server": "{server:.1f}",
    "they allow": "{bound:.1f}",
    "both at once": "{both:.1f}",
    "part": "{part}",
}
LOAD_CELLS = {
    "scans/s (mean batch executed; cores that the client took)": (
        "{scans_per_s:.1f} ({mean_batch:.1f}; {client_cores:.1f})"
    ),
    "p50 / p99 in ms": "{p50_ms:.1f} / {p99_ms:.1f}",
}
LOOPS = {
    "keras_predict": "loop of load_scan and model.predict",
    "keras_compiled": "loop of load_scan and compiled tf.function",
}


def latency_report(result: dict[str, Any]) -> str:
    """Speed with accuracy, a table for each batch size; parts of a request; footprint."""
    rows = result["rows"]
    lines = [describe_environment(result["environment"]) + f" {result['method']}.", ""]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        lines += _titled(
            f"Batch {batch}, times of a request; accuracy on {result['scored_on']}, 95 % "
            "intervals:",
            SPEED_COLUMNS,
            (_scored(_with_engine(row)) for row in rows if row["batch"] == batch),
        )
    served = [_with_share(row) for row in rows if "wire" in row["parts_ms"]]
    if served:
        lines += _titled(
            "Parts of a request to Triton, medians in ms, and what Triton adds to the same engine "
            "in-process, paired by round, with 95 % interval:",
            PARTS_COLUMNS,
            served,
        )
    if "cold_start_s" in rows[0]:
        # The server stands there once, by gRPC.
        once = [row for row in rows if row["engine"] in (row["runs_on"], "triton_grpc")]
        lines += _titled(
            "Footprint: cold start is from starting the process to its first answer; peak memory "
            f"after a request of {max(row['batch'] for row in rows)} scans:",
            FOOTPRINT_COLUMNS,
            (_with_engine(row) for row in once if row["batch"] == rows[0]["batch"]),
        )
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
    return "\n".join([*lines, *_not_measured(result)]) + "\n"


def throughput_report(result: dict[str, Any]) -> str:
    """Files to JSON lines, against its limits, then layouts under load for each variant."""
    files = result["files"]
    ways = {**LOOPS, **{name: f"`chestct classify`, {name}" for name in result["served"]}}
    lines = [
        describe_environment(result["environment"]),
        "",
        *_titled(
            f"{files['num_files']} scans {result['files_method']}; accuracy on "
            f"{result['scored_on']}, 95 % intervals:",
            FILES_COLUMNS,
            (_scored(row | {"way": ways[row["way"]]}) for row in files["rows"]),
        ),
        *_titled(
            "`chestct classify` against what decoding alone and the server alone allow, scans/s; "
            + "; ".join(f"{place}: {text}" for place, text in PLACES.items())
            + ":",
            LIMITS_COLUMNS,
            (row | {"part": describe_interval(row["part"])} for row in result["limits"]),
        ),
        f"Under load: {result['method']}.",
        "",
    ]
    for variant, settings in result["served"].items():
        mine = [_scored(row) for row in result["rows"] if row["variant"] == variant]
        lines += _load_tables(f"{variant} by {settings['engine']}", mine)
    if result["perf_analyzer"]:
        head = ("model", "concurrency", "scans/s", "p50 ms", "p99 ms")
        lines += [
            "NVIDIA's perf_analyzer, whose load comes from C++, on the models as they are "
            f"published; latency and throughput of three windows lie within {STABLE_WITHIN_PERCENT}"
            " %:",
            "",
            *table(head, map(_perf_analyzer_cells, result["perf_analyzer"])),
            "",
        ]
    lines.append(f"The run took {result['minutes']} minutes.")
    return "\n".join([*lines, *_not_measured(result)]) + "\n"


def _titled(title: str, columns: Mapping[str, str], rows: Iterable[Row]) -> list[str]:
    cells = [[text.format_map(row) for text in columns.values()] for row in rows]
    return [title, "", *table(list(columns), cells), ""]


def _scored(row: Row) -> Row:
    return row | {key: describe_interval(row[key]) for key in SCORES}


def _with_engine(row: Row) -> Row:
    """The row with the engine inside Triton beside the protocol."""
    if row["engine"] == row["runs_on"]:
        return row
    return row | {"engine": f"{row['engine']} ({row['runs_on']})"}


def _with_share(row: Row) -> Row:
    shown = {"share_ms": "not measured", "share_percent": ""}
    for key, item in row.get("share_of_triton", {}).items():
        shown[f"share_{key}"] = f"{item['value']:.1f} ({item['low']:.1f} to {item['high']:.1f})"
    return row | shown


def _load_tables(name: str, rows: list[Row]) -> list[str]:
    """Two tables of a variant, a line for each concurrency and a column for each layout."""
    layouts = list(dict.fromkeys(map(_layout, rows)))
    cell = {(_layout(row), row["concurrency"]): row for row in rows}
    numbers = list(dict.fromkeys(row["concurrency"] for row in rows))
    scores = "accuracy {accuracy}, macro AUROC {macro_auroc}".format_map(rows[0])
    lines = []
    for title, text in LOAD_CELLS.items():
        cells = [(n, *(text.format_map(cell[each, n]) for each in layouts)) for n in numbers]
        lines += [f"{name}, {scores}; {title}:", "", *table(("concurrency", *layouts), cells), ""]
    alone = [row for row in rows if row["concurrency"] == min(numbers)]
    quickest = min(alone, key=lambda row: float(row["p50_ms"]))
    most = max(rows, key=lambda row: float(row["scans_per_s"]))
    return [
        *lines,
        f"Quickest answer: {_layout(quickest)}, {quickest['p50_ms']:.1f} ms. Most scans: "
        f"{_layout(most)} at concurrency {most['concurrency']}, {most['scans_per_s']:.1f} a "
        "second.",
        "",
    ]


def _layout(row: Row) -> str:
    batching = "batching" if row["dynamic_batching"] else "no batching"
    return f"{row['instances']}x{row['threads']}, {batching}"


def _perf_analyzer_cells(row: Row) -> list[Any]:
    figures = ("scans_per_s", "p50_ms", "p99_ms")
    shown = [f"{row[key]:.1f}" for key in figures] if row["stable"] else ["not stable", "", ""]
    return [row["model"], row["concurrency"], *shown]


def _not_measured(result: dict[str, Any]) -> list[str]:
    return [f"Not measured: {name}: {why}." for name, why in result["not_measured"].items()]
