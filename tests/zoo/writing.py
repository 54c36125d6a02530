"""Write a published checkpoint, shrunk, and its twin: the same names with the decoded values, not quantized.

transformers' model of the type, made from the small config, is saved by ``save_pretrained``, which writes the published
names. Weights are then quantized as the record says, and draft layers and scales of the KV cache are added. The twin
is what transformers itself can load, whatever the format.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import automodel_conv as amc
from tests.kernels.test_code_tables import rounded
from tests.model_zoo import build_published, write_checkpoint
from tests.quantized.per_expert import GROUPED, divided
from tests.zoo.formats import FORMATS, Stored, float_scales, generator_of
from tests.zoo.published import Draft, Published

FILES = 3


class Written(NamedTuple):
    """A checkpoint on disk."""

    directory: Path
    """The published form."""
    twin: Path
    """The decoded values under the same names."""
    stored: Mapping[str, Tensor]
    """The tensors of ``directory``."""
    model_class: type[PreTrainedModel]


def write(record: Published, directory: Path) -> Written:
    """Write the checkpoint of a record and its twin."""
    model = build_published(readable_config(record), directory / "model")
    write_checkpoint(model, directory / "model", 1 << 40)
    saved = load_file(directory / "model" / "model.safetensors")
    dtype = getattr(torch, record.config.get("dtype", "bfloat16"))
    stated = {name: tensor.to(dtype) if tensor.dtype == torch.bfloat16 else tensor for name, tensor in saved.items()}
    tensors = {renamed(name, record.renames): tensor for name, tensor in stated.items()}
    if record.draft is not None:
        tensors |= drafted(tensors, record.draft)
    names = list(tensors)
    if record.divides_experts:
        tensors = divided(tensors, model)
    stored, values = quantized(record, tensors)
    if record.cache_scales:
        stored |= cache_scales(stored)
    save(stored, directory / "published", published_config(record), record.modelopt)
    save(grouped(values, names), directory / "twin", readable_config(record), None)
    return Written(directory / "published", directory / "twin", stored, type(model))


def is_recent() -> bool:
    """Return whether the installed transformers is recent: older ones decode less, and have other errors."""
    return Version(transformers.__version__) >= Version("5.23")


def is_known(record: Published) -> bool:
    """Return whether the installed transformers has the model type."""
    return readable_config(record)["model_type"] in CONFIG_MAPPING


def readable_config(record: Published) -> dict[str, Any]:
    """Return the config without quantization, as transformers can read it."""
    return copy.deepcopy({**record.config, **record.readable})


def published_config(record: Published) -> dict[str, Any]:
    config = copy.deepcopy(dict(record.config))
    part = config["text_config"] if record.settings_in_text else config
    if record.settings is not None:
        part["quantization_config"] = dict(record.settings)
    return config


def renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def grouped(values: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return values with the experts that ``divided`` divided grouped again, as the type has them."""
    left = dict(values)
    for name in names:
        end = next((end for end in GROUPED if name.endswith(f".{end}")), None)
        module = name.removesuffix(end or "").removesuffix("experts.") + "experts."
        parts = ("gate_proj", "up_proj") if end and GROUPED[end] == "gate_up_proj" else ("down_proj",)
        if end is None or f"{module}0.{parts[0]}.weight" not in left:
            continue
        experts = 1 + max(int(key.split(".")[-3]) for key in left if key.startswith(module))
        left[name] = torch.stack(
            [torch.cat([left.pop(f"{module}{expert}.{part}.weight") for part in parts]) for expert in range(experts)]
        )
    return left


def arranged(tensors: Mapping[str, Tensor], model_type: str, layout: str) -> dict[str, Tensor]:
    """Return a model's state dict with its experts in a layout. No layout is that of Llama-4's, ``[E, in, out]``."""
    if model_type == "llama4":
        transposed = {
            name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".experts." in name
        }
        tensors = {**tensors, **transposed}
    own = "gpt_oss" if model_type == "gpt_oss" else "transformers"
    return amc.convert_state_dict(dict(tensors), rules=[], source_layout=own, layout=layout)


def drafted(tensors: Mapping[str, Tensor], draft: Draft) -> dict[str, Tensor]:
    """Return the tensors of draft layers."""
    copies = {
        draft.to + name.removeprefix(draft.layer): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(draft.layer)
    }
    further = {
        name: torch.randn(shape, generator=generator_of(name)).bfloat16() for name, shape in draft.further.items()
    }
    return copies | further


def quantized(record: Published, tensors: Mapping[str, Tensor]) -> tuple[Stored, Stored]:
    """Return the tensors as published, and as values under the names of the weights."""
    stored: Stored = {}
    values: Stored = {}
    for name, tensor in tensors.items():
        found = next((format for pattern, format in record.formats if re.search(pattern, name)), "no")
        if found == "no" or tensor.dim() < 2:
            stored[name] = values[name] = tensor
            continue
        parts, exact = FORMATS[found].make(tuple(tensor.shape), generator_of(name))
        if record.scale_dtype != "same":
            parts, exact = _with_scales(parts, exact, getattr(torch, record.scale_dtype))
        stored |= {part_name(name, suffix): part.contiguous() for suffix, part in parts.items()}
        values[name] = rounded(exact.contiguous().numpy(), torch.bfloat16)
    return stored, values


def _with_scales(parts: Stored, exact: Tensor, dtype: torch.dtype) -> tuple[Stored, Tensor]:
    """Round block scales of 128 x 128 to a dtype."""
    codes, scales = parts[""], parts["_scale_inv"].to(dtype)
    wide = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return {"": codes, "_scale_inv": scales}, codes.double() * wide[: codes.shape[0], : codes.shape[1]]


def part_name(weight: str, suffix: str) -> str:
    if suffix.startswith("../"):
        return f"{weight.rsplit('.', 2)[0]}.{suffix[3:]}"
    return weight.removesuffix(".weight") + suffix if suffix.startswith(".") else weight + suffix


def cache_scales(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scales of a quantized KV cache, next to the keys and values of each attention."""
    modules = {
        match[1] for name in stored if (match := re.match(r"(.*(?:self_attn|mixer))\.(?:k_proj|kv_b_proj)\.", name))
    }
    names = [f"{module}.{part}_proj.{part}_scale" for module in sorted(modules) for part in "kv"]
    return {name: float_scales((), generator_of(name)) for name in names}


def save(
    tensors: Mapping[str, Tensor], directory: Path, config: Mapping[str, Any], modelopt: Mapping[str, Any] | None
) -> None:
    """Write tensors in several files with an index, a weight and its scales maybe in different ones."""
    directory.mkdir()
    names = list(tensors)
    weight_map = {}
    for file in range(FILES):
        chosen = names[file * len(names) // FILES : (file + 1) * len(names) // FILES]
        path = f"model-{file + 1:05}-of-{FILES:05}.safetensors"
        save_file({name: tensors[name] for name in chosen}, directory / path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, path)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    if modelopt is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps(modelopt))
