"""Public functions that convert tensors in memory: from a state dict to a state dict, on the device of its tensors.

They serve weight refit in RL (trainer layout to inference layout and back), and other checkpoints that are not files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.compiling.to_model import loading_plan
from automodel_conv.destinations.ties import in_order, unequal_ties, with_tied
from automodel_conv.distributed.placements import is_distributed
from automodel_conv.doors import door, keyword_options
from automodel_conv.errors import ConversionError, UnsupportedError, message
from automodel_conv.execution.buffers import allocate
from automodel_conv.execution.copy_batch import uses_kernels
from automodel_conv.execution.cores import cores
from automodel_conv.execution.memory import convert_tensors, is_unchanged
from automodel_conv.execution.new_memory import NewMemory
from automodel_conv.execution.report import tensors_text
from automodel_conv.execution.report_text import Report, Row, count_row
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.planning.kept_codes import refuse_codes_without_scales
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.publishing.saved import not_saved
from automodel_conv.types import Backend, LayoutInFiles, LayoutName
from automodel_conv.upstream.models import state_table, tied_names
from automodel_conv.upstream.wrappers import plain_model


@dataclass(frozen=True, repr=False)
class StateDictReport(Report):
    """The outcome of a conversion in memory."""

    left_out: tuple[str, ...]
    """Names of tensors of the state dict, and of a ``reference``, that are not in the result in any form."""
    carried: tuple[str, ...] = ()
    """Always empty: a conversion in memory leaves out the tensors that a model or rules have no place for."""

    def _rows(self) -> list[Row]:
        return [count_row("left out", self.left_out)]


class ConvertedStateDict(dict[str, Tensor]):
    """A state dict with a report of its conversion."""

    report: StateDictReport
    """The outcome of the conversion that returned this dict."""

    def __repr__(self) -> str:
        return tensors_text(self)


@door("converting")
def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    rules: Iterable[Any] | None = None,
    layout: LayoutName | None = None,
    source_layout: LayoutInFiles | None = None,
    out: Mapping[str, Tensor] | None = None,
    backend: Backend = "auto",
) -> ConvertedStateDict:
    """Convert tensors with checkpoint names to tensors with model names, grouped experts included.

    Tensors that need no conversion are returned by reference, unless ``out`` is given.

    Args:
        state_dict: tensors by their names in a checkpoint. They are not changed.
        model: the model whose names, dtypes and rules to use; its tensors are neither read nor written. torch may have
            wrapped it, and names of ``state_dict`` may be those of a wrapped model; see ``compile_plan``.
        rules: rule objects of transformers that rename and merge tensors. None: the model's own rules. ``[]``: keep the
            names. One of ``model``, ``rules``, ``layout`` and ``source_layout`` is needed.
        layout: layout of the routed experts in the result: "transformers", "nemo", "gpt_oss" or "vllm"; or, as vLLM's
            kernels read them, "vllm_w31", "vllm_trtllm", "vllm_trtllm_padded" or "vllm_deepep". None: the layout of the
            model's own parameters.
        source_layout: layout of grouped experts in ``state_dict``: a layout, or "per_expert". None: the model's layout,
            or without a model that of transformers; the shapes must fit it.
        out: tensors to write, by target name. Each target needs one, of its shape and dtype. The result of an earlier
            call fits; tensors in it that are tensors of ``state_dict`` stay as they are. None: allocate them.
        backend: "triton": kernels, and torch on the same device for copies that no kernel fits. "torch": torch only.
            "auto": "triton" for tensors on one GPU on which Triton can run, else "torch".

    Returns:
        The tensors by their names in the model: a dict with a ``report``, which lists the names that were left out.

    Raises:
        NameProblems: names or shapes do not fit; lists all of them.
        ConversionError: a tensor of ``out`` is missing, does not fit, or shares memory with another one or a source
            (unless it is that source, unchanged); or the tensors are on several devices and ``out`` is not given.
        UnsupportedError: a layout or backend is unknown, "triton" is given for tensors that kernels cannot access, a
            tensor is distributed, codes would be separated from their scales, or the model or ``state_dict`` has PEFT
            adapters.

    Example:
        >>> import torch
        >>> experts = "model.layers.0.mlp.experts"
        >>> grouped = {f"{experts}.gate_up_proj": torch.ones(8, 4, 6), f"{experts}.down_proj": torch.ones(8, 6, 2)}
        >>> nemo = convert_state_dict(grouped, rules=[], layout="nemo", source_layout="transformers")
        >>> {name.removeprefix(f"{experts}."): list(tensor.shape) for name, tensor in nemo.items()}
        {'gate_and_up_projs': [8, 6, 4], 'down_projs': [8, 2, 6]}
    """
    _require_any(model, rules, layout, source_layout)
    model = None if model is None else plain_model(model)
    plan, problems = loading_plan(
        state_table(state_dict), model=model, rules=rules, layout=layout, source_layout=source_layout
    )
    problems.raise_unless_fit("the state dict")
    refuse_codes_without_scales(plan)
    converted = _run(plan, state_dict, out, backend)
    if model is not None:
        ties = tied_names(model)
        converted = in_order(with_tied(converted, ties, unequal_ties(converted, ties)), model.state_dict())
    return _with_report(converted, plan.left_out)


@door("converting")
@keyword_options(SourceOptions, SourceSettings)
def revert_state_dict(
    state_dict: Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    rules: Iterable[Any] | None = None,
    layout: LayoutName | None = None,
    reference: str | os.PathLike[str] | None = None,
    out: Mapping[str, Tensor] | None = None,
    backend: Backend = "auto",
    **options: Unpack[SourceOptions],
) -> ConvertedStateDict:
    """Convert tensors with model names back to tensors with checkpoint names, one tensor for each expert.

    Names come from the reversed rules, in the order in which transformers saves, or from a ``reference`` checkpoint.
    Tensors keep their dtype.

    Args:
        state_dict: tensors by their names in a model. They are not changed.
        model: the model whose rules to reverse; its tensors are neither read nor written. torch may have wrapped it,
            and names of ``state_dict`` may be those of a wrapped model; see ``compile_plan``.
        rules: rule objects of transformers; they are reversed. None: the model's own rules. ``[]``: keep the names. One
            of ``model``, ``rules``, ``layout`` and ``reference`` is needed.
        layout: layout of the experts in ``state_dict``; see ``convert_state_dict``. A layout that pads needs a
            ``model`` with the sizes without padding. None: the layout of the model's own parameters.
        reference: path, URL or repository of a checkpoint whose names to restore exactly; see ``open_checkpoint``. Only
            its headers are read.
        out: tensors to write, by target name. Each target needs one, of its shape and dtype. The result of an earlier
            call fits; tensors in it that are tensors of ``state_dict`` stay as they are. None: allocate them.
        backend: "triton": kernels, and torch on the same device for copies that no kernel fits. "torch": torch only.
            "auto": "triton" for tensors on one GPU on which Triton can run, else "torch".
        **options: see ``SourceOptions``.

    Returns:
        The tensors by their names in a checkpoint: a dict with a ``report``, which lists the names in ``reference``
        that ``state_dict`` does not provide.

    Raises:
        NameProblems: the tensors do not fit ``reference`` or the rules.
        CoverageError: a tensor of ``reference`` is only partly in ``state_dict``.
        UnsupportedError: grouped experts have names that the rules do not match, a layout or backend is unknown,
            "triton" is given for tensors that kernels cannot access, a tensor is distributed, codes would be separated
            from their scales, or the model or ``state_dict`` has PEFT adapters.
        ConversionError: a tensor of ``out`` is missing, does not fit, or shares memory with another one or a source
            (unless it is that source, unchanged); or the tensors are on several devices and ``out`` is not given.

    Example:
        >>> import torch
        >>> from automodel_conv import get_checkpoint_conversion_mapping
        >>> rules = get_checkpoint_conversion_mapping("qwen3_moe")
        >>> experts = "model.layers.0.mlp.experts"
        >>> grouped = {f"{experts}.gate_up_proj": torch.ones(2, 4, 6), f"{experts}.down_proj": torch.ones(2, 6, 2)}
        >>> reverted = revert_state_dict(grouped, rules=rules)
        >>> len(reverted), reverted[f"{experts}.1.up_proj.weight"].shape
        (6, torch.Size([2, 6]))
    """
    _require_any(model, rules, layout, reference)
    model = None if model is None else plain_model(model)
    opened = None if reference is None else open_checkpoint(reference, **options)
    plan = saving_plan(state_table(state_dict), model=model, rules=rules, layout=layout, reference=opened)
    refuse_codes_without_scales(plan)
    reverted = _run(plan, state_dict, out, backend)
    return _with_report(reverted, [*_without_ties(plan, state_dict), *not_saved(None, opened, reverted)])


def _without_ties(plan: CopyPlan, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Return the names of unused sources, except second names of tensors that the plan uses under another name."""
    memory = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in state_dict.values()]
    used = {memory[row] for row in plan.used_sources}
    return [plan.sources.names[row] for row in plan.unused_sources if memory[row] not in used or not memory[row][0]]


def _with_report(tensors: dict[str, Tensor], left_out: Iterable[str]) -> ConvertedStateDict:
    converted = ConvertedStateDict(tensors)
    converted.report = StateDictReport(tuple(left_out))
    return converted


def _require_any(*arguments: object) -> None:
    if all(argument is None for argument in arguments):
        raise UnsupportedError(
            message("a state dict has no config that determines its rules", do="pass model=, rules= or a layout")
        )


def _run(
    plan: CopyPlan, state_dict: Mapping[str, Tensor], out: Mapping[str, Tensor] | None, backend: str
) -> dict[str, Tensor]:
    sources = list(state_dict.values())
    for name, source in state_dict.items():
        if is_distributed(source):
            raise UnsupportedError(
                message(f"{name} is a distributed tensor", do="convert its local shards, or save and load the model")
            )
    uses_kernels(backend, sources)  # raises for an unusable backend, even if no copy follows
    if out is not None:
        convert_tensors(plan, sources, out, backend=backend)
        return {target.name: out[target.name] for target in plan.targets}
    unchanged = {target.name: sources[target.sources[0]] for target in plan.targets if is_unchanged(plan, target)}
    converted = [target for target in plan.targets if target.name not in unchanged]
    device = sources[0].device if sources else torch.device("cpu")
    if any(source.device != device for source in sources):
        raise ConversionError(
            message(
                "the tensors are on several devices",
                found=sorted({str(source.device) for source in sources}),
            )
        )
    buffers = allocate(converted, device)
    if device.type == "cpu":
        NewMemory(list(buffers.values())).populate_all(cores())
    convert_tensors(CopyPlan(plan.sources, tuple(converted), plan.rules), sources, buffers, backend=backend)
    return {target.name: unchanged.get(target.name, buffers.get(target.name)) for target in plan.targets}  # type: ignore[misc]
