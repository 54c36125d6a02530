"""``python -m benchmarks.demo``, which ``make demo`` runs: the demo of the command line."""

import sys

from automodel_conv.cli.app import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]])
