"""Answers to two reporting checklists, item by item: where the cards say it, or that they do not.

CLAIM, 2024 update: Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300, 44 items.
TRIPOD+AI: Collins et al., BMJ 2024;385:e078378, 27 items. Numbers are theirs, words are ours.
"""

from __future__ import annotations

from training.cards.run_records import Artefacts, CardConfig
from training.common.markdown import slug, table

DONE, PARTLY, LACKING, IDLE = "reported", "partly", "not reported", "not applicable"

Item = tuple[str, str, str, str]  # number, topic, state, where or why


def claim_2024(found: Artefacts, config: CardConfig) -> list[str]:
    """CLAIM's items as lines of Markdown."""
    source, population, standard = _source(config), _population(config), _standard(config)
    conflicts = found.audit["duplicates"]["near"]["num_label_conflicts"]
    broken = len(found.ingest.get("broken", ()))
    external = _external(found)
    items: list[Item] = [
        ("1", "kind of AI named", DONE, _here("At a glance")),
        ("2", "summary", DONE, _here("At a glance")),
        ("3", "background and role", PARTLY, f"{_here('Intended use')}; no clinical background"),
        ("4", "aims and hypotheses", PARTLY, f"{_here('Intended use')}; no hypothesis is known"),
        ("5", "prospective or retrospective", DONE, "retrospective: the scans were there before"),
        ("6", "goal of the study", DONE, "to make a classifier and measure it"),
        ("7", "data sources", *source),
        ("8", "inclusion and exclusion", PARTLY, "every file that decodes as one grey slice was "
         f"taken; how the source chose: {population[1]}"),
        ("9", "preprocessing", DONE, _data("How a scan is prepared")),
        ("10", "subsets of the data", DONE, _data("What the split does about it")),
        ("11", "de-identification", *_ethics(config)),
        ("12", "missing data", DONE, f"{broken} files that do not decode were left out and are "
         f"listed, {_data('Source')}; an input has no other parts that could be missing"),
        ("13", "acquisition of images", LACKING, f"formats and sizes alone, "
         f"{_data('What the audit found')}"),
        ("14", "reference standard: definition", *standard),
        ("15", "reference standard: reasons", LACKING, "none is known to the pipeline"),
        ("16", "reference standard: annotators", *standard),
        ("17", "annotation of the test scans", *standard),
        ("18", "agreement of annotators", LACKING, "one label a scan is known; copies with two "
         f"labels: {conflicts} groups"),
        ("19", "assignment to partitions", DONE, _data("What the split does about it")),
        ("20", "level at which partitions are apart", DONE, "groups of copies and series, with "
         f"what they share counted, {_data('What the split does about it')}; not patients"),
        ("21", "intended sample size", LACKING, "no calculation is known; all scans are used"),
        ("22", "description of the model", DONE, _here("Model")),
        ("23", "software", DONE, _here("Environment")),
        ("24", "initial parameters", DONE, _here("Licences")),
        ("25", "training", DONE, _here("Training")),
        ("26", "choice of the final model", DONE, f"no choice: the mean of the last epochs' "
         f"weights, {_here('Training')}"),
        ("27", "ensembles", IDLE, "one network"),
        ("28", "metrics", DONE, _here("Protocols")),
        ("29", "uncertainty", DONE, f"95 % intervals beside every score, {_here('Protocols')}"),
        ("30", "robustness", *_check(found, "shortcuts", "Shortcut checks")),
        ("31", "explanation", PARTLY, f"the activation map is part of the model, {_here('Model')}; "
         + ("checked under " + _here("Shortcut checks") if found.metrics.get("shortcuts")
            else "whether it points at disease was not checked")),
        ("32", "internal testing", DONE, _here("Protocols")),
        ("33", "external testing", *external),
        ("34", "trial registration", IDLE, "no trial is known"),
        ("35", "numbers included and excluded", PARTLY, f"scans, {_data('Source')}; patients are "
         "not known"),
        ("36", "demographics in each partition", *population),
        ("37", "performance with uncertainty", DONE, _here("Protocols")),
        ("38", "diagnostic performance with precision", DONE, f"{_here('Protocols')}, "
         f"{_here('Operating points')}"),
        ("39", "failures", PARTLY, f"listed, not explained, {_here('Failure cases')}"),
        ("40", "limitations", DONE, _here("Limitations")),
        ("41", "implications for practice", DONE, f"none: research only, {_here('Intended use')}"),
        ("42", "protocol and technical details", PARTLY, f"commit and settings, "
         f"{_here('Environment')}, {_here('Training')}; no protocol written before is known"),
        ("43", "availability of code, model, data", DONE, _here("Licences")),
        ("44", "funding", *_stated(config.funding)),
    ]  # fmt: skip
    return [
        "Checklist for Artificial Intelligence in Medical Imaging, 2024 update (Tejani et al., "
        "Radiology: Artificial Intelligence 2024;6(4):e240300). The numbers are the checklist's, "
        "the words are not.",
        "",
        *table(["item", "topic", "state", "where or why"], items),
    ]


def tripod_ai(found: Artefacts, config: CardConfig) -> list[str]:
    """TRIPOD+AI's items as lines of Markdown."""
    population, standard, ethics = _population(config), _standard(config), _ethics(config)
    external = _external(found)
    items: list[Item] = [
        ("1", "title", DONE, _here("At a glance")),
        ("2", "abstract", PARTLY, _here("At a glance")),
        ("3a", "context and existing models", LACKING, "no clinical context is claimed"),
        ("3b", "target population and users", PARTLY, _here("Intended use")),
        ("3c", "known inequalities", LACKING, "nothing about persons is recorded"),
        ("4", "objectives", DONE, f"development and evaluation, {_here('Intended use')}"),
        ("5a", "sources of data", *_source(config)),
        ("5b", "dates", LACKING, "no date of acquisition is recorded"),
        ("6a", "setting and centres", LACKING, "not recorded"),
        ("6b", "eligibility", PARTLY, f"every file that decodes, {_data('Source')}"),
        ("6c", "treatments", IDLE, "a label of a picture is told, no course of a disease"),
        ("7", "preparation of data", DONE, _data("How a scan is prepared")),
        ("8a", "outcome", *standard),
        ("8b", "assessors of the outcome", *standard),
        ("8c", "blinding of the outcome", LACKING, "not recorded"),
        ("9a", "choice of predictors", IDLE, "the pixels of one slice are the only input"),
        ("9b", "definition of predictors", DONE, _data("How a scan is prepared")),
        ("9c", "assessors of predictors", IDLE, "pixels need no reader"),
        ("10", "sample size", LACKING, "no calculation is known; all scans are used"),
        ("11", "missing data", DONE, f"broken files are left out and listed, {_data('Source')}"),
        ("12a", "use of the data", DONE, _data("What the split does about it")),
        ("12b", "handling of predictors", DONE, _here("Model")),
        ("12c", "building of the model", DONE, f"{_here('Model')}, {_here('Training')}"),
        ("12d", "differences between clusters", LACKING, "centres are not known"),
        ("12e", "measures of performance", DONE, f"{_here('Protocols')}, {_here('Calibration')}; "
         "clinical utility was not measured"),
        ("12f", "updating: method", DONE, f"a temperature, {_here('Calibration')}"),
        ("12g", "how predictions were made", DONE, _here("Model")),
        ("13", "class imbalance", PARTLY, f"weights by class, {_here('Training')}; the temperature "
         "was fitted after it"),
        ("14", "fairness", LACKING, f"nothing about persons is recorded, {_here('Limitations')}"),
        ("15", "output", DONE, f"{_here('Model')}, {_here('Operating points')}"),
        ("16", "training against evaluation", DONE, f"{_here('Protocols')}, "
         f"{_data('What the split does about it')}"),
        ("17", "ethical approval", *ethics),
        ("18a", "funding", *_stated(config.funding)),
        ("18b", "conflicts of interest", LACKING, "not stated"),
        ("18c", "protocol", LACKING, "none written before is known"),
        ("18d", "registration", LACKING, "none is known"),
        ("18e", "data sharing", DONE, _here("Licences")),
        ("18f", "code sharing", DONE, f"{_here('Licences')}, {_here('Environment')}"),
        ("19", "patients and public", LACKING, "not stated"),
        ("20a", "flow of participants", PARTLY, f"scans, not persons, {_data('Composition')}"),
        ("20b", "characteristics", *population),
        ("20c", "development against evaluation data", PARTLY, f"class counts, formats and grey "
         f"levels, {_data('What the audit found')}"),
        ("21", "numbers in each analysis", DONE, f"{_data('Composition')}, {_here('Protocols')}"),
        ("22", "the full model", DONE, f"the file with the hash under {_here('At a glance')}"),
        ("23a", "performance with intervals", DONE, f"{_here('Protocols')}; by class, not by "
         "subgroups of persons"),
        ("23b", "performance between clusters", *external),
        ("24", "updating: results", DONE, f"before and after, {_here('Calibration')}"),
        ("25", "interpretation", PARTLY, f"{_here('Limitations')}; fairness was not measured"),
        ("26", "limitations", DONE, _here("Limitations")),
        ("27a", "poor or unusual input", DONE if found.metrics.get("domain") else PARTLY, "a file "
         f"that does not decode is refused, an unlike scan is flagged, {_here('Out of domain')}"),
        ("27b", "what users must do", DONE, f"name a file; {_here('Intended use')}"),
        ("27c", "next steps", LACKING, "not stated"),
    ]  # fmt: skip
    return [
        "Transparent reporting of a prediction model, with AI (Collins et al., BMJ "
        "2024;385:e078378). The numbers are the checklist's, the words are not.",
        "",
        *table(["item", "topic", "state", "where or why"], items),
    ]


def _here(section: str) -> str:
    return f"[{section}](#{slug(section)})"


def _data(section: str) -> str:
    return f"[{section} (data card)](data_card.md#{slug(section)})"


def _source(config: CardConfig) -> tuple[str, str]:
    return (DONE if config.data_source else PARTLY), _data("Source")


def _population(config: CardConfig) -> tuple[str, str]:
    if config.population:
        return PARTLY, f"{_data('Source')}; not by partition"
    return LACKING, "not recorded"


def _standard(config: CardConfig) -> tuple[str, str]:
    if config.reference_standard:
        return DONE, _data("Source")
    return LACKING, "the name of the folder is the label; who chose it is not known"


def _ethics(config: CardConfig) -> tuple[str, str]:
    if config.ethics:
        return DONE, _data("Licence and privacy")
    return LACKING, f"not stated; the pipeline changes no file, {_data('Licence and privacy')}"


def _stated(text: str | None) -> tuple[str, str]:
    return (DONE, " ".join(text.split())) if text else (LACKING, "not stated")


def _external(found: Artefacts) -> tuple[str, str]:
    if found.external:
        return DONE, f"another source, {_here('Protocols')}"
    return LACKING, "no scan of another source was scored"


def _check(found: Artefacts, key: str, section: str) -> tuple[str, str]:
    return (DONE if found.metrics.get(key) else LACKING), _here(section)
