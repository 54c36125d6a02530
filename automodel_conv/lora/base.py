"""The base model of an adapter: the tensors of its checkpoint, and the parameters that they become in the model.

An adapter may use the names of either. Both are connected by the plan that loads the checkpoint into the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

from torch import nn

from automodel_conv.compiling.decoded import decoded_table
from automodel_conv.compiling.options import PlanSettings
from automodel_conv.compiling.planned import load_plan
from automodel_conv.compiling.to_checkpoint import saving_plan
from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import QuantizationError, UnsupportedError
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.boxes import Piece
from automodel_conv.planning.copies import SourceTable, Target
from automodel_conv.planning.deltas import chained
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import arranged_plan
from automodel_conv.upstream.from_config import meta_model
from automodel_conv.upstream.models import expert_layouts, state_table
from automodel_conv.upstream.registry import has_rules_of_type, model_rules
from automodel_conv.upstream.rules import RuleSet


class Loading(NamedTuple):
    """A model, and the plan that loads a checkpoint into it."""

    model: nn.Module
    plan: CopyPlan
    """Plan from the rows of the checkpoint to the parameters of the model, in the layout of the model's own experts."""


class Base:
    """The base model of an adapter.

    Args:
        where: path of the checkpoint, for errors.
        table: the tensors of the checkpoint.
        compile_loading: returns the model and the plan that loads it. It is called when an adapter needs more than the
            names of the checkpoint.
        keeps_codes: whether quantized tensors are not decoded, although the table describes their values.
    """

    def __init__(
        self, where: str, table: SourceTable, compile_loading: Callable[[], Loading], keeps_codes: bool = False
    ):
        self.where = where
        self.table = table
        self.keeps_codes = keeps_codes
        self._compile_loading = compile_loading

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each tensor of the checkpoint by its name."""
        return {name: row for row, name in enumerate(self.table.names) if row not in self.table.hidden}

    @cached_property
    def weights(self) -> dict[str, Target]:
        """The tensors of the checkpoint by name; quantized ones as the weights that their decoded values are."""
        return {target.name: target for target in arranged_plan(self.table).targets}

    def has_codes(self, row: int) -> bool:
        """Return whether a tensor of the checkpoint has codes, not values that can be added to."""
        return self.keeps_codes if row in self.table.decodes else self.table.dtypes[row] not in FLOATING

    @cached_property
    def _loading(self) -> Loading | UnsupportedError:
        try:
            return self._compile_loading()
        except UnsupportedError as error:
            return error

    @property
    def loading(self) -> Loading:
        """The model, and the plan that loads it.

        Raises:
            UnsupportedError: there is no model.
        """
        if isinstance(self._loading, UnsupportedError):
            raise self._loading
        return self._loading

    @property
    def why_no_model(self) -> str | None:
        """The reason why there is no model; None if there is one, or none is needed."""
        failed = self.__dict__.get("_loading")
        return failed.reason() if isinstance(failed, UnsupportedError) else None

    @cached_property
    def targets(self) -> dict[str, Target]:
        """Parameters and buffers of the model that the checkpoint fills, by name; none if there is no model."""
        if isinstance(self._loading, UnsupportedError):
            return {}
        targets = {target.name: target for target in self.loading.plan.targets}
        for tied in self.loading.plan.tied:
            filled = next((targets[name] for name in tied if name in targets), None)
            if filled is not None:
                targets |= {name: filled for name in tied if name not in targets}
        return targets

    def tied_to(self, name: str) -> list[str]:
        """Return the other names of a parameter in the model."""
        if isinstance(self._loading, UnsupportedError):
            return []
        return [other for tied in self.loading.plan.tied if name in tied for other in tied if other != name]

    def is_tied(self, name: str) -> bool:
        """Return whether a name is not in the checkpoint, and the model has it for a tensor that has another name."""
        return name not in self.rows and name in self.targets and self.targets[name].name != name

    def to_rows(self, target: Target, pieces: Sequence[Piece]) -> Iterator[tuple[int, Piece]]:
        """Yield the row and the piece of each part of ``pieces``, which write a target, in the checkpoint's tensors."""
        numel = prod(target.shape)
        for copy in target.copies:
            for piece in copy.pieces():
                row = target.sources[piece.source]
                for part in chained(pieces, piece.inverse(), numel, target.name):
                    yield row, part

    def published_to_rows(self, target: Target, piece: Piece) -> Iterator[tuple[int, Piece]]:
        """Yield ``to_rows`` of a piece that writes a tensor of the published form, which the checkpoint does not have.

        Args:
            target: the tensor, a target of ``published``.
            piece: the piece.
        """
        for copy in target.copies:
            for source in copy.pieces():
                name = self.published.sources.names[target.sources[source.source]]
                parts = chained([piece], source.inverse(), prod(target.shape), name)
                yield from self.to_rows(self.targets[name], parts) if name in self.targets else ()

    @cached_property
    def published_targets(self) -> dict[str, Target]:
        """The tensors of the published form by name; none if there is no model."""
        return {target.name: target for target in self.published.targets} if self.targets else {}

    def parameters_of(self, path: str) -> list[str]:
        """Return the names of the parameters that a module itself has, in the order in which it registers them."""
        try:
            module = self.loading.model.get_submodule(path)
        except AttributeError:
            return []
        return [name for name, _ in module.named_parameters(recurse=False)]

    def is_transposed(self, path: str) -> bool:
        """Return whether a module states that its matrices are stored as ``[in, out]``.

        Source: PEFT 0.21.2, ``ParamWrapper.update_layer``; transformers 5.24.0, ``use_experts_implementation``.
        """
        return bool(getattr(self.loading.model.get_submodule(path), "is_transposed", False))

    @cached_property
    def has_stacks(self) -> bool:
        """Whether the model has parameters that are stacks of matrices."""
        return any(len(target.shape) == 3 for target in self.targets.values())

    def has_inputs_last(self, target: Target) -> bool:
        """Return whether the matrices of a stack are ``[out, in]``, as linear layers store them."""
        stated = expert_layouts(self.loading.model).get(target.name.rpartition(".")[0])
        return stated is None or not stated.transposed

    @cached_property
    def published(self) -> CopyPlan:
        """The plan from the parameters of the model to the form in which the type is published."""
        model = self.loading.model
        return saving_plan(state_table(model.state_dict()), model=model)

    @cached_property
    def published_paths(self) -> dict[str, str]:
        """Path of each module with stacks in the model, by the path that only its experts have when published."""
        counts = Counter(self.paths_when_published.values())
        return {published: path for path, published in self.paths_when_published.items() if counts[published] == 1}

    @cached_property
    def paths_when_published(self) -> dict[str, str]:
        """Path that the experts have when published, by the path of the module with their stacks in the model."""
        paths: dict[str, str] = {}
        names = self.published.sources.names
        for target in self.published.targets:
            for row in target.sources:
                path = names[row].rpartition(".")[0]
                if len(self.published.sources.shapes[row]) == 3 and path:
                    paths.setdefault(path, published_path(target))
        return paths

    def same_name(self, name: str) -> str | None:
        """Return the name in the checkpoint that the model's rules treat as they treat ``name``; None if none is.

        Older releases of a model have other names, which rules of transformers still accept.
        """
        if not self.targets:
            return None
        return self._names_by_meaning.get(self._meaning(name))

    @cached_property
    def layers_when_published(self) -> dict[str, str]:
        """Published name of each layer, if its weight alone becomes a published tensor, by its name in the model."""
        names = self.published.sources.names
        return {
            names[target.sources[0]].removesuffix(".weight"): target.name.removesuffix(".weight")
            for target in self.published.targets
            if len(target.sources) == 1 and names[target.sources[0]].endswith(".weight")
        }

    def renamed(self, path: str) -> str:
        """Return what the model's rules make of the name of a module in an adapter.

        PEFT applies them to every adapter that it loads, whether its names are published or the model's, if the model's
        type has rules. Some rules also change names of the model. Source: PEFT 0.21.2,
        ``convert_peft_adapter_state_dict_for_transformers``.
        """
        if not self._is_renamed:
            return path
        end = ".lora_A.weight"
        return self._rules.rename_part(path + end).removesuffix(end)

    @cached_property
    def _is_renamed(self) -> bool:
        return has_rules_of_type(self.loading.model)

    @cached_property
    def _rules(self) -> RuleSet:
        return RuleSet(model_rules(self.loading.model), self.loading.model)

    @cached_property
    def _names_by_meaning(self) -> dict[tuple[object, ...], str]:
        return {self._meaning(name): name for name in self.rows}

    def _meaning(self, name: str) -> tuple[object, ...]:
        """Return what the rules make of a name: its target, the rule, and the numbers of the name in order."""
        renamed, rule, pattern = self._rules.rename(name)
        return renamed, rule, pattern, tuple(part for part in name.split(".") if part.isdecimal())


def base_of(checkpoint: Checkpoint, dequantize: bool) -> Base:
    """Return the base model of a checkpoint, with the model of its ``config.json`` if one is needed.

    Args:
        checkpoint: the checkpoint.
        dequantize: whether quantized tensors are decoded.
    """
    try:
        table, is_decoded = decoded_table(checkpoint, needs_values=dequantize), True
    except (UnsupportedError, QuantizationError):
        if dequantize:
            raise
        # Codes that cannot be decoded keep their names and shapes; an adapter that changes one is refused.
        table, is_decoded = SourceTable.from_checkpoint(checkpoint), False

    def compile_loading() -> Loading:
        model = meta_model(checkpoint, None)
        return Loading(model, load_plan(checkpoint, model, PlanSettings(dequantize=is_decoded))[0])

    return Base(checkpoint.path, table, compile_loading, keeps_codes=not dequantize)


def published_path(target: Target) -> str:
    """Return the path of the experts that a published tensor belongs to.

    It is ``layers.0.experts`` for ``layers.0.experts.3.w1.weight``, and for ``layers.0.experts.down_proj`` if that is a
    stack of matrices.
    """
    parts = target.name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] if len(target.shape) == 2 and numbers else -1])
