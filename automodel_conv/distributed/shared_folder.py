"""Check that ranks share a folder on this machine, through which they write one file together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from automodel_conv.distributed.collectives import all_gather_bytes
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files import system


def refuse_unshared(groups: Sequence[Any], path: str) -> None:
    """Raise UnsupportedError on all ranks unless they see the same file, which one of them has just created.

    The time of its last change distinguishes it from files that other nodes have under the same path.

    Args:
        groups: process groups of the ranks; see ``all_or_raise``.
        path: path of the file.

    Raises:
        UnsupportedError: a rank sees no file, or another one.
        RankError: a rank no longer responds.
    """
    seen = system.identity(path) if system.exists(path) else None
    if len(set(all_gather_bytes(groups, repr(seen).encode(), "comparing the folder of the files"))) > 1:
        raise UnsupportedError(
            message(
                "ranks on several nodes cannot upload one checkpoint",
                where=os.path.dirname(path),
                expected="a folder that all ranks share",
                found="a folder of each node",
                do="set XDG_CACHE_HOME to a directory that all nodes share, or save to such a directory and upload it",
            )
        )
