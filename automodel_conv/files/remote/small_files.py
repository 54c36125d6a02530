"""The small files of a checkpoint behind a URL, such as the config and the index, in a temporary folder."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import suppress

from automodel_conv.files import system
from automodel_conv.files.final_files import path_below
from automodel_conv.files.full_io import write_exactly
from automodel_conv.files.staging import remove_all
from automodel_conv.files.write_errors import write_errors


class SmallFiles:
    """A temporary folder with the small files of a checkpoint; it is removed when the last reference is gone.

    Args:
        files: contents by relative path, with "/" between folders.

    Raises:
        WriteError: the folder cannot be written.
    """

    def __init__(self, files: Mapping[str, bytes]):
        with write_errors("the temporary directory"):
            self.folder = system.make_temporary_directory("automodel_conv-")
            weakref.finalize(self, _remove, self.folder, os.getpid())
            for name, data in files.items():
                path = path_below(self.folder, name)
                system.make_directory(os.path.dirname(path))
                with system.create(path) as file:
                    write_exactly(file.fileno(), [memoryview(data)], 0, path)


def _remove(folder: str, pid: int) -> None:
    """Remove a folder in the process that made it; a forked process inherits the finalizer but not the folder."""
    if os.getpid() == pid:
        with suppress(OSError):
            remove_all(folder)
