"""Default numbers of threads: the ranks on a machine share its cores."""

from __future__ import annotations

import os
import re


def cores() -> int:
    """Return the number of cores that this process may use; in a container it can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ranks_on_this_node() -> int:
    """Return the number of processes of this job on this machine, or 1 if it is unknown.

    torchrun and compatible launchers set ``LOCAL_WORLD_SIZE`` for each process
    (https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables"). The variable is valid before
    ``torch.distributed`` is initialized, so this does not ask ``torch.distributed``.
    """
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if re.fullmatch("0*[1-9][0-9]{0,5}", text) else 1


def rank_on_this_node() -> int:
    """Return the number of this process among the processes of its job on this machine, from ``LOCAL_RANK``, or 0."""
    text = os.environ.get("LOCAL_RANK", "")
    number = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    return number if number < ranks_on_this_node() else 0


def share_of_cores(usable: int, machine: int, ranks: int) -> int:
    """Return the number of cores for one of several ranks.

    A launcher may have bound each rank to its own cores. This is assumed if ``usable`` is at most an equal share of the
    machine. Otherwise all ranks use the same cores.

    Args:
        usable: number of cores that this rank may use.
        machine: number of cores of the machine.
        ranks: number of ranks on the machine.
    """
    return usable if usable <= machine // ranks else max(1, usable // ranks)


def default_reader_threads(most: int) -> int:
    """Return the default number of reader threads of one rank: its share of the cores, at most ``most``."""
    return min(share_of_cores(cores(), os.cpu_count() or 1, ranks_on_this_node()), most)


def is_at_least(number: object, least: int) -> bool:
    """Return whether a number of threads or bytes that a caller gives is an integer, and large enough."""
    return isinstance(number, int) and number >= least
