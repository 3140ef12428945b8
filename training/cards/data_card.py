"""The data card: what scans a model was made of, what is wrong with them, how they are prepared.

It follows the questions of Gebru et al. 2021, "Datasheets for Datasets", as far as a pipeline can
answer them. It is true of any folder of scans: whatever is special about one is read from the
records of ingest, audit and split, or stated in the config.
"""

from __future__ import annotations

from chestct.contract import NOT_A_MEDICAL_DEVICE, PREPARATION, SCAN_SIZE
from training.cards.model_card import licence_in_words, source_in_words, stated
from training.cards.run_records import Artefacts, CardConfig
from training.common.markdown import below, code, plain, table
from training.data.audit import MOST_LISTED
from training.data.audit import report as audit_report


def data_card(found: Artefacts, config: CardConfig) -> str:
    """The card as Markdown.

    Args:
        found: Records of the run.
        config: Statements that no record can make.
    """
    findings = {key: value for key, value in found.audit.items() if key != "source"}
    sections: dict[str, list[str]] = {
        "Source": _source(found, config),
        "Composition": _composition(found),
        "What the audit found": below(audit_report(findings).strip().splitlines()[2:], 2),
        "What the split does about it": _split(found),
        "How a scan is prepared": _preparation(found),
        "Known limits": [
            "- No patient identifiers: which slices show the same patient is guessed from copies, "
            "near copies and file names (and from a group file where one was given).",
            "- The label of a scan is the name of its folder. Who gave it, on what ground, and how "
            "often two readers would agree is not recorded.",
            "- Age, sex, origin, scanner, dose and contrast are not recorded.",
            "- Near copies are found by the correlation of small thumbnails: what was cropped, "
            "turned or mirrored beyond that is missed, and close neighbours of one series count.",
            "- A picture (PNG or JPEG) comes in the window it was saved in; only DICOM holds "
            "Hounsfield units.",
            "- Writing and marks within the body are not removed.",
        ],
        "Licence and privacy": [
            f"- Terms: {licence_in_words(found, config)}",
            f"- Ethics: {stated(config.ethics)}",
            "- The pipeline changes no file: what a DICOM header says of a person stays there. "
            "Pixels are read, and tags that say how to show them and what they show; no name.",
            "- The cards name files by path and show none.",
        ],
        "Contact": [stated(config.contact)],
    }
    lines = ["# Data card", "", f"> {NOT_A_MEDICAL_DEVICE}", ""]
    lines += ["The model that was made of it: [model card](model_card.md)."]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _source(found: Artefacts, config: CardConfig) -> list[str]:
    ingest = found.ingest
    broken = ingest.get("broken", [])
    lines = table(["what", "value"], [
        ["source", source_in_words(found)],
        ["hash of all files", code(ingest["data_hash"])],
        ["layout", plain(ingest.get("layout", "not recorded"))],
        ["scans taken", ingest["num_scans"]],
        ["broken files left out", len(broken)],
        ["other files left out", len(ingest.get("ignored", []))],
        ["collected by", stated(config.data_source)],
        ["patients", stated(config.population)],
        ["labels decided by", stated(config.reference_standard)],
    ])  # fmt: skip
    if broken:
        lines += ["", "Broken files:", ""]
        lines += table(["path", "reason"], [
            [code(entry["path"]), plain(entry["reason"])] for entry in broken[:MOST_LISTED]
        ])  # fmt: skip
        if len(broken) > MOST_LISTED:
            lines += ["", f"And {len(broken) - MOST_LISTED} more."]
    return lines


def _composition(found: Artefacts) -> list[str]:
    counts = found.split["counts"]
    labels = sorted({label for by_label in counts.values() for label in by_label})
    rows = [
        [split, sum(by_label.values()), *(by_label.get(label, 0) for label in labels)]
        for split, by_label in counts.items()
    ]
    return [
        "What the model was trained, validated and tested on:",
        "",
        *table(["split", "scans", *map(plain, labels)], rows),
    ]


def _split(found: Artefacts) -> list[str]:
    split = found.split
    if split["protocol"] == "official":
        lines = [
            "The folders train, valid and test of the source were kept. Copies and series may lie "
            "on two sides, as counted below; the scores are also given without the test scans that "
            "have a copy in train or valid.",
        ]
    else:
        lines = [
            f"All scans were dealt anew into {split['folds']} parts, of which number "
            f"{split['fold']} tests (seed {split['seed']}). No group lies on two sides: copies, "
            "near copies, numbered series of one class, and whatever a group file joined.",
        ]
    lines += [
        "",
        f"{split['num_groups']} groups.",
        "",
    ]
    return lines + table(["scans with a group member there", "copies", "copies or series"], [
        [pair, split["overlaps"][pair], split["overlaps_with_series"][pair]]
        for pair in split["overlaps"]
    ])  # fmt: skip


def _preparation(found: Artefacts) -> list[str]:
    window = found.facts.window
    return [
        "One implementation, `chestct.imaging`, does it for training, test and every client; this "
        f"version of it is called {code(PREPARATION)}.",
        "",
        "1. Decode. PNG and JPEG to one grey channel, transparent parts black, 16-bit samples "
        "scaled to 8. DICOM: one grey frame; what is no axial CT slice by its tags is refused.",
        "2. Window. DICOM is rescaled to Hounsfield units and shown at centre "
        f"{window.center_hu:g}, width {window.width_hu:g} HU; MONOCHROME1 is inverted and padding "
        "is black. Pictures stay as they were saved.",
        "3. Crop to the box around the body, so that margins, couch and borders reach no network.",
        f"4. Resize that box to {SCAN_SIZE} x {SCAN_SIZE}, bilinear and antialiased; its "
        "proportions are not kept.",
        "",
        "Augmentation is random and of the training scans alone; its limits stand among the "
        "settings in the [model card](model_card.md#training).",
    ]
