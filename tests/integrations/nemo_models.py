"""Small models of NeMo AutoModel, and the adapters that they load checkpoints with.

Driven by the installed registry of architectures, so another release gives other models. A model is the default config
of its architecture with small sizes. Sizes are those of ``tests/model_zoo``; what they do not cover is data here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

pytest.importorskip("nemo_automodel", reason="its models are built")

import nemo_automodel
import torch
from nemo_automodel._transformers.registry import MODEL_ARCH_MAPPING
from nemo_automodel.components.models.common import BackendConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.model_zoo.sizes import ALWAYS, OVERRIDES, SIZES, TOWER_SIZES

_MODELS = Path(nemo_automodel.__path__[0]) / "components" / "models"
_TOWER = re.compile("Vision|Audio|Siglip|ViT|Vit")

_SIZES: dict[str, Any] = SIZES | {
    "share_expert_dims": 36,
    "patch_embed_hidden_dim": 32,
    "projector_hidden_size": 38,
    "vision_latent_dim": 40,
    "vision_output_dim": 48,
    "vision_layers": 2,
    "vision_heads": 5,
    "vision_adapter_dim": 38,
    "mel_vocab_size": 5,
    "n_mel_bins": 6,
    "rotary_dim": 8,
}
_TOWER_SIZES: dict[str, Any] = {"projection_dim": 48, "width": 40, "layers": 2, "heads": 5, "mlp_ratio": 2}

_GEMMA_EXPERTS = {
    "enable_moe_block": True,
    "moe_intermediate_size": 28,
    "num_experts": 12,
    "top_k_experts": 2,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 131,
}

# Codes of four bits are in blocks of 32 or in words of 8.
_IN_BLOCKS = {"hidden_size": 64, "moe_intermediate_size": 96, "n_routed_experts": 4}

# Values that sizes do not cover, by the name of a config class. A name of NeMo AutoModel or transformers as the value
# of a sub-config is its class.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "BagelConfig": {
        "vision_config": "bagel.modeling_siglip_navit.SiglipVisionConfig",
        "text_config": "qwen2",
        "vit_max_num_patch_per_side": 4,
    },
    "DeepseekV3Config": _IN_BLOCKS,
    "DeepseekV4Config": _IN_BLOCKS,
    "DeepseekV41TextConfig": {
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "engram_layer_ids": [],
        "engram_num_embeddings": [],
        **_IN_BLOCKS,
    },
    "DiffusionGemmaTextConfig": _GEMMA_EXPERTS,
    "Gemma4TextConfig": _GEMMA_EXPERTS,
    "Glm5NextTextConfig": {
        "num_key_value_heads": 6,
        "index_kpool": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "HunyuanImage3Config": {"hidden_size": 64},
    "KimiLinear48BConfig": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
            "num_heads": 5,
            "head_dim": 10,
            "short_conv_kernel_size": 4,
        },
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8,
        "v_head_dim": 14,
        "kv_lora_rank": 26,
        "mla_use_nope": True,
        "num_experts": 12,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 28,
        "num_shared_experts": 1,
    },
    "InklingTextConfig": {"dense_intermediate_size": 52},
    "KimiK3TextConfig": {
        **_IN_BLOCKS,
        "num_experts": 4,
        "routed_expert_hidden_size": 32,
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
            "num_heads": 5,
            "head_dim": 10,
            "short_conv_kernel_size": 4,
        },
    },
    "KimiK3VisionConfig": {
        "attn_implementation": "eager",
        "init_pos_emb_height": 6,
        "init_pos_emb_width": 5,
        "vt_hidden_size": 40,
        "vt_intermediate_size": 34,
        "vt_num_hidden_layers": 2,
        "vt_num_attention_heads": 5,
        "qkv_hidden_size": 40,
        "text_hidden_size": 64,
    },
    "MiMoV2Config": {"moe_layer_freq": [0, 1, 1], "n_routed_experts": 12},
    "Qwen2Config": {"pad_token_id": 0},
    "Qwen3OmniMoeThinkerConfig": {"pad_token_id": 0},
    "Qwen3_8_FlashNextConfig": {"language_model_only": True},
    "Qwen3_8_FlashNextTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 40,
        "make_ngram_vocab_size_divisible_by": 12,
        "split_ngram_parts": 12,
    },
    "Step3p7TextConfig": {
        "layer_types": ["full_attention"] * 3,
        "moe_layers_enum": [1, 2],
        "num_attention_groups": 2,
        "rope_theta": 10000.0,
    },
}

# The same for the config of an architecture.
_CHANGES: dict[str, dict[str, Any]] = {"Mistral3ForConditionalGeneration": {"text_config": "mistral4"}}

# Config classes of architectures whose model class states none and whose folder is not named as a model type.
_CONFIGS: dict[str, str] = {
    "HyMT2ForCausalLM": "hy_v3",
    "KimiVLForConditionalGeneration": "kimi_vl",
    "Mistral3ForConditionalGeneration": "mistral3",
    "NemotronHForCausalLM": "nemotron_h",
    "Step3p5ForCausalLM": "step3p7.configuration_step3p7.Step3p7TextConfig",
}

# Arguments of model classes that accept no such backend, or need more.
_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "BagelForUnifiedMultimodal": lambda: {"backend": None},
    "Qwen3_8_FlashNextForConditionalGeneration": lambda: {
        "engram_table_config": _class_named("qwen3_8_flash_next.engram.Qwen3_8_FlashNextEngramTableConfig")(24, 20)
    },
}
# Architectures that compute with tensors when they are built.
_ON_HOST = {"InklingForConditionalGeneration"}
_NORM = {"DeepseekV41ForCausalLM": "torch_fp32"}
_ATTENTION = {"GptOssForCausalLM": "flex"}


class Donor(NamedTuple):
    """Where an adapter without a model of its own gets its arguments and tensors from."""

    architecture: str
    renamed: Mapping[str, str]
    """Pattern of a name of the donor's tensor, and what it is here."""


# Adapters that no architecture of the registry has, or whose model cannot be built; the reason is next to it.
DONORS: dict[str, Donor] = {
    # The draft model of DeepSeek-V4.1.
    "DeepseekV41DSparkStateDictAdapter": Donor(
        "DeepseekV41ForCausalLM", {r"^model\.layers\.": "mtp.", r"^model\.embed_": "embed_"}
    ),
    # Its vision tower is remote code.
    "NemotronOmniStateDictAdapter": Donor("NemotronHForCausalLM", {"^": "language_model."}),
    # The registry has only the model with experts.
    "Ernie4_5StateDictAdapter": Donor("Ernie4_5_MoeForCausalLM", {}),
    # For encoders made of other models.
    "EncoderStateDictAdapter": Donor("Qwen3MoeForCausalLM", {}),
}
NOT_BUILT: dict[str, str] = {"NemotronH_Nano_Omni_Reasoning_V3": "no config class"}
"""Architectures that cannot be built, with the text of the error."""
WITHOUT_ADAPTER = ("Ministral3BidirectionalModel", "Ministral3ForCausalLM", "Mistral3BidirectionalModel")
"""Architectures without an adapter, in modules that have one for another architecture."""


class Built(NamedTuple):
    """The adapter of an architecture, and the tensors of a model of it."""

    adapter: Any
    tensors: Mapping[str, Tensor]


def adapter_classes() -> set[str]:
    """Return the names of all classes of adapters, read from the sources."""
    return {
        name
        for module in _modules()
        for name in re.findall(r"^class (\w+StateDictAdapter)\(", _source_of(module), re.MULTILINE)
    }


def architectures() -> list[str]:
    """Return an architecture for each model class of the registry whose module uses an adapter."""
    by_class = {tuple(row[:2]): name for name, row in reversed(MODEL_ARCH_MAPPING.items())}
    return sorted(name for (module, _), name in by_class.items() if "state_dict_adapter =" in _source_of(module))


def lend(name: str) -> Built:
    """Build an adapter with the arguments and the tensors of its donor."""
    donor, renamed = DONORS[name]
    config = tiny(config_class(donor), _CHANGES.get(donor, {}))
    adapter, tensors = build(donor)
    adapter_class = next(_imported(module, name) for module in _modules() if f"class {name}(" in _source_of(module))
    wanted = inspect.signature(adapter_class).parameters
    arguments = {key: config if key.endswith("config") else None for key in wanted}
    arguments |= {key: value for key, value in vars(adapter).items() if key in wanted and key != "config"}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    for pattern, replacement in renamed.items():
        tensors = {re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}
    return Built(adapter_class(**arguments), tensors)


def _modules() -> Iterator[str]:
    """Yield the names of all modules of models."""
    root = _MODELS.parents[2]
    for path in sorted(_MODELS.rglob("*.py")):
        yield ".".join(path.relative_to(root).with_suffix("").parts)


def _source_of(module: str) -> str:
    return (_MODELS.parents[2] / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


@functools.cache
def build(architecture: str) -> Built:
    """Build a small model; return its adapter, and its tensors without meaning."""
    model_class = _imported(*MODEL_ARCH_MAPPING[architecture][:2])
    config = tiny(config_class(architecture), _CHANGES.get(architecture, {}))
    device = torch.device("cpu" if architecture in _ON_HOST else "meta")
    with mock.patch.object(torch.cuda, "current_device", return_value=0), device, _On(device):
        model = model_class(config, **_arguments(architecture, model_class))
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    return Built(getattr(model, "state_dict_adapter", None), tensors)


class _On(TorchFunctionMode):
    """Creates on one device what a model creates on any."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = self._device
        return func(*args, **kwargs)


def _imported(module: str, name: str) -> Any:
    """Return an attribute of a module. Names that another transformers lacks become empty classes."""
    while True:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as error:
            lacks = re.match(r"cannot import name '(\w+)' from '(transformers[\w.]*)'", str(error))
            if lacks is None:
                raise
            setattr(importlib.import_module(lacks[2]), lacks[1], type(lacks[1], (), {}))


def _arguments(architecture: str, model_class: type[nn.Module]) -> dict[str, Any]:
    backend = BackendConfig(
        attn=_ATTENTION.get(architecture, "sdpa"),
        linear="torch",
        rms_norm=_NORM.get(architecture, "torch"),
        experts="torch_mm",
        dispatcher="torch",
        rope_fusion=False,
        enable_hf_state_dict_adapter=True,
    )
    takes_backend = any(
        "backend" in inspect.signature(base.__init__).parameters
        for base in model_class.__mro__
        if "__init__" in vars(base)
    )
    return ({"backend": backend} if takes_backend else {}) | _ARGUMENTS.get(architecture, dict)()


def config_class(architecture: str) -> type[PreTrainedConfig]:
    """Return the config class of an architecture."""
    module, name = MODEL_ARCH_MAPPING[architecture][:2]
    for candidate in _config_classes(architecture, _imported(module, name), module.split(".")[-2]):
        for option in typing.get_args(candidate) or (candidate,):
            if inspect.isclass(option) and issubclass(option, PreTrainedConfig) and option is not PreTrainedConfig:
                return option
    raise LookupError(f"no config class of {architecture}")


def _config_classes(architecture: str, model_class: type[nn.Module], folder: str) -> Iterator[Any]:
    if architecture in _CONFIGS:
        yield _class_named(_CONFIGS[architecture])
    yield getattr(model_class, "config_class", None)
    for method in ("from_config", "__init__"):
        if hasattr(model_class, method):
            yield typing.get_type_hints(getattr(model_class, method)).get("config")
    if folder in CONFIG_MAPPING:
        yield CONFIG_MAPPING[folder]


def _class_named(name: str) -> type[PreTrainedConfig]:
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]
    module, _, leaf = name.rpartition(".")
    return _imported(f"nemo_automodel.components.models.{module}", leaf)


def tiny(config: type[PreTrainedConfig], more: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return the default config of a class with small sizes, and with changes."""
    sizes = _SIZES | TOWER_SIZES | _TOWER_SIZES if _TOWER.search(config.__name__) else _SIZES
    defaults = _defaults(config)
    values: dict[str, Any] = {}
    for name, default in defaults.items():
        is_size = isinstance(default, int | float | list | tuple) and not isinstance(default, bool) and bool(default)
        if name in ALWAYS:
            values[name] = ALWAYS[name]
        elif name in sizes and is_size:
            values[name] = sizes[name]
    changes = OVERRIDES.get(config.model_type or config.__name__, {}) if _is_of_transformers(config) else {}
    changes = changes | _OVERRIDES.get(config.__name__, {}) | (more or {})
    given = {name for name in changes if name.endswith("_config") and isinstance(changes[name], str)}
    values |= changes | {name: tiny(_class_named(changes[name])) for name in given}
    parts = {name: part for name, part in vars(config()).items() if isinstance(part, PreTrainedConfig)}
    values |= {name: tiny(type(part)) for name, part in parts.items() if name in defaults and name not in given}
    return config(**values)


def _is_of_transformers(config: type[PreTrainedConfig]) -> bool:
    return config.__module__.startswith("transformers.")


def _defaults(config: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the arguments of a config class and of its bases, with their defaults."""
    defaults: dict[str, Any] = {}
    for base in reversed(config.__mro__):
        if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig:
            if dataclasses.is_dataclass(base):
                defaults |= {field.name: field.default for field in dataclasses.fields(base)}
            if "__init__" in vars(base):
                defaults |= {p.name: p.default for p in inspect.signature(base.__init__).parameters.values()}
    return defaults
