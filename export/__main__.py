"""`python -m export COMMAND`."""

import sys

from training.common.cli import run_room

MODULES = {
    "onnx": "export.convert.onnx",
    "quantize": "export.convert.quantize",
    "compress": "export.convert.compress",
    "engine": "export.convert.engine",
    "parity": "export.check.parity",
    "repository": "export.publish.repository",
    "rollout": "export.publish.rollout",
}

if __name__ == "__main__":
    sys.exit(run_room("export", MODULES))
