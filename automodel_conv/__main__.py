"""``python -m automodel_conv``: the command line."""

from automodel_conv.cli.app import main

if __name__ == "__main__":
    main()
