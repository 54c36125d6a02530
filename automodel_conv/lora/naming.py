"""Name the modules of an adapter in a form.

Source: PEFT 0.21.2, ``ParamWrapper`` in ``tuners/lora/layer.py`` and ``_inject_parameters`` in
``tuners/tuners_utils.py``; vLLM 0.33.0, ``_stack_moe_lora_weights`` in ``lora/model_manager.py`` and
``get_rank_and_scaling`` in ``lora/peft_helper.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from automodel_conv.lora.adapter import WRAPPED
from automodel_conv.lora.base import Base
from automodel_conv.lora.forms import TRANSFORMERS, VLLM, stated_in_vllm
from automodel_conv.lora.parts import NewModule

# Names of layers that PEFT takes for those of single experts wherever they are, in models with stacks of experts. It
# would look for their matrices in the stacks, so the weight of such a layer is wrapped as a parameter.
# Source: PEFT 0.21.2, ``_MOE_TARGET_MODULE_MAPPING`` in ``utils/transformers_weight_conversion.py``.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def named(modules: Sequence[NewModule], base: Base, form: str) -> Iterator[NewModule]:
    """Yield modules with their names in a form, and the stacks that the form needs in addition.

    Args:
        modules: modules named after the tensors of the base model that they belong to.
        base: the base model.
        form: name of the form.
    """
    by_path: dict[str, dict[str, NewModule]] = {}
    for module in modules:
        path, _, parameter = module.weight.rpartition(".")
        if _is_of_layer(module, path, parameter, base, form):
            yield module._replace(name=_in_file(path, base, form), stated=path)
        else:
            by_path.setdefault(path, {})[parameter] = module
    for path, group in by_path.items():
        if form == VLLM:
            group |= _zeros(path, group, base)
        order = [parameter for parameter in base.parameters_of(path) if parameter in group]
        place = path if form == TRANSFORMERS else base.paths_when_published[path]
        for depth, parameter in enumerate(reversed(order)):
            stated = f"{place}.{parameter}"
            if form == VLLM:
                stated = stated_in_vllm(place, parameter, depth, len(order))
            name = _in_file(place, base, form) + WRAPPED * depth
            yield group[parameter]._replace(name=name, stated=stated, is_parameter=True)


def _in_file(path: str, base: Base, form: str) -> str:
    """Return the name of a module in the file: its own, or if PEFT would change that, one that PEFT changes to it."""
    if form != TRANSFORMERS or base.renamed(path) == path:
        return path
    others = (base.paths_when_published.get(path), base.layers_when_published.get(path))
    return next((name for name in others if name is not None and base.renamed(name) == path), path)


def _is_of_layer(module: NewModule, path: str, parameter: str, base: Base, form: str) -> bool:
    """Return whether a module belongs to the weight of a layer, not to a parameter that PEFT wraps by its name."""
    if parameter != "weight":
        return False
    if form != TRANSFORMERS:
        return module.shape[0] == 1
    if base.has_stacks and path.rpartition(".")[2] in _TAKEN_FOR_EXPERTS:
        return False
    return isinstance(base.loading.model.get_submodule(path), (nn.Linear, nn.Embedding))


def _zeros(path: str, group: dict[str, NewModule], base: Base) -> dict[str, NewModule]:
    """Return modules of zeros for the stacks of a module that no adapter belongs to, because vLLM needs all of them."""
    first = next(iter(group.values()))
    zeros = {}
    for parameter in base.parameters_of(path):
        target = base.targets.get(f"{path}.{parameter}")
        if parameter in group or target is None or len(target.shape) != 3 or target.shape[0] != first.shape[0]:
            continue
        count, rows, columns = target.shape
        outputs, inputs = (rows, columns) if base.has_inputs_last(target) else (columns, rows)
        zeros[parameter] = NewModule(
            name=target.name,
            weight=target.name,
            stated=target.name,
            shape=(count, outputs, inputs),
            components=((),) * count,
            slots=(),
            starts=(),
            rank=first.rank,
            scale=first.scale,
        )
    return zeros
