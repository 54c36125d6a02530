"""Hides packages as if they were not installed; Python imports this module if it is on PYTHONPATH.

``HIDDEN_PACKAGES=transformers,triton`` names them, for subprocesses too. Neither ``import``, nor
``importlib.util.find_spec``, nor ``importlib.metadata`` finds a hidden package.
"""

import importlib.machinery
import os
import sys

# Python only prints an exception raised here; tests/conftest.py checks that hiding worked.
HIDDEN = frozenset(filter(None, os.environ.get("HIDDEN_PACKAGES", "").split(",")))


class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = super().find_distributions(*args, **kwargs)
        return (distribution for distribution in found if distribution.name not in HIDDEN)


sys.meta_path[:] = [Hiding if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
