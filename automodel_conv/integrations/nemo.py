"""NeMo AutoModel: its checkpointer on our rule queries, and adapters of its shape made of rules and a layout.

NeMo AutoModel has an adapter written by hand for each family of models. What they do to routed experts is a rule of
transformers followed by the layout "nemo" (gate and up ``[I, H]`` of each expert into ``gate_and_up_projs [E, H, 2I]``,
down ``[H, I]`` into ``down_projs [E, I, H]``), and the rest is renaming. Source of both: nemo_automodel 0.7.0,
``components/models/*/state_dict_adapter.py``.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from automodel_conv import conversion_mapping
from automodel_conv.doors import door
from automodel_conv.errors import NameProblems, UnsupportedError, message
from automodel_conv.in_memory import convert_state_dict, revert_state_dict
from automodel_conv.planning.code_names import has_codes
from automodel_conv.planning.layouts import get_layout, holds_experts
from automodel_conv.upstream.models import state_table

_PACKAGE = "nemo_automodel.components.checkpoint"
_MODULE = "conversion_mapping"
# Modules that import functions of it by name.
_IMPORTERS = ("nemo_automodel.components.checkpoint.checkpointing",)

_theirs: list[ModuleType] = []  # their module, while ours is in its place


def install() -> None:
    """Put our ``conversion_mapping`` in the place of NeMo AutoModel's, for this process, until ``uninstall``.

    Also where its checkpointer has imported functions of it already. Calling it again changes nothing.

    The checkpointer asks for the outer type of a model only. Name the type of one with experts inside it, and it
    converts them by the rules of the whole model::

        conversion_mapping.MODELS_REQUIRING_TENSOR_MERGING.add("internvl")

    Raises:
        UnsupportedError: nemo_automodel is not installed.
    """
    if _theirs:
        return
    try:
        theirs = importlib.import_module(f"{_PACKAGE}.{_MODULE}")
    except ImportError as error:
        raise UnsupportedError(message("nemo_automodel cannot be imported", found=error)) from error
    _exchange(theirs, conversion_mapping)
    _theirs.append(theirs)


def uninstall() -> None:
    """Give NeMo AutoModel its own module and functions back, also where ours were imported meanwhile.

    What somebody else has put in the place of ours stays.
    """
    if _theirs:
        _exchange(conversion_mapping, _theirs.pop())


def _exchange(old: ModuleType, new: ModuleType) -> None:
    """Wherever NeMo AutoModel has one module, or a function of it, let it have the other."""
    package = sys.modules[_PACKAGE]
    if getattr(package, _MODULE, None) is old:
        setattr(package, _MODULE, new)
    if sys.modules.get(f"{_PACKAGE}.{_MODULE}") is old:
        sys.modules[f"{_PACKAGE}.{_MODULE}"] = new
    for importer in filter(None, map(sys.modules.get, _IMPORTERS)):
        for name, function in list(vars(importer).items()):
            if callable(function) and getattr(old, name, None) is function and callable(getattr(new, name, None)):
                setattr(importer, name, getattr(new, name))


class StateDictAdapter:
    """``from_hf``, ``to_hf`` and ``convert_single_tensor_to_hf`` of NeMo AutoModel's adapters, from rules and a layout.

    Tensors keep dtype and device, and are converted on it; what is only renamed is passed by reference. Sharded tensors
    and quantized checkpoints are refused.

    Args:
        rules: transformers' rule objects, from the checkpoint's names to those of ``from_pretrained``.
        layout: of grouped experts in NeMo AutoModel; None where the checkpoint's is kept.
        renames: ``{ending of a converted name: ending of NeMo AutoModel's name}``, whole components; both ways.
    """

    def __init__(
        self, rules: Iterable[Any] = (), *, layout: str | None = "nemo", renames: Mapping[str, str] | None = None
    ):
        self._rules = list(rules)
        self._layout = layout
        self._renames = dict(renames or {})

    @classmethod
    def of(cls, model_type: str) -> StateDictAdapter:
        """The adapter for a model type of transformers that has rules, or gpt_oss.

        Raises:
            UnsupportedError: transformers has no rules for the type.
        """
        rules = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
        renames, layout = _FAMILIES.get(model_type, ({}, "nemo"))
        if not rules and not renames:
            raise UnsupportedError(
                message(
                    f"transformers has no rules for {model_type}",
                    do="make an adapter of your own rules: StateDictAdapter(rules)",
                )
            )
        return cls(rules or (), layout=layout, renames=renames)

    @door("converting")
    def from_hf(self, hf_state_dict: Mapping[str, Tensor], device_mesh: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Names and layout of the checkpoint to those of NeMo AutoModel; further arguments are ignored.

        Raises:
            NameProblems: experts are missing.
            UnsupportedError: a ``device_mesh`` is given, or the tensors are quantized.
        """
        codes = has_codes(state_table(hf_state_dict))
        if codes is not None:
            text = f"{codes} has the form of quantized codes, which are not decoded in memory"
            raise UnsupportedError(message(text, do="load_state_dict(path, layout='nemo') decodes while it reads"))
        if device_mesh is not None:
            raise UnsupportedError(message("experts cannot be sharded here yet", do="leave device_mesh out"))
        converted = convert_state_dict(hf_state_dict, rules=self._rules, layout=self._layout)
        return _renamed(converted, self._renames)

    @door("converting")
    def to_hf(
        self,
        state_dict: Mapping[str, Tensor],
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Back to the checkpoint's names and layout, but for names that ``exclude_key_regex`` matches from the start.

        Raises:
            UnsupportedError: ``quantization`` is asked for.
        """
        if quantization:
            raise UnsupportedError(message("quantizing is not supported yet", do="quantization=False"))
        named = _renamed(state_dict, {theirs: ours for ours, theirs in self._renames.items()})
        layout = self._layout
        if layout is not None and not any(holds_experts(name, get_layout(layout)) for name in named):
            layout = None  # a part of the model without experts
        reverted = revert_state_dict(named, rules=self._rules, layout=layout)
        excluded = re.compile(exclude_key_regex) if exclude_key_regex is not None else None
        return {name: tensor for name, tensor in reverted.items() if excluded is None or not excluded.match(name)}

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Tensor, **kwargs: Any) -> list[tuple[str, Tensor]]:
        """``to_hf`` of one tensor, which may become many."""
        return list(self.to_hf({fqn: tensor}, **kwargs).items())


def _renamed(tensors: Mapping[str, Tensor], endings: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors with the endings of their names exchanged, where whole components are one of ``endings``.

    Raises:
        NameProblems: two tensors would have one name.
    """
    renamed: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        tail = next((tail for tail in tails if tail in endings), None)
        new = name if tail is None else name.removesuffix(tail) + endings[tail]
        if new in renamed:
            both = (source[new], name)
            raise NameProblems(
                message(f"two tensors would be {new}", found=" and ".join(both)), duplicated=[(new, both)]
            )
        renamed[new], source[new] = tensor, name
    return renamed


_FAMILIES: Mapping[str, tuple[Mapping[str, str], str | None]] = {
    "gpt_oss": (
        {
            "mlp.router.weight": "mlp.gate.weight",
            "mlp.router.bias": "mlp.gate.bias",
            "mlp.experts.gate_up_proj": "mlp.experts.gate_and_up_projs",
            "mlp.experts.down_proj": "mlp.experts.down_projs",
        },
        None,
    ),
    "nemotron_h": (
        {"model.norm_f.weight": "model.norm.weight", "model.embeddings.weight": "model.embed_tokens.weight"},
        "nemo",
    ),
}
"""Where NeMo AutoModel's names are not those of transformers: endings of names, and the layout."""
