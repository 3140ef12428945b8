"""`python -m training COMMAND`."""

import sys

from training.common.cli import run_room

MODULES = {
    "ingest": "training.data.ingest",
    "audit": "training.data.audit",
    "split": "training.data.split",
    "fit": "training.learn.fit",
    "evaluate": "training.score.evaluate",
    "crossvalidate": "training.learn.crossvalidate",
    "distill": "training.learn.distill",
    "sweep": "training.learn.sweep",
    "card": "training.cards.card",
    "track": "training.track.mlflow_run",
    "compare": "training.track.compare",
    "phantom": "training.data.phantom",
    "pipeline": "training.pipeline",
}

if __name__ == "__main__":
    sys.exit(run_room("training", MODULES))
