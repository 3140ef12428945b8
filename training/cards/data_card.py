"""The data card, from `templates/data_card.md.j2`."""

from __future__ import annotations

from chestct.contract import NOT_A_MEDICAL_DEVICE, PREPARATION, SCAN_SIZE
from training.cards.rendering import templates
from training.cards.run_records import Artefacts, CardConfig
from training.common.markdown import below
from training.data.audit_report import MOST_LISTED
from training.data.audit_report import report as audit_report


def data_card(records: Artefacts, config: CardConfig) -> str:
    """The card as Markdown.

    Args:
        records: Of the run.
        config: Statements that no record can make.
    """
    findings = {key: value for key, value in records.audit.items() if key != "source"}
    counts = records.split["counts"].values()
    return templates().get_template("data_card.md.j2").render(
        records=records,
        config=config,
        notice=NOT_A_MEDICAL_DEVICE,
        labels=sorted({label for by_label in counts for label in by_label}),
        audit="\n".join(below(audit_report(findings).strip().splitlines()[2:], 2)),
        preparation=PREPARATION,
        scan_size=SCAN_SIZE,
        most_listed=MOST_LISTED,
    )  # fmt: skip
