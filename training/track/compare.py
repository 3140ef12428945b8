"""Compare the runs in MLflow: a table, a CSV file, a page with plots, and the champion."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from training.common.atomic_io import replaced
from training.common.cli import run_command
from training.track.compare_plots import write_page
from training.track.ranking import (
    LAST_EPOCH,
    NOT_LOGGED,
    CompareConfig,
    Comparison,
    Row,
    rank_runs,
    short_name,
    shortened,
)
from training.track.registry import CHAMPION, Promotion, promote, roll_back

logger = logging.getLogger(__name__)

MOST_NAMED = 10  # runs in one line of the notes; --json lists all


def print_comparison(config: CompareConfig, *, as_json: bool = False) -> Comparison:
    """Rank the runs, print them with notes, and write files where `config.output` asks for them.

    Raises:
        ValueError: No run can be ranked; the message lists the scores that were logged.
        OSError: The output cannot be written.
    """
    found = rank_runs(config)
    if as_json:
        sys.stdout.writelines(f"{line}\n" for line in json_lines(found))
    else:
        sys.stdout.write(aligned(table(found, brief=True)))
    for note in notes(found):
        logger.info("%s", note)
    if config.output:
        config.output.mkdir(parents=True, exist_ok=True)
        with replaced(config.output / "compare.csv") as temporary:
            _write_csv(found, temporary)
        with replaced(config.output / "compare.html") as temporary:
            write_page(found, notes(found), table(found), temporary)
        logger.info("wrote %s", config.output)
    return found


def table(found: Comparison, *, brief: bool = False) -> list[list[str]]:
    """Header and rows of the ranked runs, the best first.

    Args:
        found: The runs.
        brief: Shorten identifiers and long values.
    """
    config, differing = found.config, found.differing
    header = ["", "run", "name", f"{config.protocol} {config.metric}", "n", "model"]
    rows = [[*header, *map(short_name, differing)]]
    for index, row in enumerate(found.ranked):
        values = [column[index] for column in differing.values()]
        rows.append([
            str(index + 1), row.run[:8] if brief else row.run, row.name, row.score,
            NOT_LOGGED if row.n is None else str(row.n), ", ".join(row.aliases),
            *(map(shortened, values) if brief else values),
        ])  # fmt: skip
    return rows


def aligned(rows: list[list[str]]) -> str:
    """Rows as text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def notes(found: Comparison) -> list[str]:
    """Direction, runs that may be equal to the best, tuning on test scans, runs left out."""
    config, best = found.config, found.ranked[0]
    order = "lowest" if config.lower_is_better else "highest"
    runs = "1 run" if len(found.ranked) == 1 else f"{len(found.ranked)} runs"
    said = [f"{runs} by {config.key}, the {order} first"]
    if best.low is not None and best.high is not None:
        inside = sum(best.low <= (row.value or 0.0) <= best.high for row in found.ranked[1:])
        if inside:
            lie = "lies" if inside == 1 else "lie"
            said.append(
                f"{inside} of the others {lie} within the interval of the best: on so few scans "
                "they may be equal"
            )
    if config.protocol not in ("valid", LAST_EPOCH):
        said.append(
            f"{config.protocol} is scored on test scans: whoever chooses by it tunes on them; "
            "--protocol valid does not"
        )
    reasons: dict[str, list[str]] = {}
    for row, reason in found.left_out:
        reasons.setdefault(reason, []).append(f"{row.run[:8]} ({row.name})")
    for reason, names in reasons.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        said.append(f"left out, {reason}: {', '.join(names[:MOST_NAMED])}{more}")
    return said


def json_lines(found: Comparison) -> Iterator[str]:
    """One JSON object a run: the ranked ones first, then the others with their reason."""
    config = found.config
    about = {"protocol": config.protocol, "metric": config.metric}
    for rank, row in enumerate(found.ranked, start=1):
        yield json.dumps({"rank": rank} | about | asdict(row))
    for row, reason in found.left_out:
        yield json.dumps({"rank": None, "left_out": reason} | about | asdict(row))


def _write_csv(found: Comparison, path: Path) -> None:
    rows = [json.loads(line) for line in json_lines(found)]
    names = sorted({name for row in rows for name in row["parameters"]})
    columns = [
        "rank", "run", "name", "status", "started", "protocol", "metric", "value", "low", "high",
        "n", "aliases", "git_commit", "left_out",
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *names], extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | row["parameters"] | {"aliases": " ".join(row["aliases"])})


def promote_run(found: Comparison, wanted: str) -> tuple[Row, Promotion]:
    """Make the model of a run the champion, with its score among the tags of the version.

    Args:
        found: The comparison that it was chosen by.
        wanted: The first characters of the run's identifier; empty for the best.

    Raises:
        ValueError: No such run or several, or one without the metric, unfinished or without a
            model.
    """
    if wanted:
        rows = [*found.ranked, *(row for row, _ in found.left_out)]
        matching = [row for row in rows if row.run.startswith(wanted)]
        if len(matching) != 1:
            raise ValueError(
                f"{wanted!r} is the beginning of {len(matching)} runs; expected one of "
                f"{', '.join(row.run[:8] for row in rows)}"
            )
        row = matching[0]
    else:
        row = found.ranked[0]
    config = found.config
    if row.value is None:
        raise ValueError(f"run {row.run} ({row.name}) lacks {config.key}; evaluate it first")
    tags = {
        "protocol": config.protocol,
        "metric": config.metric,
        "value": f"{row.value:.4f}",
        "data_sha256": row.parameters.get("data.sha256", "unknown"),
        "git_commit": row.git_commit,
    }
    if row.low is not None and row.high is not None:
        tags["interval"] = f"{row.low:.4f} to {row.high:.4f}"
    if row.n is not None:
        tags["n"] = str(row.n)
    return row, promote(row.run, tags)


def main(argv: list[str] | None = None) -> int:
    """Compare the runs in MLflow by a metric, draw them, and promote the best to champion."""
    parser = argparse.ArgumentParser(
        prog="python -m training compare",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--protocol", default="valid", help="valid, last_epoch, official, grouped ..."
    )
    parser.add_argument("--metric", default="balanced_accuracy", help="one score of the protocol")
    parser.add_argument(
        "--best", choices=("auto", "highest", "lowest"), default="auto",
        help="auto: lowest for losses and errors, else highest",
    )  # fmt: skip
    parser.add_argument("--n", type=int, help="scans scored; otherwise those of the newest run")
    parser.add_argument("--sweep", help="only runs of the sweep of this name")
    parser.add_argument("--output", type=Path, help="folder for a CSV file and a page with plots")
    parser.add_argument("--json", action="store_true", help="one JSON line a run")
    then = parser.add_mutually_exclusive_group()
    then.add_argument(
        "--promote", nargs="?", const="", metavar="RUN",
        help="register the best run, or this one, and make it the champion",
    )  # fmt: skip
    then.add_argument(
        "--roll-back", action="store_true", help="only make the champion before it champion again"
    )
    arguments = parser.parse_args(argv)

    def work() -> None:
        if arguments.roll_back:
            _print_promotion(roll_back(), arguments.json)
            return
        config = CompareConfig(
            protocol=arguments.protocol, metric=arguments.metric, best=arguments.best,
            n=arguments.n, sweep=arguments.sweep, output=arguments.output,
        )  # fmt: skip
        found = print_comparison(config, as_json=arguments.json)
        if arguments.promote is not None:
            row, promotion = promote_run(found, arguments.promote)
            _print_promotion(promotion, arguments.json, row.run)

    return run_command(work)


def _print_promotion(promotion: Promotion, as_json: bool, run: str | None = None) -> None:
    if as_json:
        line = json.dumps({"alias": CHAMPION, "run": run} | promotion._asdict())
    else:
        line = promotion.in_words()
    sys.stdout.write(f"{line}\n")
