"""Run one load under the hook: execute the plan, and pass the remaining tensors to transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from automodel_conv.errors import listing, printable, size_text
from automodel_conv.execution.filling import Limits, fill
from automodel_conv.execution.mapping import map_targets, mapped_or_new, without_targets
from automodel_conv.execution.report_text import NAMES_SHOWN
from automodel_conv.integrations.codes import refuse_codes
from automodel_conv.integrations.hooked_adapters import refuse_lost_adapters
from automodel_conv.integrations.hooked_experts import refuse_other_names
from automodel_conv.integrations.hooked_files import unindexed_in
from automodel_conv.integrations.hooked_plan import ALL, plan_load
from automodel_conv.integrations.hooked_squares import refuse_unplanned, transposed_squares
from automodel_conv.integrations.marked import refuse_other_layouts
from automodel_conv.integrations.quantizers import plain_load
from automodel_conv.planning.resolve import resolve
from automodel_conv.upstream.rules import RuleSet


class HookedLoad(NamedTuple):
    """A report of how the targets of one load were converted."""

    model: str
    """Name of the model's class."""
    lowered: tuple[str, ...]
    """Names of the targets that were converted by plan."""
    left: Mapping[str, str]
    """Reason for each target that transformers converted. A single entry ``ALL`` if no target was planned at all."""
    left_out: tuple[str, ...] = ()
    """Names of the tensors in the checkpoint and in its files that no parameter consumes, including those that the
    model ignores."""
    unindexed: tuple[tuple[str, str], ...] = ()
    """Name and file name of each tensor that was not loaded because the index does not assign it to its file, sorted by
    file and then by name."""
    bytes_mapped: int = 0
    """Bytes of ``lowered`` that were mapped instead of read (``memory_map=True``)."""

    def __repr__(self) -> str:
        left = "all" if ALL in self.left else len(self.left)
        return f"<HookedLoad of {self.model}: {len(self.lowered)} by plan, {left} by transformers; print() shows why>"

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        kinds = [(f"by transformers: {reason}", names) for reason, names in by_reason.items()]
        kinds.append(("left out: no parameter consumes them", [*self.left_out]))
        kinds.append(
            (
                "not loaded: the index assigns them to another file or to none",
                [f"{name} of {file}" for name, file in self.unindexed],
            )
        )
        left = "all by transformers"
        if ALL not in self.left:
            left = f"{len(self.left)} by transformers; all other tensors need no conversion"
        lines = [f"{self.model}: {len(self.lowered)} converted by plan, {left}"]
        lines += [f"  mapped: {size_text(self.bytes_mapped)}"] if self.bytes_mapped else []
        for label, names in kinds:
            if names == [ALL]:
                lines.append(f"  {label}")
            elif names:
                lines.append(f"  {len(names)} {label}\n{listing(names, NAMES_SHOWN)}")
        return printable("\n".join(lines))


def wrap_converter(
    convert: Callable[..., Any],
    is_on: Callable[[], bool],
    maps: Callable[[], bool],
    done: Callable[[HookedLoad], None],
) -> Callable[..., Any]:
    """Wrap transformers' converter of tensors, so that it is called only for tensors that are not loaded by plan.

    Args:
        convert: ``convert_and_load_state_dict_in_model`` of transformers.
        is_on: function that returns whether the hook is still installed.
        maps: function that returns whether ``memory_map`` is requested.
        done: function that receives the report of each load.
    """
    from transformers.utils.import_utils import is_env_variable_true

    @functools.wraps(convert)
    def converted(model: Any, state_dict: dict[str, Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_on():
            return convert(model, state_dict, load_config, *args, **kwargs)
        refuse_lost_adapters(model)
        refuse_other_layouts(model, state_dict)
        unindexed = unindexed_in(state_dict)
        plain = plain_load(load_config.hf_quantizer, load_config.weight_mapping)
        objects = [rule for rule in plain.rules if rule is not None]
        rules = RuleSet(objects, model)
        # Before transformers 5.17 a plan states which parameters are sharded; since then the parameters do.
        sharded = kwargs.get("tp_plan") if load_config.device_mesh is not None else None
        # A separate rule set, since ``rules`` records below which rules this load has used.
        transposed = transposed_squares(model, state_dict, RuleSet(objects, model))
        planned, left = plan_load(model, state_dict, load_config, plain, rules, sharded or {})
        refuse_unplanned(transposed, planned, left, model)
        rest = state_dict
        if planned is not None:
            rest = {name: source for name, source in state_dict.items() if name not in planned.consumed}
        refuse_codes(model, rest, load_config)
        names = list(state_dict)
        all_rules = RuleSet(load_config.weight_mapping, model)
        resolution = resolve(names, all_rules, model.state_dict())
        refuse_other_names(model, state_dict, names, resolution, all_rules)
        left_out = (
            *(names[row] for row in resolution.unclaimed),
            *(name for name, _ in unindexed if name not in state_dict),
        )
        if planned is None:
            result = convert(model, state_dict, load_config, *args, **kwargs)
            done(HookedLoad(type(model).__name__, (), left, left_out, unindexed))
            return result
        mapped = map_targets(planned.plan, planned.checkpoint, planned.devices) if maps() else {}
        buffers = mapped_or_new(planned.plan.targets, mapped, planned.devices)
        # Follow the setting by which users of transformers disable its threads.
        threads = 1 if is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD") else None
        fill(without_targets(planned.plan, mapped), planned.checkpoint, buffers, Limits(threads))
        plain_config = replace(load_config, weight_mapping=[], hf_quantizer=None)
        converted_info, *_ = convert(model, buffers, plain_config, *args, **kwargs)
        # transformers saves the model by the rules that the load has used.
        used = iter(rules.used)
        for rule, own in zip(load_config.weight_mapping, plain.rules, strict=True):
            if (planned.plan.sources.decodes if own is None else next(used)) and hasattr(rule, "_was_used"):
                rule._was_used = True
        rest_info, *others = convert(model, rest, load_config, *args, **kwargs)
        _merge(rest_info, converted_info)
        lowered = tuple(target.name for target in planned.plan.targets)
        bytes_mapped = sum(tensor.nbytes for tensor in mapped.values())
        done(HookedLoad(type(model).__name__, lowered, left, left_out, unindexed, bytes_mapped))
        return (rest_info, *others)

    return converted


def _merge(info: Any, other: Any) -> None:
    """Merge the loading info of another call into ``info``.

    A key is missing only if both calls miss it.
    """
    info.missing_keys &= other.missing_keys
    for name in ("unexpected_keys", "mismatched_keys", "skipped_pp_keys"):
        if hasattr(info, name):
            getattr(info, name).update(getattr(other, name))
    info.conversion_errors.update(other.conversion_errors)
    info.error_msgs.extend(other.error_msgs)
