"""The findings of `training audit` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.common.markdown import code, plain, table

MOST_LISTED = 20  # groups written out in the report; audit.json has all of them


def report(findings: Mapping[str, Any]) -> str:
    """The findings as Markdown for people."""
    lines = ["# Audit of the scans", ""]
    if findings.get("source"):
        source, data_hash = code(findings["source"]), code(findings["data_hash"][:16])
        lines += [f"Source: {source}, data hash {data_hash}.", ""]
    counts = findings["counts"]
    labels = sorted({label for by_label in counts.values() for label in by_label})
    lines += _table(
        ["split", *map(plain, labels)],
        [[split, *(by.get(label, 0) for label in labels)] for split, by in counts.items()],
    )
    lines += ["## Duplicates", ""]
    kinds = {
        "exact_files": "same file",
        "exact_pixels": "same grey pixels",
        "near": f"near (32x32 correlation >= {findings['near_correlation']})",
    }
    duplicates = findings["duplicates"]
    head = ("num_distinct", "num_redundant", "num_groups", "num_groups_across_splits")
    lines += _table(
        ["kind", "distinct", "redundant", "groups", "groups across splits", "label conflicts"],
        [
            [title, *(duplicates[kind][key] for key in (*head, "num_label_conflicts"))]
            for kind, title in kinds.items()
        ],
    )
    for kind, title in list(kinds.items())[1:]:  # equal files have equal pixels
        shared = duplicates[kind]["shared"]
        if any(cell["copied"] for row in shared.values() for cell in row.values()):
            lines += [f"Scans with a copy in another split, {title}:", ""]
            lines += _table(
                ["split", *map(plain, labels)],
                [
                    [name, *(_share(row.get(label)) for label in labels)]
                    for name, row in shared.items()
                ],
            )
    conflicts = duplicates["near"]["label_conflicts"]
    if conflicts:
        lines += ["### One picture, two labels", ""]
        lines += [f"- {', '.join(map(code, paths))}" for paths in conflicts[:MOST_LISTED]]
        if len(conflicts) > MOST_LISTED:
            lines.append(f"- and {len(conflicts) - MOST_LISTED} more in audit.json")
        lines.append("")
    formats = findings["formats"]
    names = sorted({name for by in formats["by_label"].values() for name in by})
    lines += ["## Shortcuts", "", "Format and size:", ""]
    lines += _table(
        ["class", *names, "median width", "median height", "mean grey"],
        [
            [
                plain(label),
                *(by.get(name, 0) for name in names),
                f"{formats['median_width_px'][label]:.0f}",
                f"{formats['median_height_px'][label]:.0f}",
                f"{formats['mean_grey'][label]:.1f}",
            ]
            for label, by in formats["by_label"].items()
        ],
    )
    told = formats["label_from_format"]
    lines += [
        f"The format alone tells the class of {_percent(told)}, on the scans it was counted on; "
        f"the most frequent class is {100 * told['majority_accuracy']:.1f}%.",
        "",
    ]
    lines += _report_brightness(findings["brightness"], findings["majority"])
    return "\n".join(lines)


def _report_brightness(brightness: Mapping[str, Any], majority: Mapping[str, Any]) -> list[str]:
    direction = "brighter" if brightness["brighter"] else "darker"
    lines = [
        f"Mean grey: {code(brightness['label'])} if {direction} than "
        f"{brightness['threshold_grey']:.1f}, fitted on {brightness['fitted_n']} scans:",
        "",
    ]
    rows = []
    for name, result in brightness["measured"].items():
        if "not_measured" in result:
            rows.append([name, "not measured", plain(result["not_measured"]), "", result["n"]])
            continue
        rows.append(
            [
                name,
                f"{result['auroc']:.3f}",
                _percent(result),
                f"{100 * result['majority_accuracy']:.1f}%",
                f"{result['n']} ({result['n_positive']} {plain(brightness['label'])})",
            ]
        )
    lines += _table(["measured on", "AUROC", "accuracy", "majority of the two", "n"], rows)
    lines += [f"Always answering {code(majority['label'])}, among all classes:", ""]
    lines += _table(
        ["measured on", "accuracy", "n"],
        [[name, _percent(result), result["n"]] for name, result in majority["measured"].items()],
    )
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [*table(head, rows), ""]


def _share(cell: Mapping[str, int] | None) -> str:
    return f"{cell['copied']} of {cell['n']}" if cell else "-"


def _percent(result: Mapping[str, Any]) -> str:
    low, high = result["accuracy_95"]
    return f"{100 * result['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
