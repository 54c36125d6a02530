"""Random adapters of published checkpoints, and the weights that merging them gives, computed in float64.

The factors are dyadic: small integers, divided by 4. A delta then fits the 8 bits of a bfloat16, and its sum with a
weight those of a float32. So every correct merge gives the same bytes, whatever it computes first and in which dtype.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, WeightConverter
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import dot_natural_key, rename_source_key

PREFIX = "base_model.model."
RANK, ALPHA = 4, 8
UNTRAINED = 1
"""The expert that random adapters leave out."""

_EXPERT = re.compile(r"experts\.(\d+)\.")


Values = Callable[[Iterable[int], torch.Generator], Tensor]
"""Returns random values of a shape."""


class Factors(NamedTuple):
    """The two matrices of one adapted module: the delta is ``scale * b @ a``."""

    a: Tensor
    """``[rank, in]``"""
    b: Tensor
    """``[out, rank]``"""


class Adapter(NamedTuple):
    """An adapter: factors by the name of the module, without prefix, and the config of PEFT."""

    factors: Mapping[str, Factors]
    config: Mapping[str, Any]


def upstream_modules(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Return, by published module, the module that transformers loads its weight into; the first, if it is divided."""
    rules = get_model_conversion_mapping(model, add_legacy=False)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    targets = model.state_dict()

    def target_of(name: str) -> str:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, targets)[0]

    # In the order of transformers: some renamings depend on the names before.
    found = {name: target_of(name) for name in sorted(tensors, key=dot_natural_key)}
    return {n.removesuffix(".weight"): t.removesuffix(".weight") for n, t in found.items() if n.endswith(".weight")}


def expert_modules(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return modules of single experts, with the shapes of their weights."""
    return {module: shape for module, shape in _matrices(tensors).items() if _EXPERT.search(module)}


def linear_modules(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return published modules outside the experts that PEFT can adapt, with the shapes of their weights.

    These become linear layers of transformers' model, or its routers, which have a matrix named ``weight`` as well. A
    published matrix may be several layers of the model, or half of one.
    """
    owners = dict(model.named_modules())
    loaded = upstream_modules(model, tensors)

    def is_adaptable(published: str) -> bool:
        owner = owners.get(loaded[published])
        is_linear = isinstance(owner, nn.Linear) and owner is not model.get_output_embeddings()
        return not _EXPERT.search(published) and (is_linear or type(owner).__name__.endswith("Router"))

    return {published: shape for published, shape in _matrices(tensors).items() if is_adaptable(published)}


def some(modules: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Return two of three modules, always the same ones; of experts all but one, in all their projections."""

    def is_chosen(module: str) -> bool:
        expert = _EXPERT.search(module)
        return int(expert[1]) != UNTRAINED if expert else zlib.crc32(module.encode()) % 3 > 0

    return {module: shape for module, shape in modules.items() if is_chosen(module)}


def random_adapter(
    modules: Mapping[str, torch.Size], *, seed: int = 0, values: Values | None = None, **config: Any
) -> Adapter:
    """Return an adapter with random factors for each module.

    Args:
        modules: the modules, with the shapes of their weights.
        seed: seed of the values.
        values: function for the values of a shape; None: ``dyadic``.
        config: keys of PEFT's ``LoraConfig``.
    """
    values = values or dyadic
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(modules)} | config
    settings = LoraConfig(**chosen).to_dict()
    factors = {}
    for module, (rows, columns) in modules.items():
        rank = rank_of(settings, module)
        factors[module] = Factors(values((rank, columns), generator), values((rows, rank), generator))
    return Adapter(factors, {key: value for key, value in settings.items() if key not in ("peft_version",)})


def dyadic(shape: Iterable[int], generator: torch.Generator) -> Tensor:
    """Return random quarters from -1/2 to 1/2, in float32."""
    return torch.randint(-2, 3, tuple(shape), generator=generator) / 4


def gaussian(shape: Iterable[int], generator: torch.Generator) -> Tensor:
    """Return random float32 values, with bits that bfloat16 would lose."""
    return torch.randn(tuple(shape), generator=generator)


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Return the rank of a module by the config."""
    ranks = config["rank_pattern"] or {}
    return ranks.get(get_pattern_key(list(ranks), module), config["r"])


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """Return the scale of a module by the config."""
    alphas = config["alpha_pattern"] or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    rank = rank_of(config, module)
    return alpha / rank**0.5 if config["use_rslora"] else alpha / rank


def write_adapter(directory: Path, adapter: Adapter) -> Path:
    """Write an adapter as PEFT does."""
    directory.mkdir(parents=True)
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.config.items()}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {}
    for module, (a, b) in adapter.factors.items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter whose modules have two-dimensional factors with a rank of their own."""
    tensors = load_file(directory / "adapter_model.safetensors")
    names = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    ends = ("lora_A.weight", "lora_B.weight")
    factors = {name: Factors(*(tensors.pop(f"{PREFIX}{name}.{end}") for end in ends)) for name in names}
    assert not tensors, f"no names of factors: {sorted(tensors)}"
    return Adapter(factors, read_config(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """Return the config of an adapter, with the defaults of PEFT."""
    return LoraConfig.from_pretrained(str(directory)).to_dict()


def merged(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Return all tensors of a published checkpoint after merging, each element rounded once."""
    result = dict(tensors)
    for module in adapter.factors:
        weight = tensors[f"{module}.weight"]
        result[f"{module}.weight"] = rounded_once(exact_sum(weight, adapter, module), weight.dtype)
    return result


def exact_sum(weight: Tensor, adapter: Adapter, module: str) -> Tensor:
    """Return the sum of the weight and the delta of a module, in float64."""
    a, b = adapter.factors[module]
    return weight.double() + scale_of(adapter.config, module) * (b.double() @ a.double())


def rounded_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values in a dtype. torch rounds them to float32 first, which must not round twice."""
    single = exact.float()
    assert dtype == torch.float32 or torch.equal(single.double(), exact), "the values need more bits than a float32 has"
    return single.to(dtype)


def load_with_peft(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Return a model with an adapter, after checking that it has all factors of the file, and no others.

    Names may differ: PEFT renames the modules of some types.
    """
    peft_model = PeftModel.from_pretrained(model, str(directory))
    stored = load_file(directory / "adapter_model.safetensors")
    assert counted(get_peft_model_state_dict(peft_model).values()) == counted(stored.values())
    return peft_model


def counted(tensors: Iterable[Tensor]) -> Counter[tuple[torch.Size, bytes]]:
    """Return how often each tensor occurs."""
    return Counter((tensor.shape, tensor.float().numpy().tobytes()) for tensor in tensors)


def _matrices(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {n.removesuffix(".weight"): t.shape for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2}
