"""State of a training on disk: resume after an interruption, average the last weights."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.common.atomic_io import write_json

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)


class ResumableState:
    """Where a training stands: its epochs and the weights of the last ones, on disk.

    The folder is named by a hash of everything that decides the result, so another config, other
    data or other weights never go on from here.
    """

    def __init__(self, folder: Path, averaged_epochs: int) -> None:
        self._folder = folder
        self._averaged_epochs = averaged_epochs
        self.run_id: str | None = None
        self.history: list[dict[str, float]] = []

    @classmethod
    def find(cls, folder: Path, decides: Any, averaged_epochs: int) -> ResumableState:
        """The state of a training in `folder`, empty where none was interrupted.

        Args:
            folder: Where the states of all trainings are.
            decides: Everything that decides the result, as plain values.
            averaged_epochs: Weights of so many last epochs are kept.
        """
        key = json.dumps(decides, sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        state = cls(folder / name, averaged_epochs)
        file = state._folder / "state.json"
        if file.is_file():
            stored = json.loads(file.read_text())
            state.run_id, state.history = stored["run"], stored["history"]
            logger.info("an interrupted training is resumed after epoch %d", state.epoch)
        return state

    @property
    def epoch(self) -> int:
        """Epochs of phase two that are done."""
        return len(self.history) - 1 if self.history else 0

    def epochs_without_gain(self) -> int:
        """Epochs since the one with the lowest validation loss."""
        losses = [row["valid_loss"] for row in self.history]
        return len(losses) - 1 - int(np.argmin(losses))

    def begin(self, run_id: str) -> None:
        """Remember which run this training belongs to."""
        self.run_id = run_id
        self._write()

    def record(self, trainer: keras.Model, row: dict[str, float]) -> None:
        """Store the weights and the scores of the epoch that has ended."""
        self.history.append(row)
        trainer.save_weights(self._weights(len(self.history) - 1))
        self._write()
        keep = {self._weights(epoch) for epoch in self._averaged()}
        for file in self._folder.glob("*.weights.h5"):
            if file not in keep:
                file.unlink()

    def restore(self, trainer: keras.Model) -> None:
        """Load the weights of the last epoch, optimizer state included."""
        if self.history:
            trainer.load_weights(self._weights(self.epoch))

    def restore_average(self, trainer: keras.Model) -> None:
        """Load the mean of the weights of the last epochs."""
        epochs = self._averaged()
        total: list[Any] = []
        for epoch in epochs:
            trainer.load_weights(self._weights(epoch))
            weights = trainer.get_weights()
            total = [a + b for a, b in zip(total, weights, strict=True)] if total else weights
        trainer.set_weights(
            [
                (weight / len(epochs)).astype(weight.dtype)
                if np.issubdtype(weight.dtype, np.floating)
                else weight
                for weight in total
            ]
        )

    def remove(self) -> None:
        """Forget this training: it is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _averaged(self) -> range:
        """The last epochs of phase two; the head of phase one alone where there is none."""
        first = max(min(1, self.epoch), self.epoch - self._averaged_epochs + 1)
        return range(first, self.epoch + 1)

    def _weights(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:04d}.weights.h5"

    def _write(self) -> None:
        write_json(self._folder / "state.json", {"run": self.run_id, "history": self.history})


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """The rows of a training as CSV; what the first row, before training, lacks stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
