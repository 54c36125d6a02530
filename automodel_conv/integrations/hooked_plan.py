"""Plan one load under the hook: which targets are converted by plan, and why others are left to transformers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.compiling.decoded import unpadded_table
from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import CheckpointError, QuantizationError, UnsupportedError
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.integrations.hooked_files import Slice, checkpoint_of
from automodel_conv.integrations.quantizers import PlainLoad, rounds_the_same
from automodel_conv.planning.arrangement import PLAIN
from automodel_conv.planning.complete_uses import RuleUse, whole_conversions
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import arranged_plan, padding_suspects, quantized_table
from automodel_conv.planning.schemes import implied_config
from automodel_conv.planning.wanted import TargetSpec
from automodel_conv.upstream.models import matching
from automodel_conv.upstream.rules import RuleSet, natural_key

# The key of ``HookedLoad.left`` if no target of a load is planned, and reasons for leaving targets to transformers.
ALL = "all targets"
NOT_OPENED_HERE = "some tensors are not in safetensors files that were opened under the hook"
WAITS_FOR_NAMES = "other tensors are renamed only if transformers sees its sources"


class PlannedLoad(NamedTuple):
    """The part of a load that is converted by plan."""

    plan: CopyPlan
    checkpoint: Checkpoint
    devices: dict[str, torch.device]
    """Device of each target's parameter, where its buffer is allocated."""
    consumed: frozenset[str]
    """Names of the sources that transformers must not load again."""


def plan_load(
    model: Any,
    state_dict: Mapping[str, Any],
    load_config: Any,
    plain: PlainLoad,
    rules: RuleSet,
    tp_plan: Mapping[str, Any],
) -> tuple[PlannedLoad | None, dict[str, str]]:
    """Plan the part of a load that is converted here.

    Args:
        model: model that is loaded.
        state_dict: tensors or lazy slices that transformers is about to load.
        load_config: configuration of this load by transformers.
        plain: the load without its quantizer.
        rules: rules of ``plain``.
        tp_plan: parameters that transformers shards while loading them.

    Returns:
        The planned part, None if there is none, and the reason for each target that is left to transformers.
    """
    if plain.why_not is not None:
        return None, {ALL: plain.why_not}
    if not rules.converters and plain.config is None:
        return None, {}
    slices = {name: source for name, source in state_dict.items() if isinstance(source, Slice)}
    if len(slices) < len(state_dict):
        return None, {ALL: NOT_OPENED_HERE}
    kind = type(torch.empty(0, device="cpu"))
    if kind is not Tensor:
        return None, {ALL: f"torch creates {kind.__name__} here, which cannot be read into"}
    try:
        checkpoint = checkpoint_of(slices)
    except CheckpointError as error:  # transformers may be able to read it
        return None, {ALL: error.reason()}
    parameters = _parameters_of(model, load_config, tp_plan)
    sources = SourceTable.from_checkpoint(checkpoint)
    config = plain.config or implied_config(getattr(model.config, "model_type", None))
    if config is not None:
        try:
            decoded = quantized_table(sources, config, like_upstream=True)
            sources = unpadded_table(checkpoint, decoded, padding_suspects(sources, decoded, config))
        except (QuantizationError, UnsupportedError) as error:  # transformers may load it, or raises its own error
            return None, {ALL: error.reason()}
    arranging, arranged, stored_rows = None, sources, range(len(sources.names))
    if any(decode.arrangement != PLAIN for decode in sources.decodes.values()):
        arranging = arranged_plan(sources)
        arranged = table_of(arranging.targets)
        stored_rows = [target.sources[0] for target in arranging.targets]
    coded = {row for row, stored in enumerate(stored_rows) if stored in sources.decodes} if sources.decodes else set()
    specs = {name: parameter.spec for name, parameter in parameters.items()}
    candidates, left = whole_conversions(arranged, rules, specs, coded)
    uses: list[RuleUse] = []
    for use in candidates:
        use = use._replace(rows=tuple(stored_rows[row] for row in use.rows))
        reason = _why_left(use, parameters, rules, sources)
        if reason is None:
            uses.append(use)
        else:
            left[use.targets[0].name] = reason
    consumed = frozenset(checkpoint.names[row] for row in _consumed_rows(uses, sources))
    if _changes_other_names(consumed, load_config.weight_mapping, model, state_dict):
        left |= {use.targets[0].name: WAITS_FOR_NAMES for use in uses}
        uses = []
    if not uses:
        return None, left
    texts = tuple(rules.describe(row) for row in range(len(rules.converters)))
    plan = CopyPlan(arranged, tuple(target for use in uses for target in use.targets), texts)
    plan.validate()
    plan = plan if arranging is None else arranging.then(plan)
    devices = {target.name: torch.device(parameters[target.name].device) for target in plan.targets}
    return PlannedLoad(plan, checkpoint, devices, consumed), left


def _consumed_rows(uses: Iterable[RuleUse], sources: SourceTable) -> set[int]:
    """Return the rows that transformers must not load: the rows of these uses, and hidden rows that decode nothing."""
    rows = {row for use in uses for row in use.rows}
    parts = {part for decode in sources.decodes.values() for part in decode.parts}
    rows |= {part for row in rows & sources.decodes.keys() for part in sources.decodes[row].parts}
    return rows | (sources.hidden - parts)


class _Parameter(NamedTuple):
    """A parameter as it must be after the load."""

    spec: TargetSpec
    device: Any
    why_not: str | None
    """Reason why it cannot be filled by plan, if any."""


def _parameters_of(model: Any, load_config: Any, tp_plan: Mapping[str, Any]) -> dict[str, _Parameter]:
    from transformers.integrations.accelerate import expand_device_map

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    devices = expand_device_map(load_config.device_map or {"": "cpu"}, list(state))
    planned_dtype, sharded = matching(load_config.dtype_plan or {}), matching(tp_plan)
    parameters = {}
    for name, tensor in state.items():
        # As in transformers, the plan of dtypes takes precedence over the dtype of the parameter.
        code = dtype_code(planned_dtype(name) or tensor.dtype)
        device, why_not = devices[name], None
        if hasattr(tensor, "placements") or sharded(name) is not None:
            why_not = "it is sharded while it is loaded"
        elif device == "disk" or code is None:
            why_not = f"it is {tensor.dtype} on {device}"
        elif torch.device(device).type not in ("cpu", "cuda"):
            why_not = f"it goes to {device}"
        parameters[name] = _Parameter(TargetSpec(code or "", tuple(tensor.shape)), device, why_not)
    return parameters


def _changes_other_names(consumed: Container[str], rules: list[Any], model: Any, names: Iterable[str]) -> bool:
    """Return whether rules rename other names differently if they do not see ``consumed``, as GroupWeightRename may."""
    if not any(hasattr(rule, "_active") for rule in rules):
        return False
    with_all, with_rest = RuleSet(rules, model), RuleSet(rules, model)
    ordered = sorted(names, key=natural_key)
    renamed = {name: with_all.rename(name) for name in ordered}
    return any(with_rest.rename(name) != renamed[name] for name in ordered if name not in consumed)


def _why_left(use: RuleUse, parameters: Mapping[str, _Parameter], rules: RuleSet, sources: SourceTable) -> str | None:
    """Return the reason why a use of a rule is left to transformers, if any."""
    for row in use.rows:
        decode = sources.decodes.get(row)
        if decode is not None and not rounds_the_same(decode, sources.dtypes[row], use.targets[0].dtype):
            return "transformers rounds its values in another dtype before the cast"
        if sources.decodes and decode is None and sources.dtypes[row] != use.targets[0].dtype:
            return "transformers may leave it in its stored dtype"
    for target in use.targets:
        if parameters[target.name].why_not is not None:
            return parameters[target.name].why_not
        if rules.with_prefix(target.name, parameters) != target.name:
            return "transformers would change the prefix of its name once more"
    if len({target.dtype for target in use.targets}) > 1:
        return "its targets differ in dtype, and transformers casts before it converts"
    return None
