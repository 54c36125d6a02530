"""Run the demo of the command line: ``python -m benchmarks.demo``, which ``make demo`` calls."""

import sys

from automodel_conv.cli.app import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]])
