"""Write the model card and the data card of a trained model from its records."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from chestct.contract import MODEL_NAME
from training.cards.data_card import data_card
from training.cards.model_card import model_card, summary
from training.cards.rendering import page_from_markdown
from training.cards.run_records import Artefacts, CardConfig, read_artefacts
from training.common.atomic_io import replaced, write_json
from training.common.cli import command_parser, run_command
from training.common.config import load_config
from training.track.mlflow_run import RunRecord, tracked_run

logger = logging.getLogger(__name__)


def write_cards(config: CardConfig) -> dict[str, Any]:
    """Write both cards and the summary, and store them with the training's MLflow run.

    `config.output` holds `model_card.md`, `data_card.md`, the same two as `.html`, and
    `summary.json`; the folder is replaced in one step. The same records give the same files.

    Returns:
        The content of `summary.json`, see `training.cards.model_card.summary`.

    Raises:
        ValueError: A record is missing, broken, or about another run or other scans.
        OSError: The output cannot be written.
    """
    records = read_artefacts(config)
    content = summary(records)
    with tracked_run("card", records.facts.run) as run:
        known = run.recorded() if run.run_id == records.facts.run else None
        _require_split_of_run(records, known, config.split)
        texts = {
            "model_card": (f"Model card: {MODEL_NAME}", model_card(records, config, known)),
            "data_card": ("Data card", data_card(records, config)),
        }
        with replaced(config.output) as folder:
            folder.mkdir()
            for name, (title, text) in texts.items():
                (folder / f"{name}.md").write_text(text, encoding="utf-8")
                page = page_from_markdown(text, title)
                (folder / f"{name}.html").write_text(page, encoding="utf-8")
            write_json(folder / "summary.json", content)
        run.log_file(config.output, "card")
    logger.info("wrote %s", config.output)
    return content


def _require_split_of_run(records: Artefacts, known: RunRecord | None, file: Path) -> None:
    """Check the split's number of training scans by the run, of test scans by the scores."""
    trained = sum(records.split["counts"]["train"].values())
    if known and int(known.params.get("data.train", trained)) != trained:
        raise ValueError(
            f"{file} trains on {trained} scans, run {records.facts.run} was trained on "
            f"{known.params['data.train']}; run python -m training fit again"
        )
    tested = sum(records.split["counts"]["test"].values())
    own = records.protocols.get("official") or records.protocols.get("grouped_fold")
    if own and own["model"]["n"] != tested:
        raise ValueError(
            f"{file} tests {tested} scans, {own['model']['n']} were scored; run python -m "
            "training evaluate again"
        )


def main(argv: list[str] | None = None) -> int:
    """Write the model card and the data card of the trained model."""
    parser = command_parser("training card", main.__doc__, "configs/card.yaml")
    parser.add_argument("--evaluate", type=Path, help="instead of the config's")
    arguments = parser.parse_args(argv)

    def work() -> None:
        config = load_config(CardConfig, arguments.config)
        if arguments.evaluate:
            config = dataclasses.replace(config, evaluate=arguments.evaluate)
        content = write_cards(config)
        sys.stdout.write(json.dumps(content) + "\n")

    return run_command(work)
