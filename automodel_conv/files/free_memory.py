"""The memory that a process can still allocate, limited by the machine and by its control groups.

Sources: ``MemAvailable`` in Linux's Documentation/filesystems/proc.rst; ``memory.max``, ``memory.current`` and
``memory.stat`` in admin-guide/cgroup-v2.rst; ``memory.limit_in_bytes``, ``memory.usage_in_bytes`` in
admin-guide/cgroup-v1/memory.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from automodel_conv.files import system

_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_memory(root: str = "") -> int | None:
    """Return the bytes that can be allocated without taking any from other processes; None if unknown.

    Memory that holds cached files counts as free.

    Args:
        root: prefix of all paths, for tests.
    """
    available = re.search(r"^MemAvailable: *(\d+) kB$", system.read_text(f"{root}/proc/meminfo") or "", re.MULTILINE)
    if available is None:
        return None
    return max(0, min([int(available[1]) << 10, *_left_in_groups(root)]))


def _left_in_groups(root: str) -> Iterator[int]:
    """Yield the bytes that the limit of each visible control group of this process leaves."""
    groups = system.read_text(f"{root}/proc/self/cgroup") or ""
    for controller, path in re.findall(r"^\d+:(memory|):(.*)$", groups, re.MULTILINE):
        mount = f"{root}/sys/fs/cgroup/{controller}".rstrip("/")
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            folder = "/".join([mount, *parts[:depth]])
            for most, used in _LIMITS:
                limit, current = ((system.read_text(f"{folder}/{name}") or "").strip() for name in (most, used))
                if limit.isdecimal() and current.isdecimal():
                    stat = system.read_text(f"{folder}/memory.stat") or ""
                    cached = re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE)
                    yield int(limit) - int(current) + sum(map(int, cached))
