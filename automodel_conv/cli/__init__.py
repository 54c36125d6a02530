"""The command line."""


def main() -> None:
    """Run the command that the process arguments name."""
    from automodel_conv.cli.app import main as run

    run()
