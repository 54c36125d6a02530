"""Small real models of every transformers type whose checkpoints need tensor conversion.

Driven by the installed conversion registry, so another transformers gives another list. Nothing is downloaded: a model
is the default config of its type with small sizes (`sizes.py`), built by the class its checkpoints name, and filled
with seeded random values. `write_checkpoint` saves it by `save_pretrained` of transformers, which splits it into the
names and shapes of the published checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    conversion_mapping,
    modeling_utils,
)
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, build_glob_alternation, revert_weight_conversion
from transformers.models.auto import modeling_auto

from .sizes import (
    ALWAYS,
    EQUAL_SIZES,
    EXTRAS,
    OVERRIDES,
    SIZES,
    TOWER_EQUAL_SIZES,
    TOWER_SIZES,
    TRANSPOSED_ON_DISK,
    UNEQUAL,
)

if TYPE_CHECKING:
    import pytest

DTYPE = torch.bfloat16

# Types that cannot be built small, with the reason. `test_model_zoo` fails for a type that neither builds nor is listed
# here, and for an entry that does build.
EXCLUDED: dict[str, str] = {}

# If one operation makes several tensors of several, transformers writes them in another order. This matters only if a
# file ends between them.
OTHER_ORDER = {"ernie4_5_vl_moe"}

# Class names of checkpoints, most specific first. Composite configs use their multimodal classes first: their causal
# language model may not accept the composite config.
_COMPOSITE_HEADS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING",
)
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    *_COMPOSITE_HEADS,
    "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)
_TOWER = re.compile("Vision|Audio|Sam|Dino|Radio|Sapiens")


def model_types_with_converters() -> list[str]:
    """Return keys of the installed registry (model types and class names) that have a WeightConverter."""
    return sorted(
        name
        for name, rules in _build_checkpoint_conversion_mapping().items()
        if any(isinstance(rule, WeightConverter) for rule in rules)
    )


def extra_models() -> list[str]:
    """Return names of `EXTRAS` for which the installed transformers has all model types."""
    return [
        name
        for name, (model_type, changes) in EXTRAS.items()
        if {model_type, *(v for v in changes.values() if isinstance(v, str))} <= set(CONFIG_MAPPING)
    ]


def equal_names() -> list[tuple[str, str]]:
    """Return the pairs of name and `equal` that `build_model` accepts."""
    names = [name for name in zoo_names() if name not in EXCLUDED]
    return [
        (name, equal) for name in names for equal in EQUAL_SIZES if name not in UNEQUAL or UNEQUAL[name][0] not in equal
    ]


def zoo_names() -> list[str]:
    """Return all names that `build_model` accepts: converted types, then extras."""
    return list(dict.fromkeys([*model_types_with_converters(), *extra_models()]))


def build_model(name: str, *, seed: int = 0, equal: str | None = None) -> PreTrainedModel:
    """Build a tiny random bf16 model for a registry key or an extra.

    For a class name, or a model type without its own class in the Auto mappings, it is the smallest whole model that
    contains it, so that the rules are scoped as in real checkpoints.

    `equal`: which sizes are equal, a key of `EQUAL_SIZES`.

    Raises:
        LookupError: no model class of the installed transformers contains the key.
    """
    model = _build(name, equal)
    fill(model, seed)
    return model.eval()


def build_on_meta(name: str, *, equal: str | None = None) -> PreTrainedModel:
    """Build the model of `build_model` on the meta device."""
    with torch.device("meta"):
        return _build(name, equal).eval()


def _build(name: str, equal: str | None) -> PreTrainedModel:
    if name not in EXTRAS:
        return _build_around(name, equal)
    model_type, changes = EXTRAS[name]
    config_class = CONFIG_MAPPING[model_type]
    return _instantiate(_heads(config_class)[0], small_config(config_class, equal, **changes))


def build_published(config: Mapping[str, Any], directory: Path, *, seed: int = 0) -> PreTrainedModel:
    """Build a random bf16 model of a ``config.json``, which is written to ``directory`` and read from there.

    Its class is the published one, or the first one of its model type.
    """
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(directory)
    published = getattr(transformers, config["architectures"][0], None)
    model = _instantiate(published or _heads(type(read))[0], read)
    fill(model, seed)
    return model.eval()


def is_kept_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Return whether ``from_pretrained`` loads a parameter as float32 where float16 is asked for."""
    patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return any(re.search(rf"(?:^|\.){re.escape(pattern)}(?:\.|$)", name) for pattern in patterns)


def write_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    max_shard_size: int | None = None,
    *,
    original_format: bool = True,
) -> None:
    """Save with `save_pretrained` of transformers, by default in about four shards.

    `original_format`: names and shapes of the published checkpoints (per expert, if they are); otherwise those of the
    model's own state dict, which transformers loads as well.
    """
    state_dict = model.state_dict()
    if max_shard_size is None:
        max_shard_size = sum(t.numel() * t.element_size() for t in state_dict.values()) // 4
    if original_format and is_transposed_on_disk(model):
        state_dict = published_tensors(model)
        original_format = False
    model.save_pretrained(
        directory,
        state_dict=state_dict,
        max_shard_size=max_shard_size,
        save_original_format=original_format,
    )


def is_transposed_on_disk(model: PreTrainedModel) -> bool:
    """Return whether published checkpoints have tensors transposed that `save_pretrained` does not transpose."""
    return model.config.model_type in TRANSPOSED_ON_DISK


def published_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the published checkpoint of a model, without tied ones; also on the meta device."""
    state_dict = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    if not is_transposed_on_disk(model):
        return revert_weight_conversion(model, state_dict)
    transposed = TRANSPOSED_ON_DISK[model.config.model_type]
    return {n: t.transpose(1, 2).contiguous() if re.search(transposed, n) else t for n, t in state_dict.items()}


def save_upstream(model: PreTrainedModel, directory: str | PathLike[str], max_shard_size: int) -> None:
    """Save with `save_pretrained`, but divide tensors that share memory as if they did not.

    transformers keeps experts that were one tensor in one file, because they are views of it; this package creates no
    such tensor.
    """
    real = modeling_utils.split_torch_state_dict_into_shards

    def split(tensors: dict[str, torch.Tensor], **options: Any) -> Any:
        return real({name: tensor.clone() for name, tensor in tensors.items()}, **options)

    with mock.patch.object(modeling_utils, "split_torch_state_dict_into_shards", split):
        model.save_pretrained(directory, max_shard_size=max_shard_size)


def isolate_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove rules that a test registers at its end; transformers keeps them for the whole process."""
    conversion_mapping.get_checkpoint_conversion_mapping("mixtral")  # fills the cache
    for name in ("_checkpoint_conversion_mapping_cache", "USER_REGISTERED_MAPPINGS"):
        if hasattr(conversion_mapping, name):  # the oldest supported release lacks the second
            monkeypatch.setattr(conversion_mapping, name, copy.copy(getattr(conversion_mapping, name)))


def small_config(config_class: type[PreTrainedConfig], equal: str | None = None, /, **changes: Any) -> PreTrainedConfig:
    """Return the default config of a class with small sizes, then `OVERRIDES`, then `EQUAL_SIZES`, then `changes`.

    A change of a sub-config is its new model type.
    """
    is_tower = _TOWER.search(config_class.__name__) is not None
    sizes = SIZES | TOWER_SIZES if is_tower else SIZES
    special = {} if equal is None else (TOWER_EQUAL_SIZES if is_tower else EQUAL_SIZES)[equal]
    sizes = sizes | special
    by_type = OVERRIDES.get(config_class.model_type or config_class.__name__, {})
    changes = {name: _like(value, special.get(name, value)) for name, value in by_type.items()} | changes
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        is_size = isinstance(field.default, int | list | tuple) and bool(field.default)
        if field.name in ALWAYS:
            values[field.name] = ALWAYS[field.name]
        elif field.name in sizes and is_size:
            values[field.name] = sizes[field.name]
    for name, sub_class in config_class.sub_configs.items():
        if name in changes:
            sub_class = CONFIG_MAPPING[changes.pop(name)]
        elif sub_class is AutoConfig:
            sub_class = type(getattr(config_class(), name))
        if issubclass(sub_class, PreTrainedConfig):
            # Dicts: some composite configs pass the value on as keyword arguments.
            values[name] = small_config(sub_class, equal).to_dict()
    return config_class(**(values | changes))


def _like(value: Any, size: Any) -> Any:
    """Return a size for each part if a type has several."""
    return [size] * len(value) if isinstance(value, list) and not isinstance(size, list) else size


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int = 0) -> None:
    """Overwrite every parameter and persistent buffer with random finite values, none of them 0.

    Floats have both signs, 16 exponents and any mantissa, so that neighbours hardly ever agree. Tensors that
    `from_pretrained` keeps in float32 become float32, with bits that bf16 would lose.
    """
    plan = model._get_dtype_plan(DTYPE)
    in_float32 = build_glob_alternation(list(plan))[0] if plan else None
    generator = torch.Generator().manual_seed(seed)
    persistent = model.state_dict().keys()
    tensors = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    for name, tensor in tensors.items():
        shape = tensor.shape
        if not tensor.is_floating_point():
            tensor.copy_(torch.randint(1, 8, shape, generator=generator))
            continue
        if in_float32 is not None and in_float32.search(name):
            tensor.data = tensor.data.float()
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        mantissa = 1 + torch.rand(shape, generator=generator)
        exponent = torch.randint(-12, 4, shape, generator=generator)
        tensor.copy_(sign * torch.ldexp(mantissa, exponent))


def _build_around(name: str, equal: str | None) -> PreTrainedModel:
    for model_class, config_class in _candidates(name):
        model = _instantiate(model_class, small_config(config_class, equal))
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and name in (
                type(module).__name__,
                module.config.model_type,
            ):
                return model
    raise LookupError(f"no model class of transformers {transformers.__version__} contains {name}")


def _instantiate(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    return model_class._from_config(config, dtype=DTYPE)


def _candidates(name: str) -> Iterator[tuple[type[PreTrainedModel], type[PreTrainedConfig]]]:
    """Yield classes that may contain a key: those of the model type, or else those of its hosts first."""
    if name in CONFIG_MAPPING:
        own_class, config_class = None, CONFIG_MAPPING[name]
        yield from ((head, config_class) for head in _heads(config_class))
    else:
        own_class = _find_model_class(name)
        config_class = own_class.config_class
    for host in _hosts(config_class):
        yield from ((head, host) for head in _heads(host))
    if own_class is not None:
        yield from ((head, config_class) for head in _heads(config_class))
        yield own_class, config_class


def _heads(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    names = (*_COMPOSITE_HEADS, *_HEADS) if config_class.sub_configs else _HEADS
    heads: list[type[PreTrainedModel]] = []
    for name in names:
        mapping = getattr(modeling_auto, name, None)  # the oldest supported release lacks some
        if mapping is not None and config_class in mapping:
            head = mapping[config_class]
            heads.extend(head if isinstance(head, list | tuple) else [head])
    return heads


def _hosts(config_class: type[PreTrainedConfig]) -> Iterator[type[PreTrainedConfig]]:
    """Yield composite configs of the same model folder that contain a config, nearest first."""
    for host in vars(importlib.import_module(config_class.__module__)).values():
        if isinstance(host, type) and issubclass(host, PreTrainedConfig) and config_class in host.sub_configs.values():
            yield host
            yield from _hosts(host)


def _find_model_class(name: str) -> type[PreTrainedModel]:
    for module, source in _modeling_sources().items():
        if f"\nclass {name}(" in source:
            return getattr(importlib.import_module(module), name)
    raise LookupError(f"no modeling file of transformers {transformers.__version__} defines {name}")


@functools.cache
def _modeling_sources() -> dict[str, str]:
    # Read the sources: importing every model takes minutes, and not all classes are exported.
    root = Path(transformers.__path__[0]) / "models"
    return {
        f"transformers.models.{path.parent.name}.{path.stem}": path.read_text(encoding="utf-8")
        for path in sorted(root.glob("*/modeling_*.py"))
    }
