"""`python -m benchmarks COMMAND`."""

import sys

from training.common.cli import run_room

MODULES = {
    "demo": "benchmarks.demo",
    "latency": "benchmarks.latency",
    "throughput": "benchmarks.throughput",
    "training": "benchmarks.training",
    "web": "benchmarks.web",
    "regression-check": "benchmarks.regression_check",
}

if __name__ == "__main__":
    sys.exit(run_room("benchmarks", MODULES))
