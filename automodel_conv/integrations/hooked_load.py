"""Run one load under the hook: execute the plan, then let transformers load the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from automodel_conv.execution.filling import Limits, fill
from automodel_conv.execution.mapping import map_targets, with_new, without
from automodel_conv.integrations.codes import refuse_codes
from automodel_conv.integrations.hooked_files import unindexed_in
from automodel_conv.integrations.hooked_plan import planned
from automodel_conv.integrations.hooked_squares import refuse_left, square_and_transposed
from automodel_conv.integrations.quantizers import plain_load
from automodel_conv.planning.resolve import resolve
from automodel_conv.upstream.rules import RuleSet


class HookedLoad(NamedTuple):
    """What became of the tensors that a load converts."""

    model: str
    """Class of the model."""
    lowered: tuple[str, ...]
    """Targets made by plan."""
    left: Mapping[str, str]
    """Targets left to transformers, with the reason; one entry, ``ALL``, where nothing was looked at."""
    left_out: tuple[str, ...] = ()
    """Tensors of the checkpoint that no parameter takes, also those that the model says to ignore, and of its files."""
    unindexed: tuple[tuple[str, str], ...] = ()
    """Name and file name of each tensor that was not loaded, since the index does not give it to the file in which it
    lies; by file, then name."""
    bytes_mapped: int = 0
    """Bytes of ``lowered`` that were mapped, and so not read (``memory_map=True``)."""


def converting(
    convert: Callable[..., Any],
    is_on: Callable[[], bool],
    maps: Callable[[], bool],
    done: Callable[[HookedLoad], None],
) -> Callable[..., Any]:
    """transformers' converter of tensors, called for what is left to it once all else is loaded by plan.

    Args:
        is_on: whether the hook that this is a part of is still in place.
        maps: whether anybody has asked for ``memory_map``.
        done: takes each load that has ended.
    """
    from transformers.utils.import_utils import is_env_variable_true

    @functools.wraps(convert)
    def converted(model: Any, state_dict: dict[str, Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_on():
            return convert(model, state_dict, load_config, *args, **kwargs)
        unindexed = unindexed_in(state_dict)
        plain = plain_load(load_config.hf_quantizer, load_config.weight_mapping)
        objects = [rule for rule in plain.rules if rule is not None]
        rules = RuleSet(objects, model)
        # Before 5.17 a plan says what is sharded; since then the parameters do.
        sharded = kwargs.get("tp_plan") if load_config.device_mesh is not None else None
        # Rules of its own: the others are asked below which of them this load has used.
        turned = square_and_transposed(model, state_dict, RuleSet(objects, model))
        work, left = planned(model, state_dict, load_config, plain, rules, sharded or {})
        refuse_left(turned, work, left, model)
        rest = state_dict if work is None else {n: source for n, source in state_dict.items() if n not in work.taken}
        refuse_codes(model, rest, load_config)
        names = list(state_dict)
        unclaimed = resolve(names, RuleSet(load_config.weight_mapping, model), model.state_dict()).unclaimed
        left_out = (*(names[row] for row in unclaimed), *(name for name, _ in unindexed if name not in state_dict))
        if work is None:
            found = convert(model, state_dict, load_config, *args, **kwargs)
            done(HookedLoad(type(model).__name__, (), left, left_out, unindexed))
            return found
        mapped = map_targets(work.plan, work.checkpoint, work.devices) if maps() else {}
        buffers = with_new(work.plan.targets, mapped, work.devices)
        # As transformers itself does: without threads if its users have said so.
        threads = 1 if is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD") else None
        fill(without(work.plan, mapped), work.checkpoint, buffers, Limits(threads))
        of_plain = replace(load_config, weight_mapping=[], hf_quantizer=None)
        of_converted, *_ = convert(model, buffers, of_plain, *args, **kwargs)
        # Which rules a load has used decides how transformers saves the model.
        used = iter(rules.used)
        for rule, own in zip(load_config.weight_mapping, plain.rules, strict=True):
            if (work.plan.sources.decodes if own is None else next(used)) and hasattr(rule, "_was_used"):
                rule._was_used = True
        of_rest, *others = convert(model, rest, load_config, *args, **kwargs)
        _add(of_rest, of_converted)
        lowered = tuple(target.name for target in work.plan.targets)
        bytes_mapped = sum(tensor.nbytes for tensor in mapped.values())
        done(HookedLoad(type(model).__name__, lowered, left, left_out, unindexed, bytes_mapped))
        return (of_rest, *others)

    return converted


def _add(found: Any, of_converted: Any) -> None:
    """Add what the first call found to what the second did: a key is missing if both miss it."""
    found.missing_keys &= of_converted.missing_keys
    for name in ("unexpected_keys", "mismatched_keys", "skipped_pp_keys"):
        if hasattr(found, name):
            getattr(found, name).update(getattr(of_converted, name))
    found.conversion_errors.update(of_converted.conversion_errors)
    found.error_msgs.extend(of_converted.error_msgs)
