"""Types of the metadata in vLLM's weight transfer, and its order by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Replicate:
    pass


@dataclass(frozen=True)
class Shard:
    dim: int


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: object
    shape: tuple
    owners: tuple | None = None
    mesh_shape: tuple | None = None
    placements: tuple | None = None


class WeightSource:
    def owned_names(self, rank):
        return [meta.name for meta in self.metadata if meta.owners is None or rank in meta.owners]


def layerwise_groups(names):
    groups, before, after = {}, [], []
    for name in names:
        found = re.match(r"(.*?)\.(\d+)\.", f"{name}.")
        if found:
            groups.setdefault((found[1], int(found[2])), []).append(name)
        else:
            (after if groups else before).append(name)
    return [group for group in (before, *(groups[key] for key in sorted(groups)), after) if group]
