"""The ranking of the experiment's runs in MLflow by one metric of one protocol.

Runs are comparable where they were scored on equally many scans; the others are listed with the
reason why they are left out.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from training.common.config import Name, config_class
from training.track.mlflow_run import (
    EXPERIMENT,
    FOLD_TAG,
    LOCAL_STORE,
    connected,
    shown_address,
    store_address,
)
from training.track.registry import aliases_of_runs

LAST_EPOCH = "last_epoch"
# Words in the name of a metric of which less is better.
LOSSES = {"loss", "brier", "error", "ece", "nll"}
# Results of a training that it logs as parameters; the hash of the weights repeats their name.
NO_PARAMETERS = ("temperature", "domain_threshold", "weights.sha256")
NOT_LOGGED = "-"


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
        output: Folder for `compare.csv` and `compare.html`.
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
    """One run with its score.

    Attributes:
        run: MLflow's identifier.
        name: Its name.
        status: `FINISHED`, `FAILED`, `KILLED` or `RUNNING`.
        started: Start time, in UTC.
        value: The metric; None where the run lacks it.
        low: Lower end of its interval, where it is logged.
        high: Upper end.
        n: Number of scans, where it is logged.
        aliases: Aliases of the model version that it became.
        git_commit: Commit of the checkout at its start.
        parameters: All parameters of the run, flattened.
    """

    run: str
    name: str
    status: str
    started: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    aliases: tuple[str, ...] = ()
    git_commit: str = "unknown"
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def score(self) -> str:
        """The value with its interval, as text."""
        if self.value is None:
            return NOT_LOGGED
        if self.low is None or self.high is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class Comparison:
    """The comparable runs in order, and the others.

    Attributes:
        config: Protocol, metric and the rest that they were ranked by.
        ranked: The comparable runs, the best first.
        left_out: The others, each with the reason.
    """

    config: CompareConfig
    ranked: tuple[Row, ...]
    left_out: tuple[tuple[Row, str], ...]

    @property
    def differing(self) -> dict[str, list[str]]:
        """The parameters in which the ranked runs differ, each with its value in every run."""
        names = {name for row in self.ranked for name in row.parameters} - set(NO_PARAMETERS)
        values = {
            name: [row.parameters.get(name, NOT_LOGGED) for row in self.ranked]
            for name in sorted(names)
        }
        return {name: column for name, column in values.items() if len(set(column)) > 1}


def rank_runs(config: CompareConfig) -> Comparison:
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
    """The message that lists the protocols and metrics that were logged instead."""
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


def short_name(parameter: str) -> str:
    """A parameter's name without `fit.`."""
    return parameter.removeprefix("fit.")


def shortened(value: str) -> str:
    """At most 16 characters of a value: its end, which tells paths apart."""
    return value if len(value) <= 16 else f"…{value[-15:]}"
