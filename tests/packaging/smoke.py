"""Run by test_wheel.py where only the wheel is installed, with and without ``python -O``.

No ``assert``: ``-O`` takes those out.
"""

import importlib
import sys
from importlib import metadata
from pathlib import Path


def main() -> None:
    package_directory, *kernels = sys.argv[1:]

    import automodel_conv
    import automodel_conv.dtypes

    found = Path(automodel_conv.__file__).parent
    if found != Path(package_directory):
        raise SystemExit(f"imported from {found}, expected {package_directory}")
    if metadata.version("automodel-conv") == "":
        raise SystemExit("the distribution has no version")
    for name in kernels:
        importlib.import_module(f"automodel_conv.kernels.{name}")
    print("smoke passed")


if __name__ == "__main__":
    main()
