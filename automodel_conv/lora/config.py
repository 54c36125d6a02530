"""The ``adapter_config.json`` of PEFT: what it states about ranks and scales, and what is not supported.

Source: PEFT 0.21.2, ``LoraConfig`` in ``tuners/lora/config.py``, ``get_pattern_key`` in ``utils/other.py`` and
``ParamWrapper`` in ``tuners/lora/layer.py``; PEFT 0.18.1, 0.19.0 and 0.19.1, the same files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from automodel_conv.errors import CheckpointError, UnsupportedError, listing, message
from automodel_conv.files import system
from automodel_conv.files.header import malformed_json, read_limited, with_open

CONFIG_NAME = "adapter_config.json"
OLDEST_PEFT = "0.19.1"
"""The oldest release of PEFT that reads stacks as this package writes them."""
ORDER_OF_B = "lora_B_layout"
"""Unsloth's key for the order of the columns of B in a stack of matrices."""
_GROUPED, _PEFTS = "grouped_by_expert", "rank_major"
_MOST_BYTES = 64 << 20
_CHECK = "check the path: an adapter has adapter_config.json and adapter_model.safetensors"
LARGEST_FACTOR = 1e18
"""The largest alpha, and the largest weight of an adapter: their product is a float32."""

# Settings that change what the matrices mean, with what they stand for. Any value but None, False and {} counts.
_REFUSED = {
    "use_dora": "DoRA, whose magnitudes scale the sum of weight and product",
    "use_qalora": "QALoRA, which pools its input",
    "use_bdlora": "BD-LoRA, with block-diagonal matrices",
    "lora_bias": "a bias next to the product",
    "alora_invocation_tokens": "aLoRA, which depends on the tokens",
    "layer_replication": "replicated layers",
    "kasa_config": "KaSA, which changes the base weights",
    "arrow_config": "routing between adapters",
    "monteclora_config": "MonteCLoRA, which samples",
    "trainable_token_indices": "trained rows of the embedding",
    "megatron_config": "layers of Megatron",
    "fan_in_fan_out": "weights stored as [in, out]",
}
# Initial values that also change the base weights, so that the product belongs to other ones.
_CHANGES_BASE = re.compile("pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter.

    Attributes:
        settings: the content of ``adapter_config.json``.
        path: path of that file.
    """

    settings: Mapping[str, Any]
    path: str

    def rank(self, name: str) -> int:
        """Return the rank of a module or parameter."""
        return self._stated("rank_pattern", "r", name)

    def alpha(self, name: str) -> float:
        """Return the alpha of a module or parameter."""
        return self._stated("alpha_pattern", "lora_alpha", name)

    def scale(self, name: str) -> float:
        """Return the factor of the product of a module or parameter."""
        return scale_of(self.rank(name), self.alpha(name), self.uses_rslora)

    @property
    def uses_rslora(self) -> bool:
        """Whether alpha is divided by the square root of the rank."""
        return bool(self.settings.get("use_rslora"))

    def reads_last(self, is_transposed: bool) -> bool:
        """Return whether A of a stack of matrices belongs to its last dimension, and B to the one before it.

        It does since PEFT 0.19.1, unless the module is transposed; in 0.19.0 only if it is; in older releases never.
        PEFT 0.17 stated no version.
        """
        version = self.peft_version
        return version >= (0, 19, 0) and is_transposed == (version == (0, 19, 0))

    @property
    def peft_version(self) -> tuple[int, ...]:
        """The version of PEFT that wrote the adapter."""
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(self.settings.get("peft_version") or "0.17"))
        return tuple(int(part or 0) for part in found.groups()) if found is not None else (0, 17, 0)

    @property
    def groups_b(self) -> bool:
        """Whether B of a stack has the columns of a matrix next to each other, unlike PEFT's.

        Unsloth trained such adapters until September 2026. Those that were marked since state it. Source:
        unslothai/unsloth-zoo#1232.
        """
        return self.settings.get(ORDER_OF_B) == _GROUPED

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that have an adapter of their own, or endings of such names."""
        return tuple(self.settings.get("target_parameters") or ())

    def _stated(self, patterns: str, default: str, name: str) -> Any:
        for pattern, value in self._patterns[patterns]:
            if pattern.match(name):
                return value
        return self.settings[default]

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        return {
            key: [(_compiled(text), value) for text, value in (self.settings.get(key) or {}).items()]
            for key in ("rank_pattern", "alpha_pattern")
        }


def scale_of(rank: int, alpha: float, uses_rslora: bool) -> float:
    """Return the factor of a product of matrices of this rank."""
    return alpha / math.sqrt(rank) if uses_rslora else alpha / rank


def alpha_for(scale: float, rank: int, uses_rslora: bool) -> float:
    """Return the alpha that gives this factor at this rank; an integer if one does."""
    alpha = scale * (math.sqrt(rank) if uses_rslora else rank)
    near = round(alpha)
    candidates = [near, alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)]
    exact = (value for value in candidates if scale_of(rank, value, uses_rslora) == scale)
    return next(exact, near if math.isclose(alpha, near, rel_tol=1e-12) else alpha)


def read_config(directory: str, where: str | None = None) -> AdapterConfig:
    """Read the config of an adapter.

    Args:
        directory: path of the directory that has it.
        where: path or URL of the adapter, for errors; None: the directory.

    Raises:
        CheckpointError: the file is missing or malformed.
        UnsupportedError: the adapter is of another kind, or has a variant that cannot be merged or converted.
    """
    own, where = os.path.join(directory, CONFIG_NAME), where or directory
    if not system.is_file(own):
        raise CheckpointError(message("the adapter has no adapter_config.json", where=where, do=_CHECK))
    path = os.path.join(where, CONFIG_NAME)
    data = with_open(own, lambda fd: read_limited(fd, path, _MOST_BYTES))
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed_json(data, path, "the config of an adapter", error) from error
    if not isinstance(settings, dict):
        found = type(settings).__name__
        raise CheckpointError(message("adapter_config.json is not an object", where=path, found=found))
    return config_of(settings, path)


def config_of(settings: Mapping[str, Any], path: str) -> AdapterConfig:
    """Return the config with these settings.

    Args:
        settings: content of ``adapter_config.json``.
        path: path of the file, or a name of the config in memory, for errors.

    Raises:
        CheckpointError: ranks or alphas are not numbers or too large, or a pattern is not a regular expression.
        UnsupportedError: the adapter is of another kind, or has a variant that cannot be merged or converted.
    """
    _refuse_unsupported(settings, path)
    _check(settings, path)
    return AdapterConfig(settings, path)


def _refuse_unsupported(settings: Mapping[str, Any], path: str) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(message("the adapter is not LoRA", where=path, expected="peft_type LORA", found=kind))
    found = [f"{key}: {meaning}" for key, meaning in _REFUSED.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias {settings['bias']!r}: trained biases of the base model")
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and _CHANGES_BASE.search(initial):
        found.append(f"init_lora_weights {initial!r}: a change of the base weights before training")
    if found:
        do = "merge it with PEFT; with init_lora_weights, save it with path_initial_model_for_weight_conversion first"
        raise UnsupportedError(
            message(
                "the adapter has variants of LoRA that are not supported",
                where=path,
                found="\n" + listing(found),
                do=do,
            )
        )


def _check(settings: Mapping[str, Any], path: str) -> None:
    """Raise CheckpointError unless ranks and alphas are numbers, and patterns are regular expressions."""
    problems = []
    ranks = {"r": settings.get("r"), **_pattern(settings, "rank_pattern", problems)}
    alphas = {"lora_alpha": settings.get("lora_alpha"), **_pattern(settings, "alpha_pattern", problems)}
    problems += [f"rank of {key}: {value!r}" for key, value in ranks.items() if type(value) is not int or value < 1]
    problems += [
        f"alpha of {key}: {value!r}"
        for key, value in alphas.items()
        if type(value) not in (int, float) or not abs(value) <= LARGEST_FACTOR
    ]
    if (order := settings.get(ORDER_OF_B)) not in (None, _GROUPED, _PEFTS):
        problems.append(f"{ORDER_OF_B}: {order!r}")
    parameters = settings.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        problems.append(f"target_parameters: {parameters!r}")
    if problems:
        raise CheckpointError(message("adapter_config.json is malformed", where=path, found="\n" + listing(problems)))


def _pattern(settings: Mapping[str, Any], key: str, problems: list[str]) -> dict[str, Any]:
    stated = settings.get(key) or {}
    if not isinstance(stated, dict):
        problems.append(f"{key}: {stated!r}")
        return {}
    for text in stated:
        try:
            _compiled(text)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{key} {text!r}: {error}")
    return stated


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return the regular expression that PEFT makes of a pattern: it matches a whole name, or its end after a dot."""
    return re.compile(rf"(.*\.)?({pattern})$")
