"""The command line."""

import sys


def main() -> None:
    """Run the command that the process arguments name."""
    try:
        from automodel_conv.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)  # as after Ctrl-C in a command

    run()
