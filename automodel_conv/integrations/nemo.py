"""Integration with NeMo AutoModel: its checkpointer on the rules of this package, and adapters with its interface.

NeMo AutoModel has a hand-written adapter for each family of models. An adapter converts routed experts by a rule of
transformers and the layout "nemo" (gate and up ``[I, H]`` of each expert into ``gate_and_up_projs [E, H, 2I]``, down
``[H, I]`` into ``down_projs [E, I, H]``), and only renames other tensors. Source of both: nemo_automodel 0.7.0,
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
from automodel_conv.recipes import RECIPES
from automodel_conv.types import LayoutName
from automodel_conv.upstream.models import state_table

_PACKAGE = "nemo_automodel.components.checkpoint"
_MODULE = "conversion_mapping"
# Modules that import functions of that module by name.
_IMPORTERS = ("nemo_automodel.components.checkpoint.checkpointing",)

_replaced: list[ModuleType] = []  # NeMo AutoModel's module while it is replaced, otherwise empty


def install() -> None:
    """Replace NeMo AutoModel's ``conversion_mapping`` by that of this package in this process, until ``uninstall``.

    Functions that the checkpointer has already imported from it are replaced too. Further calls have no effect.

    The checkpointer only looks up the outer type of a model. If experts are in an inner model, add the outer type, and
    the checkpointer converts them by the rules of the whole model::

        conversion_mapping.MODELS_REQUIRING_TENSOR_MERGING.add("internvl")

    Raises:
        UnsupportedError: nemo_automodel is not installed.

    Example:
        >>> from contextlib import suppress
        >>> from automodel_conv import UnsupportedError
        >>> with suppress(UnsupportedError):  # raised if nemo_automodel is not installed
        ...     install()
        >>> uninstall()
    """
    if _replaced:
        return
    try:
        original = importlib.import_module(f"{_PACKAGE}.{_MODULE}")
    except ImportError as error:
        text = "nemo_automodel cannot be imported"
        raise UnsupportedError(message(text, found=error, do="pip install nemo-automodel")) from error
    _exchange(original, conversion_mapping)
    _replaced.append(original)


def uninstall() -> None:
    """Restore NeMo AutoModel's own module and functions, including those imported since ``install``.

    Replacements by other code stay. The call has no effect without ``install``.

    Example:
        >>> uninstall()
    """
    if _replaced:
        _exchange(conversion_mapping, _replaced.pop())


def _exchange(old: ModuleType, new: ModuleType) -> None:
    """Replace a module and its functions by another module and its functions everywhere in NeMo AutoModel."""
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
    """An adapter with the interface of NeMo AutoModel's adapters that converts by rules and a layout.

    Tensors keep their dtype and are converted on their device. Tensors that are only renamed are passed by reference.
    Sharded tensors and quantized checkpoints are refused.

    Args:
        rules: transformers' rule objects, from the checkpoint's names to those of ``from_pretrained``.
        layout: layout of grouped experts in NeMo AutoModel; None: the checkpoint's layout is kept.
        renames: ending of the name in NeMo AutoModel by the ending of the converted name, for both directions. Endings
            are whole components.

    Example:
        >>> import torch
        >>> adapter = StateDictAdapter(layout=None, renames={"router.weight": "gate.weight"})
        >>> tensors = adapter.from_hf({"mlp.router.weight": torch.ones(2, 3)})
        >>> list(tensors), list(adapter.to_hf(tensors))
        (['mlp.gate.weight'], ['mlp.router.weight'])
    """

    def __init__(
        self, rules: Iterable[Any] = (), *, layout: LayoutName | None = "nemo", renames: Mapping[str, str] | None = None
    ):
        self._rules = list(rules)
        self._layout: LayoutName | None = layout
        self._renames = dict(renames or {})

    @classmethod
    def of(cls, model_type: str) -> StateDictAdapter:
        """Return the adapter for gpt_oss, or for a model type that has rules in transformers.

        Raises:
            UnsupportedError: transformers has no rules for the type.
        """
        rules = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
        renames, layout = _FAMILIES.get(model_type, ({}, "nemo"))
        if not rules and not renames:
            recipe = RECIPES.get(model_type)
            own = "your own rules: StateDictAdapter(rules)"
            source = (
                own if recipe is None else f"a recipe: StateDictAdapter(automodel_conv.recipes.{recipe.__name__}())"
            )
            raise UnsupportedError(
                message(f"transformers has no rules for {model_type}", do=f"create an adapter from {source}")
            )
        return cls(rules or (), layout=layout, renames=renames)

    @door("converting")
    def from_hf(self, hf_state_dict: Mapping[str, Tensor], device_mesh: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Convert names and layout of a checkpoint to those of NeMo AutoModel.

        Args:
            hf_state_dict: tensors of the checkpoint by name.
            device_mesh: must be None.
            kwargs: ignored.

        Raises:
            NameProblems: experts are missing.
            UnsupportedError: ``device_mesh`` is passed, or the tensors are quantized.
        """
        codes = has_codes(state_table(hf_state_dict))
        if codes is not None:
            text = f"{codes} has the form of quantized codes, which are not decoded in memory"
            raise UnsupportedError(message(text, do="load_state_dict(path, layout='nemo') decodes while it reads"))
        if device_mesh is not None:
            text = "this adapter does not divide experts among ranks"
            raise UnsupportedError(message(text, do="leave device_mesh out; load_model() fills DTensors"))
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
        """Convert names and layout of NeMo AutoModel to those of the checkpoint.

        Args:
            state_dict: tensors of NeMo AutoModel by name.
            exclude_key_regex: pattern of the checkpoint's names to leave out, matched from the start of a name.
            quantization: must be False.
            kwargs: ignored.

        Raises:
            UnsupportedError: ``quantization`` is True.
        """
        if quantization:
            raise UnsupportedError(message("quantizing is not supported yet", do="pass quantization=False"))
        named = _renamed(state_dict, {theirs: converted for converted, theirs in self._renames.items()})
        layout = self._layout
        if layout is not None and not any(holds_experts(name, get_layout(layout)) for name in named):
            layout = None  # a part of the model without experts
        reverted = revert_state_dict(named, rules=self._rules, layout=layout)
        excluded = re.compile(exclude_key_regex) if exclude_key_regex is not None else None
        return {name: tensor for name, tensor in reverted.items() if excluded is None or not excluded.match(name)}

    def convert_single_tensor_to_hf(self, fqn: str, tensor: Tensor, **kwargs: Any) -> list[tuple[str, Tensor]]:
        """Convert one tensor like ``to_hf``, and return the tensors of the checkpoint that it becomes."""
        return list(self.to_hf({fqn: tensor}, **kwargs).items())


def _renamed(tensors: Mapping[str, Tensor], endings: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace endings of names that consist of whole components and are a key of ``endings``.

    Raises:
        NameProblems: two tensors would have one name.
    """
    renamed: dict[str, Tensor] = {}
    old_names: dict[str, str] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        tail = next((tail for tail in tails if tail in endings), None)
        new = name if tail is None else name.removesuffix(tail) + endings[tail]
        if new in renamed:
            both = (old_names[new], name)
            raise NameProblems(
                message(f"two tensors would be {new}", found=" and ".join(both)), duplicated=[(new, both)]
            )
        renamed[new], old_names[new] = tensor, name
    return renamed


_FAMILIES: Mapping[str, tuple[Mapping[str, str], LayoutName | None]] = {
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
"""Renames and layout of the families for which names in NeMo AutoModel differ from those in transformers."""
