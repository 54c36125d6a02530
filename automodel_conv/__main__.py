"""Entry point of ``python -m automodel_conv``, the command line."""

from automodel_conv.cli import main

if __name__ == "__main__":
    main()
