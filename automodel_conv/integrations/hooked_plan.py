"""Plan one load under the hook: what is converted here, and what is left to transformers and why."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import CheckpointError, QuantizationError, UnsupportedError
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.integrations.hooked_files import Slice, checkpoint_of
from automodel_conv.integrations.quantizers import PlainLoad, rounds_alike
from automodel_conv.planning.complete_uses import RuleUse, whole_conversions
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import quantized_table, untransposed_plan
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.models import matching
from automodel_conv.upstream.rules import RuleSet, natural_key

# What is left where nothing of a load is converted here, and reasons why.
ALL = "all that is converted"
NOT_OPENED_HERE = "some tensors are not in safetensors files that were opened under the hook"
WAITS_FOR_NAMES = "other tensors are renamed only if transformers sees its sources"


class Work(NamedTuple):
    """What is converted here: sources ``taken``, to buffers on the devices where the parameters will be."""

    plan: CopyPlan
    checkpoint: Checkpoint
    devices: dict[str, torch.device]
    taken: frozenset[str]


def planned(
    model: Any,
    state_dict: Mapping[str, Any],
    load_config: Any,
    plain: PlainLoad,
    rules: RuleSet,
    tp_plan: Mapping[str, Any],
) -> tuple[Work | None, dict[str, str]]:
    """The work that is done here, if any, and what is left to transformers with the reason."""
    if plain.why_not is not None:
        return None, {ALL: plain.why_not}
    if not rules.converters and plain.config is None:
        return None, {}
    slices = {name: source for name, source in state_dict.items() if isinstance(source, Slice)}
    if len(slices) < len(state_dict):
        return None, {ALL: NOT_OPENED_HERE}
    made = type(torch.empty(0, device="cpu"))
    if made is not Tensor:
        return None, {ALL: f"torch makes {made.__name__} here, and nothing can be read into one"}
    try:
        checkpoint = checkpoint_of(slices)
    except CheckpointError as error:  # which transformers may read all the same
        return None, {ALL: str(error)}
    wanted = _wanted_by(model, load_config, tp_plan)
    sources = SourceTable.from_checkpoint(checkpoint)
    if plain.config is not None:
        try:
            sources = quantized_table(sources, plain.config, like_upstream=True)
        except (QuantizationError, UnsupportedError) as error:  # which transformers may load, or tells in its own way
            return None, {ALL: error.reason()}
    first, meant, stored = None, sources, range(len(sources.names))
    if any(decode.stored_transposed for decode in sources.decodes.values()):
        first = untransposed_plan(sources)
        meant, stored = table_of(first.targets), [target.sources[0] for target in first.targets]
    coded = {row for row, own in enumerate(stored) if own in sources.decodes} if sources.decodes else set()
    specs = {name: want.spec for name, want in wanted.items()}
    found, left = whole_conversions(meant, rules, specs, coded)
    uses: list[RuleUse] = []
    for use in found:
        use = use._replace(rows=tuple(stored[row] for row in use.rows))
        reason = _why_left(use, wanted, rules, sources)
        if reason is None:
            uses.append(use)
        else:
            left[use.targets[0].name] = reason
    taken = frozenset(checkpoint.names[row] for row in _rows_taken(uses, sources))
    if _renames_otherwise_without(taken, load_config.weight_mapping, model, state_dict):
        left |= {use.targets[0].name: WAITS_FOR_NAMES for use in uses}
        uses = []
    if not uses:
        return None, left
    texts = tuple(rules.describe(row) for row in range(len(rules.converters)))
    plan = CopyPlan(meant, tuple(target for use in uses for target in use.targets), texts)
    plan.validate()
    plan = plan if first is None else first.then(plan)
    devices = {target.name: torch.device(wanted[target.name].device) for target in plan.targets}
    return Work(plan, checkpoint, devices, taken), left


def _rows_taken(uses: Iterable[RuleUse], sources: SourceTable) -> set[int]:
    """Rows that transformers must not see: those of these uses, and hidden ones that are part of no decoding."""
    rows = {row for use in uses for row in use.rows}
    parts = {part for decode in sources.decodes.values() for part in decode.parts}
    rows |= {part for row in rows & sources.decodes.keys() for part in sources.decodes[row].parts}
    return rows | (sources.hidden - parts)


class _Want(NamedTuple):
    """What a parameter must become, and where; why it cannot be made here, if it cannot."""

    spec: TargetSpec
    device: Any
    why_not: str | None


def _wanted_by(model: Any, load_config: Any, tp_plan: Mapping[str, Any]) -> dict[str, _Want]:
    from transformers.integrations.accelerate import expand_device_map

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    devices = expand_device_map(load_config.device_map or {"": "cpu"}, list(state))
    planned, sharded = matching(load_config.dtype_plan or {}), matching(tp_plan)
    wanted = {}
    for name, tensor in state.items():
        # As transformers does: what the plan of dtypes says, or else what the parameter has.
        code = dtype_code(planned(name) or tensor.dtype)
        device, why_not = devices[name], None
        if hasattr(tensor, "placements") or sharded(name) is not None:
            why_not = "it is sharded while it is loaded"
        elif device == "disk" or code is None:
            why_not = f"it is {tensor.dtype} on {device}"
        elif torch.device(device).type not in ("cpu", "cuda"):
            why_not = f"it goes to {device}"
        wanted[name] = _Want(TargetSpec(code or "", tuple(tensor.shape)), device, why_not)
    return wanted


def _renames_otherwise_without(taken: Container[str], rules: list[Any], model: Any, names: Iterable[str]) -> bool:
    """Whether some of the other names would be renamed differently if ``taken`` were not seen: GroupWeightRename."""
    if not any(hasattr(rule, "_active") for rule in rules):
        return False
    with_all, with_rest = RuleSet(rules, model), RuleSet(rules, model)
    ordered = sorted(names, key=natural_key)
    renamed = {name: with_all.rename(name) for name in ordered}
    return any(with_rest.rename(name) != renamed[name] for name in ordered if name not in taken)


def _why_left(use: RuleUse, wanted: Mapping[str, _Want], rules: RuleSet, sources: SourceTable) -> str | None:
    for row in use.rows:
        decode = sources.decodes.get(row)
        if decode is not None and not rounds_alike(decode, sources.dtypes[row], use.targets[0].dtype):
            return "transformers rounds its numbers on the way in another dtype"
        if sources.decodes and decode is None and sources.dtypes[row] != use.targets[0].dtype:
            return "transformers may leave it in its stored dtype"
    for target in use.targets:
        if wanted[target.name].why_not is not None:
            return wanted[target.name].why_not
        if rules.with_prefix(target.name, wanted) != target.name:
            return "transformers would change the prefix of its name once more"
    if len({target.dtype for target in use.targets}) > 1:
        return "its targets differ in dtype, and transformers casts before it converts"
    return None
