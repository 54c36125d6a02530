"""The options of planning and of loading, as dataclasses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from automodel_conv.execution.cores import cores, default_reader_threads
from automodel_conv.execution.filling import Limits
from automodel_conv.planning.plan import CopyPlan


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``compile_plan``."""

    rules: Iterable[Any] | None = None
    layout: str | None = None
    source_layout: str | None = None
    key_mapping: Mapping[str, str] | None = None
    dtype: torch.dtype | None = None
    dequantize: bool = True

    def given(self) -> Mapping[str, object]:
        """The options by name; None for those left at their defaults."""
        return vars(self) | {"dequantize": None if self.dequantize else False}


@dataclass(frozen=True)
class LoadOptions:
    """The options of ``load_state_dict`` and ``load_model``, except devices."""

    planning: PlanOptions
    plan: CopyPlan | str | None
    strict: bool
    verify: bool
    broadcast: bool
    limits: Limits
    memory_budget: int | None
    memory_map: bool
    progress: bool
    revision: str | None

    @property
    def reader_threads(self) -> int:
        """Threads that read before the load itself."""
        return default_reader_threads(cores()) if self.limits.threads is None else self.limits.threads
