"""The default number of threads: the cores of the machine, shared by the ranks on it."""

from __future__ import annotations

import os
import re


def cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ranks_on_this_node() -> int:
    """Processes of this job on this machine; 1 where nobody says.

    torchrun, and what starts processes as it does, tells each of them in ``LOCAL_WORLD_SIZE``
    (https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables"). It says what the job is, also
    before ``torch.distributed`` is initialized, so that is not asked.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if re.fullmatch("0*[1-9][0-9]{0,5}", text) else 1


def rank_on_this_node() -> int:
    """The number of this process among those of its job on this machine, from ``LOCAL_RANK``; 0 where nobody says."""
    text = os.environ.get("LOCAL_RANK", "")
    number = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    return number if number < ranks_on_this_node() else 0


def share_of_cores(usable: int, machine: int, ranks: int) -> int:
    """Cores for one of ``ranks`` processes, each of which may use ``usable`` of the ``machine``'s.

    A launcher may have given each rank cores of its own: so it is taken if they are no more than an equal share of the
    machine. Otherwise all ranks use the same ones.
    """
    return usable if usable <= machine // ranks else max(1, usable // ranks)


def default_reader_threads(most: int) -> int:
    """Threads that one rank reads with where nobody says it: as many as its share of the cores, at most ``most``."""
    return min(share_of_cores(cores(), os.cpu_count() or 1, ranks_on_this_node()), most)
