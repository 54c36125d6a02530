"""Published checkpoints as facts: names, dtypes, quantization settings, what is next to the model's own weights.

Names of weights come from the reverse rules of transformers for the type (``writing.py``). A record states what those
cannot know. Sources: the ``config.json``, ``hf_quant_config.json`` and indexes of the checkpoints on the Hub; for
names of draft layers, the patterns that the models of transformers 5.24.0 ignore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.zoo import configs
from tests.zoo.configs import HIDDEN, LAYERS, Config
from tests.zoo.formats import FORMATS

Names = tuple[tuple[str, str], ...]

BLOCK_FP8 = "FP8, one scale per block"
NVFP4 = "ModelOpt NVFP4"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published checkpoint."""

    name: str
    """Name on the Hub."""
    config: Config
    """``config.json`` without quantization, its sizes small."""
    special: str
    """How it differs from other checkpoints, in a few words."""
    formats: Names = ()
    """``(pattern of weights, format)``: the first pattern found in a name decides; other weights are not quantized."""
    settings: Mapping[str, Any] | None = None
    """``quantization_config`` as published, for this number of layers."""
    settings_in_text: bool = False
    """Whether ``text_config`` has the settings."""
    modelopt: Mapping[str, Any] | None = None
    """``hf_quant_config.json``, if there is one."""
    draft: Draft | None = None
    """Layers that predict further tokens, which transformers does not load."""
    cache_scales: bool = False
    """Whether k_proj and v_proj have the scales of a quantized KV cache."""
    scale_dtype: str = "same"
    """The dtype of floating scales, if it differs from that of the format."""
    renames: Names = ()
    """Patterns and replacements, applied in this order to the names that transformers saves."""
    divides_experts: bool = False
    """Whether each expert is a tensor of its own although the type is published grouped."""
    saved_otherwise: bool = False
    """Whether transformers saves other names than the published ones, or experts that are transposed."""
    recipe: str | None = None
    """The name in ``automodel_conv.recipes`` of the rules, where transformers does not know the model type."""
    undivided: str | None = None
    """Part of the names of weights that transformers decodes otherwise: as equal blocks, where blocks do not divide
    them, or without their scales."""
    hook: str = ""
    """A pattern of the hook's error, where transformers would load nonsense; ``"left"`` where it keeps codes itself."""
    readable: Mapping[str, Any] = field(default_factory=dict)
    """Changes of ``config.json`` with which transformers builds the model, where it cannot build the published one."""


@dataclass(frozen=True)
class Draft:
    """Names of draft layers: copies of a layer of the model, and further tensors."""

    layer: str
    """Prefix of the layer that is copied."""
    to: str
    """Prefix of the copy."""
    further: Mapping[str, tuple[int, ...]]
    """Shapes of further tensors, by name."""


def _fp8(**settings: Any) -> dict[str, Any]:
    return dict(FORMATS[BLOCK_FP8].settings) | settings


def _each_layer(*names: str, layers: int = LAYERS, more: Sequence[str] = ()) -> list[str]:
    """Return names with the number of each layer in place of ``{}``."""
    return [*more, *(name.format(layer) for layer in range(layers) for name in names)]


def _modelopt_groups(ignore: Sequence[str], version: str) -> dict[str, Any]:
    """Return settings as modelopt writes them to ``config.json``."""
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    groups = {"group_0": {"input_activations": four, "weights": four, "targets": ["Linear"]}}
    cache = {"dynamic": False, "num_bits": 8, "type": "float"}
    settings = {"config_groups": groups, "ignore": list(ignore), "quant_algo": "NVFP4", "kv_cache_scheme": cache}
    return settings | {"producer": {"name": "modelopt", "version": version}, "quant_method": "modelopt"}


def _modelopt_file(exclude: Sequence[str] | None, version: str | None, algorithm: str = "NVFP4") -> dict[str, Any]:
    """Return ``hf_quant_config.json`` as modelopt writes it."""
    stated: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"}
    if exclude is not None:
        stated |= {"group_size": 16, "exclude_modules": list(exclude)}
    producer = {} if version is None else {"producer": {"name": "modelopt", "version": version}}
    return producer | {"quantization": stated}


_NEXT = f"model.layers.{LAYERS}."
DEEPSEEK_DRAFT = Draft(
    f"model.layers.{LAYERS - 1}.",
    _NEXT,
    {
        _NEXT + "embed_tokens.weight": (131, HIDDEN),
        _NEXT + "enorm.weight": (HIDDEN,),
        _NEXT + "hnorm.weight": (HIDDEN,),
        _NEXT + "eh_proj.weight": (HIDDEN, 2 * HIDDEN),
        _NEXT + "shared_head.norm.weight": (HIDDEN,),
        _NEXT + "shared_head.head.weight": (131, HIDDEN),
    },
)
V4_DRAFT = Draft(
    f"layers.{LAYERS - 1}.",
    "mtp.0.",
    {
        "mtp.0.enorm.weight": (HIDDEN,),
        "mtp.0.hnorm.weight": (HIDDEN,),
        "mtp.0.e_proj.weight": (HIDDEN, HIDDEN),
        "mtp.0.h_proj.weight": (HIDDEN, HIDDEN),
        "mtp.0.norm.weight": (HIDDEN,),
    },
)
QWEN_DRAFT = Draft(
    "model.language_model.layers.1.",
    "mtp.layers.0.",
    {
        "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
        "mtp.norm.weight": (HIDDEN,),
        "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
        "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
    },
)
NEMOTRON_DRAFT = Draft(
    "backbone.layers.1.",
    "mtp.layers.1.",
    {"mtp.layers.0.enorm.weight": (HIDDEN,), "mtp.layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN)},
)

# transformers 5.24.0 reverses the renames of the vision tower everywhere. The published settings have "layers".
KIMI_NAMES = ((r"^language_model\.model\.blocks\.", "language_model.model.layers."),)
V4_NAMES = (
    (r"^model\.hc_head\.hc_", "hc_head_"),
    (r"^model\.embed_tokens", "embed"),
    (r"^model\.", ""),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
)

_PROJ = r"(_proj|kv_a_proj_with_mqa)\.weight$"
_EXPERTS = r"\.experts\.\d+\..*\.weight$"
_DSA_EXCLUDED = ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.q_a_proj", "self_attn.q_b_proj")
_MLA_NVFP4 = ((r"(mlp\..*_proj|o_proj)\.weight$", NVFP4),)


def _excluded(*further: str) -> list[str]:
    names = [f"model.layers.{{}}.{name}" for name in (*_DSA_EXCLUDED, *further)]
    return _each_layer(*names, more=["lm_head", f"model.layers.{LAYERS}*"])


def _kimi_settings(**weights: Any) -> dict[str, Any]:
    described = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4}
    described |= {"observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True} | weights
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": described}
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    settings = {"config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None}
    return settings | {"quant_method": "compressed-tensors", "quantization_status": "compressed"}


def _minimax_m3_layers() -> dict[str, dict[str, Any]]:
    """Return ``quantized_layers`` of MiniMax-M3: every module, experts one by one."""
    prefix, projections = "language_model.model.layers.{}.", ("gate_proj", "up_proj", "down_proj")
    attention = [f"{prefix}self_attn.{part}_proj" for part in "qkvo"]
    dense = [f"{prefix}mlp.{part}".format(0) for part in projections]
    shared = [f"{prefix}block_sparse_moe.shared_experts.{part}" for part in projections]
    indexers = [f"{prefix}self_attn.index_{part}_proj" for part in "qk"]
    experts = [f"{prefix}block_sparse_moe.experts.{expert}.w{part}" for expert in range(12) for part in (1, 2, 3)]
    later = [name.format(layer) for name in (*shared, *indexers) for layer in range(1, LAYERS)]
    eight = [*_each_layer(*attention), *dense, *later]
    four = [name.format(layer) for name in experts for layer in range(1, LAYERS)]
    modules = {name: {"quant_algo": "MXFP8"} for name in eight}
    return modules | {name: {"quant_algo": "NVFP4", "group_size": 16} for name in four}


PUBLISHED: tuple[Published, ...] = (
    Published(
        name="mistralai/Mixtral-8x7B-v0.1",
        config=configs.mixtral(),
        special="block_sparse_moe, w1, w2, w3",
    ),
    Published(
        name="alpindale/WizardLM-2-8x22B",
        config=configs.mixtral(),
        special="the same names, by another publisher",
    ),
    Published(
        name="Qwen/Qwen3-30B-A3B",
        config=configs.qwen3_moe(),
        special="one tensor per expert and projection",
    ),
    Published(
        name="Qwen/Qwen3-30B-A3B-FP8",
        config=configs.qwen3_moe(),
        special="routers and norms listed as not converted, bfloat16 scales",
        formats=((_PROJ, BLOCK_FP8),),
        settings=_fp8(
            modules_to_not_convert=_each_layer(
                "model.layers.{}.input_layernorm",
                "model.layers.{}.mlp.gate",
                "model.layers.{}.post_attention_layernorm",
                more=["lm_head"],
            )
        ),
        scale_dtype="bfloat16",
    ),
    Published(
        name="nvidia/Qwen3-235B-A22B-NVFP4",
        config=configs.qwen3_moe(),
        hook="transformers would load codes of quantized tensors as values",
        special="settings only in hf_quant_config.json; KV scales",
        formats=((_PROJ, NVFP4),),
        modelopt=_modelopt_file(_each_layer("model.layers.{}.mlp.gate", more=["lm_head"]), "0.33.0"),
        cache_scales=True,
    ),
    Published(
        name="Qwen/Qwen3-VL-30B-A3B-Instruct",
        config=configs.qwen3_vl_moe(),
        saved_otherwise=True,
        special="experts grouped and transposed; a vision tower",
    ),
    Published(
        name="Qwen/Qwen3.5-35B-A3B",
        config=configs.qwen3_5_moe(),
        special="experts grouped; linear attention; an MTP layer beside the model",
        draft=QWEN_DRAFT,
    ),
    Published(
        name="nvidia/Qwen3.5-122B-A10B-NVFP4",
        config=configs.qwen3_5_moe(),
        hook="transformers would load codes of quantized tensors as values",
        special="one tensor per expert although the original is grouped; KV scales where k_proj is not quantized",
        divides_experts=True,
        formats=((_EXPERTS, NVFP4),),
        settings=_modelopt_groups(
            _each_layer(
                "model.language_model.layers.{}.linear_attn*",
                "model.language_model.layers.{}.self_attn*",
                "model.language_model.layers.{}.mlp.shared_expert*",
                more=["lm_head", "model.visual*", "mtp.layers.0*", "mtp*"],
            ),
            "0.0.1.dev752",
        ),
        modelopt=_modelopt_file(["lm_head", "model.visual*", "mtp*"], "0.0.1.dev752"),
        draft=QWEN_DRAFT,
        cache_scales=True,
    ),
    Published(
        name="bryce-hoehn/Qwen3.5-18B-REAP-A3B-Coding",
        config=configs.qwen3_5_moe_text(
            architectures=["Qwen3_5MoeForConditionalGeneration"], dtype="float16", tie_word_embeddings=False
        ),
        readable={"architectures": ["Qwen3_5MoeForCausalLM"]},
        renames=((r"^model\.", "model.language_model."),),
        divides_experts=True,
        saved_otherwise=True,
        special="the text part only, under the names of the whole model and with its class in the config",
    ),
    Published(
        name="deepseek-ai/DeepSeek-V3",
        config=configs.deepseek_v3(),
        undivided="kv_a_proj_with_mqa",
        special="latents of 4.5 blocks; an MTP layer after the last one",
        formats=((_PROJ, BLOCK_FP8),),
        settings=_fp8(),
        draft=DEEPSEEK_DRAFT,
    ),
    Published(
        name="nvidia/DeepSeek-V3.1-NVFP4",
        config=configs.deepseek_v3(),
        hook="transformers would load codes of quantized tensors as values",
        special="settings only in hf_quant_config.json; latents not quantized; KV scales",
        formats=_MLA_NVFP4,
        modelopt=_modelopt_file(_excluded(), "0.22.1"),
        draft=DEEPSEEK_DRAFT,
        cache_scales=True,
    ),
    Published(
        name="deepseek-ai/DeepSeek-V3.2",
        config=configs.deepseek_v32(),
        undivided="kv_a_proj_with_mqa",
        special="an indexer; float32 scales that are powers of two",
        formats=((r"indexer\.weights_proj", "no"), (_PROJ, BLOCK_FP8)),
        settings=_fp8(scale_fmt="ue8m0"),
        draft=DEEPSEEK_DRAFT,
    ),
    Published(
        name="nvidia/DeepSeek-V3.2-NVFP4",
        config=configs.deepseek_v32(),
        hook="transformers would load codes of quantized tensors as values",
        special="globs in exclude_modules",
        formats=_MLA_NVFP4,
        modelopt=_modelopt_file(_excluded("self_attn.indexer*"), "0.0.1.dev294"),
        draft=DEEPSEEK_DRAFT,
        cache_scales=True,
    ),
    Published(
        name="zai-org/GLM-5-FP8",
        config=configs.glm_moe_dsa(),
        undivided="kv_a_proj_with_mqa",
        special="norms, and names that no tensor has, listed as not converted",
        formats=((r"indexer\.weights_proj", "no"), (_PROJ, BLOCK_FP8)),
        settings=_fp8(
            modules_to_not_convert=_each_layer(
                "model.layers.{}.input_layernorm",
                "model.layers.{}.mlp.gate",
                "model.layers.{}.mlp.gate.e_score_correction_bias",
                "model.layers.{}.self_attn.indexer.k_norm",
                "model.layers.{}.self_attn.indexers_proj",
                more=["lm_head", "model.embed_tokens", "model.norm", f"model.layers.{LAYERS}.eh_proj"],
            )
        ),
        draft=DEEPSEEK_DRAFT,
    ),
    Published(
        name="nvidia/GLM-5-NVFP4",
        config=configs.glm_moe_dsa(),
        hook="transformers would load codes of quantized tensors as values",
        special="o_proj not quantized",
        formats=((r"mlp\..*_proj\.weight$", NVFP4),),
        modelopt=_modelopt_file(_excluded("self_attn.indexer*", "self_attn.o_proj"), "0.42.0rc1"),
        draft=DEEPSEEK_DRAFT,
        cache_scales=True,
    ),
    Published(
        name="deepseek-ai/DeepSeek-V4-Flash",
        config=configs.deepseek_v4(),
        special="FP4 experts beside FP8; names of its own; mtp.0",
        formats=(
            (r"\.ffn\.experts\.\d+\.w\d\.weight$", "FP4 experts of DeepSeek"),
            (r"compressor|weights_proj", "no"),
            (r"\.(w[123]|wkv|w[oq]_[ab]|[eh]_proj)\.weight$", "FP8, exponents per block"),
        ),
        settings=_fp8(scale_fmt="ue8m0"),
        renames=V4_NAMES,
        draft=V4_DRAFT,
    ),
    Published(
        name="nvidia/DeepSeek-V4-Flash-NVFP4",
        config=configs.deepseek_v4(),
        hook="transformers would load codes of quantized tensors as values",
        special="the method is fp8, the algorithm MIXED_PRECISION, and quantized_layers name modules of experts",
        formats=(
            (r"^layers\.\d+\.ffn\.experts\.\d+\.w\d\.weight$", NVFP4),
            (r"\.ffn\.experts\.\d+\.w\d\.weight$", "FP4 experts of DeepSeek"),
            (r"compressor|weights_proj", "no"),
            (r"\.(w[123]|wkv|w[oq]_[ab]|[eh]_proj)\.weight$", "FP8, exponents per block"),
        ),
        settings=_fp8(
            scale_fmt="ue8m0",
            group_size=16,
            ignore=["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
            kv_cache_quant_algo=None,
            moe_quant_algo="NVFP4",
            producer={"name": "modelopt", "version": "dsv4-nvfp4-experts"},
            quant_algo="MIXED_PRECISION",
            quantized_layers={
                f"layers.{layer}.ffn.experts": {"group_size": 16, "quant_algo": "NVFP4"} for layer in range(LAYERS)
            },
        ),
        renames=V4_NAMES,
        draft=V4_DRAFT,
    ),
    Published(
        name="moonshotai/Kimi-K2-Instruct",
        config=configs.kimi_k2(),
        recipe="kimi_k2",
        hook="transformers would initialize the experts",
        special="remote code; the names of DeepSeek-V3",
        formats=((_PROJ, BLOCK_FP8),),
        settings=_fp8(),
        readable={"model_type": "deepseek_v3"},
    ),
    Published(
        name="moonshotai/Kimi-K2.5",
        config=configs.kimi_k25(),
        hook="left",
        special="language_model before the names; INT4 experts, the settings in text_config",
        formats=((_EXPERTS, "compressed-tensors INT4"),),
        settings=_kimi_settings(type="int") | {"format": "pack-quantized"},
        settings_in_text=True,
        renames=KIMI_NAMES,
    ),
    Published(
        name="nvidia/Kimi-K2.5-NVFP4",
        config=configs.kimi_k25("deepseek_v3"),
        hook="transformers would load codes of quantized tensors as values",
        special="language_model before the names; KV scales",
        formats=((r"\.mlp\..*_proj\.weight$", NVFP4),),
        settings=_modelopt_groups(
            _each_layer(
                "language_model.model.layers.{}.self_attn*",
                more=["language_model.lm_head", "mm_projector*", "vision_tower*"],
            ),
            "0.41.0",
        ),
        cache_scales=True,
        renames=KIMI_NAMES,
    ),
    Published(
        name="MiniMaxAI/MiniMax-M2.5",
        config=configs.minimax_m2(),
        special="suffixes listed as not converted; draft layers that num_mtp_modules states",
        formats=((r"(_proj|w[123])\.weight$", BLOCK_FP8),),
        settings=_fp8(fmt="float8_e4m3fn", modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"]),
        draft=DEEPSEEK_DRAFT,
    ),
    Published(
        name="nvidia/MiniMax-M2.5-NVFP4",
        config=configs.minimax_m2(),
        hook="transformers would load codes of quantized tensors as values",
        special="experts only; KV scales where k_proj is not quantized",
        formats=((_EXPERTS, NVFP4),),
        settings=_modelopt_groups(
            _each_layer("model.layers.{}.block_sparse_moe.gate", "model.layers.{}.self_attn*", more=["lm_head"]),
            "0.0.1.dev507",
        ),
        modelopt=_modelopt_file(
            _each_layer("model.layers.{}.block_sparse_moe.gate", "model.layers.{}.self_attn*", more=["lm_head"]),
            "0.0.1.dev507",
        ),
        cache_scales=True,
    ),
    Published(
        name="nvidia/MiniMax-M3-NVFP4",
        config=configs.minimax_m3_vl(),
        hook="transformers would load codes of quantized tensors as values",
        special="MIXED_PRECISION: NVFP4 experts and MXFP8 modules, each named",
        formats=(
            (_EXPERTS, NVFP4),
            (r"language_model.*(self_attn|mlp|shared_experts)\..*_proj\.weight$", "ModelOpt MXFP8"),
        ),
        settings={
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "exclude_modules": _each_layer(
                "language_model.model.layers.{}.block_sparse_moe.gate",
                more=["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp"],
            ),
            "quantized_layers": _minimax_m3_layers(),
        },
    ),
    Published(
        name="stepfun-ai/Step-3.7-Flash",
        config=configs.step3p7(),
        special="experts stacked, gate and up apart; a vision tower",
    ),
    Published(
        name="stepfun-ai/Step-3.7-Flash-FP8",
        config=configs.step3p7(),
        special="stacked scales; transformers 5.24.0 casts the codes of down, which a rule only renames",
        formats=(
            (r"^model\.layers\..*(self_attn\.[qkvo]|mlp\.\w+|moe\.\w+|share_expert\.\w+)_proj\.weight$", BLOCK_FP8),
        ),
        settings=_fp8(),
        undivided="experts.down_proj",
    ),
    Published(
        name="XiaomiMiMo/MiMo-V2-Flash",
        config=configs.mimo_v2_flash(),
        special="heads of keys and values that differ, sinks",
        formats=((r"o_proj", "no"), (r"_proj\.weight$", BLOCK_FP8)),
        settings=_fp8(),
    ),
    Published(
        name="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        config=configs.nemotron_h(),
        special="backbone before the names, experts without gates",
    ),
    Published(
        name="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4",
        config=configs.nemotron_h(),
        hook="transformers would load codes of quantized tensors as values",
        special="settings only in hf_quant_config.json; mixers of two layers not quantized",
        formats=((r"(up_proj|down_proj)\.weight$", NVFP4),),
        modelopt=_modelopt_file(
            _each_layer(
                "backbone.layers.{}.mixer.in_proj",
                "backbone.layers.{}.mixer.out_proj",
                "backbone.layers.{}.mixer.q_proj",
                "backbone.layers.{}.mixer.k_proj",
                "backbone.layers.{}.mixer.v_proj",
                "backbone.layers.{}.mixer.o_proj",
                "backbone.layers.{}.mixer.conv1d",
                layers=4,
                more=["lm_head"],
            ),
            "0.29.0",
        ),
        cache_scales=True,
    ),
    Published(
        name="nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
        config=configs.nemotron_h(moe_latent_size=256, mtp_hybrid_override_pattern="*E", num_nextn_predict_layers=1),
        hook="transformers would load codes of quantized tensors as values",
        special="hf_quant_config.json without a producer; latents of experts; mtp",
        formats=((r"(up_proj|down_proj|in_proj|out_proj)\.weight$", "ModelOpt FP8"),),
        modelopt=_modelopt_file(None, None, "FP8"),
        draft=NEMOTRON_DRAFT,
        cache_scales=True,
    ),
    Published(
        name="google/gemma-4-26B-A4B",
        config=configs.gemma4(),
        special="experts grouped; tied; keys that are values",
    ),
    Published(
        name="nvidia/Gemma-4-26B-A4B-NVFP4",
        config=configs.gemma4(),
        hook="transformers would initialize the experts",
        special="one tensor per expert although the original is grouped",
        divides_experts=True,
        formats=((_EXPERTS, NVFP4),),
        settings=_modelopt_groups(
            _each_layer(
                "model.language_model.layers.{}.mlp*",
                "model.language_model.layers.{}.router*",
                "model.language_model.layers.{}.self_attn*",
                more=["lm_head", "model.embed_vision*", "model.vision_tower*"],
            ),
            "0.43.0rc2",
        ),
    ),
    Published(
        name="ibm-granite/granite-3.1-1b-a400m-base",
        config=configs.granitemoe(),
        special="experts grouped, as input_linear and output_linear; tied",
    ),
    Published(
        name="meta-llama/Llama-4-Scout-17B-16E-Instruct",
        config=configs.llama4(),
        special="experts grouped, [E, in, out]; a vision tower",
    ),
    Published(
        name="meta-llama/Llama-4-Maverick-17B-128E-Instruct",
        config=configs.llama4(interleave_moe_layer_step=2, use_qk_norm=False),
        special="every second layer is dense",
    ),
    Published(
        name="nvidia/Llama-4-Scout-17B-16E-Instruct-NVFP4",
        config=configs.llama4(),
        hook="transformers would load codes of quantized tensors as values",
        special="fused FP4 experts, packed along the columns of the weight",
        formats=(
            (r"experts\.(gate_up|down)_proj$", "ModelOpt NVFP4 of Llama-4"),
            (r"feed_forward\.shared_expert\..*_proj\.weight$", NVFP4),
        ),
        modelopt=_modelopt_file(
            ["*router", "vision_model*", "multi_modal_projector*", "*lm_head", "*self_attn*"], "0.29.0"
        ),
    ),
    Published(
        name="openai/gpt-oss-20b",
        config=configs.gpt_oss(),
        special="MXFP4 blocks of the transposed experts; biases; sinks",
        formats=((r"experts\.(gate_up|down)_proj$", "MXFP4 of gpt-oss"),),
        settings={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    ),
)
"""Checkpoints of the zoo. Checkpoints that differ from one of them only in sizes are not repeated: Qwen3-235B-A22B and
its FP8, Qwen3-VL-235B-A22B-Instruct, Qwen3.5-122B-A10B, DeepSeek-R1, gpt-oss-120b, Nemotron-3-Super-120B-A12B-NVFP4."""

QUICK = {
    "Qwen/Qwen3-30B-A3B-FP8",
    "nvidia/Qwen3.5-122B-A10B-NVFP4",
    "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-V4-Flash",
    "moonshotai/Kimi-K2-Instruct",
    "moonshotai/Kimi-K2.5",
    "openai/gpt-oss-20b",
}
"""Names of the checkpoints that are tested by default: one of each kind of names and formats."""
