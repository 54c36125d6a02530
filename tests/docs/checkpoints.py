"""Small checkpoints under the names of published ones, for the code blocks of the documentation.

Each has the type, the tensor names, the quantization and the companion files of the published checkpoint, and small
sizes. Sizes of different axes differ, and blocks of FP8 divide every matrix or cover it whole, because transformers
reads the scales of other matrices as those of equal blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.quantized.producers import fine_grained

_BLOCK = (128, 128)
_DIALOG = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
_WORDS = "<unk> <s> </s> user assistant : a the is of to and in expert experts layer model loads reads writes".split()
_SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_DEEPSEEK_LINEAR = r"(self_attn\.\w+_proj(_with_mqa)?|mlp\.(shared_experts\.|experts\.\d+\.)?\w+_proj)\.weight$"


def write_all(directory: Path) -> Mapping[str, Path]:
    """Write every checkpoint below a directory, and return the folders by the names on the Hub."""
    folders = {name: directory / name for name in _WRITERS}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        _WRITERS[name](folder)
        _write_companions(folder, name)
    return folders


def folders_of(directory: Path) -> Mapping[str, Path]:
    """Return the folders that ``write_all`` has written below a directory, by the names on the Hub."""
    return {name: directory / name for name in _WRITERS}


def _qwen3(folder: Path) -> None:
    _save_pretrained(_qwen3_model(moe_intermediate_size=96, num_key_value_heads=2), folder)


def _qwen3_fp8(folder: Path) -> None:
    tensors = _published(_qwen3_model(moe_intermediate_size=256, num_key_value_heads=4), folder)
    _write(folder, _quantized(tensors, r"(self_attn|experts\.\d+)\.\w+_proj\.weight$"), fine_grained(_BLOCK).config)


def _deepseek_v3(folder: Path) -> None:
    tensors = _deepseek_v3_tensors(folder)
    # The layer of multi-token prediction, which has the number 61 in the published checkpoint.
    last = {n.replace(".2.", ".61.", 1): t.clone() for n, t in tensors.items() if n.startswith("model.layers.2.")}
    hidden = _SMALL["hidden_size"]
    generator = torch.Generator().manual_seed(61)
    norms = {f"model.layers.61.{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in ("enorm", "hnorm")}
    projection = torch.randn(hidden, 2 * hidden, generator=generator).bfloat16()
    tensors |= last | norms | {"model.layers.61.eh_proj.weight": projection}
    _write(folder, _quantized(tensors, _DEEPSEEK_LINEAR), fine_grained(_BLOCK).config)


def _kimi_k2(folder: Path) -> None:
    """Write Kimi-K2, which has the names of DeepSeek-V3 and a type that only its own code reads."""
    _write(folder, _quantized(_deepseek_v3_tensors(folder), _DEEPSEEK_LINEAR), fine_grained(_BLOCK).config)
    config = json.loads((folder / "config.json").read_text())
    own_code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    config |= {"model_type": "kimi_k2", "num_nextn_predict_layers": 0, "auto_map": own_code}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _deepseek_v3_tensors(folder: Path) -> dict[str, Tensor]:
    """Write the config of DeepSeek-V3, and return the tensors of its layers before they are quantized."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"q_lora_rank": 64, "kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    config = DeepseekV3Config(
        **{key: value for key, value in _SMALL.items() if key != "head_dim"},
        **sizes,
        num_key_value_heads=4,
        intermediate_size=384,
        moe_intermediate_size=256,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        num_nextn_predict_layers=1,
    )
    return _published(_random(DeepseekV3ForCausalLM, config), folder)


def _gpt_oss(folder: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_SMALL, num_key_value_heads=2, intermediate_size=96, num_hidden_layers=2, num_local_experts=8
    )
    tensors = _published(_random(GptOssForCausalLM, config), folder)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        tensors[name + "_blocks"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        tensors[name + "_scales"] = torch.randint(110, 124, shape[:-1], dtype=torch.uint8, generator=generator)
    _write(folder, tensors, {"quant_method": "mxfp4"})


def _mixtral(folder: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_SMALL, num_key_value_heads=2, intermediate_size=192, num_hidden_layers=2, num_local_experts=8
    )
    _save_pretrained(_random(MixtralForCausalLM, config), folder)


_WRITERS: Mapping[str, Callable[[Path], None]] = {
    "Qwen/Qwen3-30B-A3B": _qwen3,
    "Qwen/Qwen3-30B-A3B-FP8": _qwen3_fp8,
    "deepseek-ai/DeepSeek-V3": _deepseek_v3,
    "moonshotai/Kimi-K2-Instruct": _kimi_k2,
    "openai/gpt-oss-20b": _gpt_oss,
    "mistralai/Mixtral-8x7B-v0.1": _mixtral,
}


def _qwen3_model(**sizes: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes |= {"intermediate_size": 384, "num_hidden_layers": 4, "num_experts": 16}
    return _random(Qwen3MoeForCausalLM, Qwen3MoeConfig(**_SMALL, **sizes))


def _random(model_class: Any, config: Any) -> Any:
    """Return a model with seeded values as small as those of trained weights."""
    torch.manual_seed(0)
    return model_class._from_config(config, dtype=torch.bfloat16).eval()


def _save_pretrained(model: Any, folder: Path) -> None:
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=nbytes // 4)


def _published(model: Any, folder: Path) -> dict[str, Tensor]:
    """Write the config of a model, and return the tensors that its checkpoint has before it is quantized."""
    from safetensors.torch import load_file

    model.save_pretrained(folder, max_shard_size="10GB")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    return tensors


def _quantized(tensors: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Quantize the tensors with matching names as DeepSeek does: FP8 codes and a float32 scale per 128x128."""
    producer = fine_grained(_BLOCK)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = producer.make(tensor)[0] if re.search(pattern, name) else {"": tensor}
        stored |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
    return stored


def _write(folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> None:
    """Write tensors to two files with an index, and record the quantization in the config."""
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_companions(folder: Path, name: str) -> None:
    """Write the files next to the weights: a tokenizer of a few words, a license and a model card."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=_DIALOG, **special).save_pretrained(folder)
    (folder / "LICENSE").write_text("The license of the model.\n")
    (folder / "README.md").write_text(f"# {name}\n\nA small checkpoint with random weights, of the same type.\n")
