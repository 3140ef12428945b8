"""The runs of the experiment side by side, the best of them, and which one is the champion.

Runs are compared by one metric of one protocol, and only where it was taken on equally many
scans; all others are listed with the reason why they are left out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from training.common.atomic_io import replaced
from training.common.cli import run_command
from training.common.config import Name, config_class
from training.track.mlflow_run import (
    EXPERIMENT,
    FOLD_TAG,
    LOCAL_STORE,
    connected,
    shown_address,
    store_address,
)
from training.track.registry import CHAMPION, Promotion, aliases_of_runs, promote, roll_back

logger = logging.getLogger(__name__)

LAST_EPOCH = "last_epoch"
# Words in the name of a metric of which less is better.
LOSSES = {"loss", "brier", "error", "ece", "nll"}
# What a training finds out is no parameter of it, and a hash of weights says what their name says.
NO_PARAMETERS = ("temperature", "domain_threshold", "weights.sha256")
NOT_LOGGED = "-"
MOST_NAMED = 10  # runs in one line of the notes; --json lists all


@config_class
class CompareConfig:
    """Settings of `training compare`.

    Attributes:
        protocol: How the scores were taken: `valid` is the written model on the validation scans,
            `last_epoch` the network of the last epoch on the same, and the others are those of
            `training evaluate`.
        metric: One score of it, as MLflow holds it behind the dot: `official.macro_auroc`.
        best: `highest` or `lowest`; `auto` takes `lowest` for losses and errors.
        n: Only runs scored on so many scans; None takes what the newest run was scored on.
        sweep: Only runs of the sweep of this name.
        output: Folder for `compare.csv`, `compare.html` and two pictures.
    """

    protocol: Name = "valid"
    metric: Name = "balanced_accuracy"
    best: Literal["auto", "highest", "lowest"] = "auto"
    n: int | None = None
    sweep: Name | None = None
    output: Path | None = None

    @property
    def key(self) -> str:
        """The name of the metric in MLflow."""
        between = {LAST_EPOCH: "valid_"}.get(self.protocol, f"{self.protocol}.")
        return f"{between}{self.metric}"

    @property
    def lower_is_better(self) -> bool:
        """Whether the best run is the one with the lowest value."""
        if self.best != "auto":
            return self.best == "lowest"
        return bool(LOSSES & set(self.metric.split("_")))


@dataclass(frozen=True)
class Row:
    """One run, as far as it is compared.

    Attributes:
        run: MLflow's identifier.
        name: Its name.
        status: `FINISHED`, `FAILED`, `KILLED` or `RUNNING`.
        started: When, in UTC.
        value: The metric; None where the run lacks it.
        low: Lower end of its interval, where it is logged.
        high: Upper end.
        n: Number of scans, where it is logged.
        parameters: Everything that the run was told, flattened.
        aliases: Aliases of the model version that it became.
        git_commit: Commit of the checkout when it began.
    """

    run: str
    name: str
    status: str
    started: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    git_commit: str = "unknown"

    @property
    def score(self) -> str:
        """The value with its interval, in words."""
        if self.value is None:
            return NOT_LOGGED
        if self.low is None or self.high is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        config: What was asked.
        ranked: The comparable runs, the best first.
        left_out: The others, each with the reason.
    """

    config: CompareConfig
    ranked: tuple[Row, ...]
    left_out: tuple[tuple[Row, str], ...]

    @property
    def differing(self) -> list[str]:
        """The parameters in which the ranked runs differ."""
        names = {name for row in self.ranked for name in row.parameters}
        return sorted(
            name
            for name in names - set(NO_PARAMETERS)
            if len({row.parameters.get(name, NOT_LOGGED) for row in self.ranked}) > 1
        )


def compare(config: CompareConfig) -> Comparison:
    """Read the runs from MLflow and rank those that can be compared.

    Raises:
        ValueError: The server does not answer, the experiment or the sweep has no run, or no run
            has the metric; the message lists what there is.
    """
    runs = list(_runs(config.sweep))
    aliases = aliases_of_runs()
    rows = [_row(run, config, aliases) for run in runs]
    newest_first = sorted(rows, key=lambda row: row.started, reverse=True)
    scored = [row for row in newest_first if row.value is not None and row.status == "FINISHED"]
    if not scored:
        raise ValueError(_nothing_scored(config, runs))
    n = scored[0].n if config.n is None else config.n
    ranked, left_out = [], []
    for row in newest_first:
        if row.status != "FINISHED":
            left_out.append((row, row.status))
        elif row.value is None:
            left_out.append((row, f"no {config.key}"))
        elif row.n != n:
            left_out.append((row, f"scored on {row.n} scans, not on {n}: --n {row.n} takes those"))
        else:
            ranked.append(row)
    if not ranked:
        given = sorted({str(row.n) for row in scored})
        raise ValueError(f"no run was scored on {n} scans; expected one of {', '.join(given)}")
    sign = 1 if config.lower_is_better else -1
    ranked.sort(key=lambda row: sign * (row.value or 0.0))
    return Comparison(config, tuple(ranked), tuple(left_out))


def _runs(sweep: str | None) -> Iterator[Any]:
    """All runs of the experiment but the folds of cross-validations, or those of one sweep."""
    if store_address() == LOCAL_STORE and not Path("mlflow.db").is_file():
        raise ValueError(
            "no mlflow.db in this folder: train first (python -m training fit), or name a server "
            "with MLFLOW_TRACKING_URI"
        )
    with connected() as mlflow:
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        page, token = [], None
        if experiment is not None:
            asked = f"tags.sweep = '{sweep}'" if sweep else ""
            while True:
                found = client.search_runs([experiment.experiment_id], asked, page_token=token)
                page += [run for run in found if FOLD_TAG not in run.data.tags]
                token = found.token
                if not token:
                    break
        if not page:
            what = f"no run of the sweep {sweep!r}" if sweep else "no run"
            raise ValueError(f"{what} in the experiment {EXPERIMENT} at {shown_address()}")
        yield from page


def _row(run: Any, config: CompareConfig, aliases: Mapping[str, list[str]]) -> Row:
    metrics, key = run.data.metrics, config.key
    value = metrics.get(key)
    n = metrics.get(f"{config.protocol}.n")
    return Row(
        run=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat("T", "seconds"),
        value=None if value is None or math.isnan(value) else value,
        low=metrics.get(f"{key}.low"),
        high=metrics.get(f"{key}.high"),
        n=None if n is None else int(n),
        parameters=flattened(run.data.params),
        aliases=tuple(aliases.get(run.info.run_id, ())),
        git_commit=run.data.tags.get("git_commit", "unknown"),
    )


def flattened(parameters: Mapping[str, str]) -> dict[str, str]:
    """The same parameters, with one for each key of those that are mappings."""
    flat: dict[str, str] = {}
    for name, text in parameters.items():
        try:
            value = ast.literal_eval(text) if text.startswith("{") else None
        except (ValueError, SyntaxError):
            value = None
        if isinstance(value, dict):
            flat |= flattened({f"{name}.{key}": str(item) for key, item in value.items()})
        else:
            flat[name] = text
    return flat


def _nothing_scored(config: CompareConfig, runs: Sequence[Any]) -> str:
    """Says which protocols and metrics there are instead."""
    keys = {key for run in runs for key in run.data.metrics}
    if config.metric in keys and "." in config.metric:
        protocol, _, metric = config.metric.partition(".")
        return (
            f"metric {config.metric} is of the protocol {protocol}, not of {config.protocol}, and "
            f"protocols are not mixed; expected --protocol {protocol} --metric {metric}"
        )
    known: dict[str, set[str]] = {}
    for key in keys:
        protocol, dot, metric = key.partition(".")
        if dot and metric != "n" and not metric.endswith((".low", ".high")):
            known.setdefault(protocol, set()).add(metric)
        elif key.startswith("valid_"):
            known.setdefault(LAST_EPOCH, set()).add(key.removeprefix("valid_"))
    listed = "; ".join(f"{name}: {', '.join(sorted(known[name]))}" for name in sorted(known))
    return f"no finished run of {len(runs)} has {config.key}; there are {listed or 'no scores'}"


def table(found: Comparison) -> str:
    """The ranked runs as aligned text, the best first."""
    config = found.config
    header = ["", "run", "name", f"{config.protocol} {config.metric}", "n", "model"]
    rows = [[*header, *(_short(name) for name in found.differing)]]
    for rank, row in enumerate(found.ranked, start=1):
        cells = [str(rank), row.run[:8], row.name, row.score]
        cells += [NOT_LOGGED if row.n is None else str(row.n), ", ".join(row.aliases)]
        cells += [shortened(row.parameters.get(name, NOT_LOGGED)) for name in found.differing]
        rows.append(cells)
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in rows
    )


def notes(found: Comparison) -> list[str]:
    """What the table does not say: the direction, what is undecided, and who is left out."""
    config, best = found.config, found.ranked[0]
    order = "lowest" if config.lower_is_better else "highest"
    said = [f"{len(found.ranked)} runs by {config.key}, the {order} first"]
    if best.low is not None and best.high is not None:
        inside = sum(best.low <= (row.value or 0.0) <= best.high for row in found.ranked[1:])
        if inside:
            said.append(
                f"{inside} of the others lie within the interval of the best: on so few scans "
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
    for reason, runs in reasons.items():
        more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
        said.append(f"left out, {reason}: {', '.join(runs[:MOST_NAMED])}{more}")
    return said


def json_lines(found: Comparison) -> Iterator[str]:
    """One JSON object a run: the ranked ones first, then the others with their reason."""
    config = found.config
    about = {"protocol": config.protocol, "metric": config.metric}
    for rank, row in enumerate(found.ranked, start=1):
        yield json.dumps({"rank": rank} | about | _plain(row))
    for row, reason in found.left_out:
        yield json.dumps({"rank": None, "left_out": reason} | about | _plain(row))


def _plain(row: Row) -> dict[str, Any]:
    return {
        "run": row.run, "name": row.name, "status": row.status, "started": row.started,
        "value": row.value, "low": row.low, "high": row.high, "n": row.n,
        "aliases": list(row.aliases), "git_commit": row.git_commit,
        "parameters": dict(row.parameters),
    }  # fmt: skip


def _short(name: str) -> str:
    return name.removeprefix("fit.")


def shortened(value: str) -> str:
    """At most 16 characters of a value: its end, which tells paths apart."""
    return value if len(value) <= 16 else f"…{value[-15:]}"


def write_comparison(found: Comparison, output: Path) -> None:
    """Write `compare.csv`, `compare.html`, `parallel.png` and `scatter.png` into a folder.

    Raises:
        OSError: The folder cannot be written.
    """
    from training.track.compare_plots import parallel_figure, scatter_figure, write_page

    output.mkdir(parents=True, exist_ok=True)
    with replaced(output / "compare.csv") as temporary:
        _write_csv(found, temporary)
    for name, figure in (
        ("parallel", parallel_figure(found)), ("scatter", scatter_figure(found)),
    ):  # fmt: skip
        with replaced(output / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    with replaced(output / "compare.html") as temporary:
        write_page(found, temporary)
    logger.info("wrote %s", output)


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
    parser.add_argument("--output", type=Path, help="folder for CSV, page and pictures")
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
            _say(roll_back(), arguments.json)
            return
        found = compare(
            CompareConfig(
                protocol=arguments.protocol, metric=arguments.metric, best=arguments.best,
                n=arguments.n, sweep=arguments.sweep, output=arguments.output,
            )
        )  # fmt: skip
        if arguments.json:
            sys.stdout.writelines(f"{line}\n" for line in json_lines(found))
        else:
            sys.stdout.write(table(found))
        for note in notes(found):
            logger.info("%s", note)
        if found.config.output:
            write_comparison(found, found.config.output)
        if arguments.promote is not None:
            row, promotion = promote_run(found, arguments.promote)
            _say(promotion, arguments.json, row.run)

    return run_command(work)


def _say(promotion: Promotion, as_json: bool, run: str | None = None) -> None:
    if as_json:
        line = json.dumps({"alias": CHAMPION, "run": run} | promotion._asdict())
    else:
        line = promotion.in_words()
    sys.stdout.write(f"{line}\n")
