"""Match the modules of adapters to the tensors of their base model, as deltas with places in these tensors.

A name in an adapter may be that of a published tensor, of a module of the model, or of a module with parameters that
are stacks of matrices. Source of the latter: PEFT 0.21.2, ``ParamWrapper`` in ``tuners/lora/layer.py`` and
``_inject_parameters`` in ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import NamedTuple

from automodel_conv.errors import NameProblems, UnsupportedError, listing, message
from automodel_conv.lora.adapter import WRAPPED, Adapter, Pair
from automodel_conv.lora.base import Base
from automodel_conv.lora.forms import TRANSFORMERS, VLLM, stated_in_vllm
from automodel_conv.planning.boxes import Piece
from automodel_conv.planning.copies import Target
from automodel_conv.planning.deltas import Delta


class Match(NamedTuple):
    """A module of an adapter, matched to its base model."""

    delta: Delta
    name: str
    """Name of the tensor that the module changes: of the checkpoint, or of the model."""
    is_embedding: bool = False


@dataclass(frozen=True)
class Matches:
    """All modules of adapters, and the places of their deltas in the tensors of the checkpoint."""

    matches: tuple[Match, ...]
    placed: dict[int, list[Piece]]
    """Pieces into the tensors of the checkpoint, by row; ``Piece.source`` is the number of a match."""

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """The delta of each match."""
        return tuple(match.delta for match in self.matches)


_Found = tuple[Match, Iterable[tuple[int, Piece]]]


class _Misfit(Exception):
    """Raised for matrices that do not fit the tensor of their name."""


@dataclass
class Problems:
    """Problems of adapters, by kind."""

    unknown: list[str] = field(default_factory=list)
    misfits: list[tuple[str, str]] = field(default_factory=list)
    """Modules, and how their matrices differ from what the base model has."""
    codes: list[str] = field(default_factory=list)

    def try_match(self, name: str, match: Callable[[], _Found | None]) -> _Found | None:
        """Return a match, or None after recording the problem of the module."""
        try:
            found = match()
        except _Misfit as misfit:
            self.misfits.append((name, str(misfit)))
            return None
        if found is None:
            self.unknown.append(name)
        return found

    def raise_if_any(self, adapters: Sequence[Adapter], base: Base) -> None:
        """Raise one error for all problems, if there are any."""
        misfits = [f"{name}: {problem}" for name, problem in self.misfits]
        parts = [("unexpected: the base model has no weight for", self.unknown), ("do not fit", misfits)]
        sections = [f"  {title} ({len(items)}):\n{listing(items)}" for title, items in parts if items]
        if sections:
            total = sum(len(adapter.pairs) + len(adapter.whole) for adapter in adapters)
            wrong = f"  {len(self.unknown) + len(self.misfits)} of {total} modules would have no effect"
            if base.why_no_model and self.unknown:
                sections.append(f"  names of the model are not known: {base.why_no_model}")
            where = f"{', '.join(adapter.path for adapter in adapters)}; base model {base.where}"
            text = message("the adapter does not fit the base model", where=where)
            do = "check that the adapter was trained on this base model, and that none of its names is misspelt"
            raise NameProblems(message("\n".join([text, wrong, *sections]), do=do), unexpected=self.unknown)
        if self.codes:
            codes = list(dict.fromkeys(self.codes))
            text = f"the adapter changes {len(codes)} tensors that are quantized"
            do = ["{dequantize=True} decodes them first", "merge into the unquantized model"]
            raise UnsupportedError(message(text, where=base.where, found="\n" + listing(codes), do=do))


def match_adapters(adapters: Sequence[Adapter], base: Base) -> Matches:
    """Match all modules of adapters to the tensors of their base model.

    Raises:
        NameProblems: the base model has no tensors for some modules, or has tensors of other shapes, or the config
            states other ranks. The error lists all of them.
        UnsupportedError: the tensors are quantized and not decoded.
    """
    matches, problems = find_matches(adapters, base)
    problems.raise_if_any(adapters, base)
    return matches


def find_matches(adapters: Sequence[Adapter], base: Base) -> tuple[Matches, Problems]:
    """Match all modules of adapters that can be matched; also return the problems of the others."""
    problems, matches = Problems(), []
    placed: dict[int, list[Piece]] = {}
    for number, adapter in enumerate(adapters):
        matcher = _Matcher(adapter, number, base)
        wanted = [(name, partial(matcher.whole, name, row)) for name, row in adapter.whole.items()]
        wanted += [(pair.module, partial(matcher.pair, pair)) for pair in adapter.pairs]
        for name, match in wanted:
            found = problems.try_match(name, match)
            for row, piece in found[1] if found is not None else ():
                placed.setdefault(row, []).append(piece._replace(source=len(matches)))
                if base.has_codes(row):
                    problems.codes.append(base.table.names[row])
            if found is not None:
                matches.append(found[0])
    return Matches(tuple(matches), placed), problems


class _Matcher:
    """Matches the modules of one adapter."""

    def __init__(self, adapter: Adapter, number: int, base: Base):
        self._adapter, self._number, self._base = adapter, number, base
        self._wrappers = Counter(_unwrapped(pair.module)[0] for pair in adapter.pairs)

    def whole(self, name: str, row: int) -> _Found | None:
        """Match a tensor that replaces one of the base model."""
        # PEFT also writes the weights of embeddings that it wraps, which are those of the base model.
        is_wrapped = WRAPPED in self._adapter.tensors.names[row]
        if not is_wrapped and (others := self._base.tied_to(name)):
            raise _Misfit(f"it would also replace {', '.join(others)}, which the model ties to it")
        if not is_wrapped and self._adapter.weight != 1:
            raise _Misfit(f"it replaces a tensor, so the weight of its adapter is 1, not {self._adapter.weight}")
        shape = self._adapter.tensors.shapes[row]
        delta = Delta(name, self._number, (1, prod(shape[:-1]), prod(shape[-1:])), row, None)
        return self._onto(Match(delta, name), name, shape, delta.onto(0, delta.shape[2], 1))

    def pair(self, pair: Pair) -> _Found | None:
        """Match two matrices."""
        path, depth = _unwrapped(pair.module)
        weight = f"{path}.weight"
        shape = self._shape_of(weight) if depth == 0 else None
        if shape is not None and len(shape) == 2:
            return self._onto_matrix(pair, weight, shape)
        if (model_path := self._path_of_stacks(path)) is not None:
            return self._onto_stack(pair, path, depth, model_path)
        same = self._base.same_name(weight) if depth == 0 else None
        shape = None if same is None else self._shape_of(same)
        return None if same is None or shape is None else self._onto_matrix(pair, same, shape)

    def _onto(self, match: Match, name: str, shape: tuple[int, ...], piece: Piece) -> _Found | None:
        """Place a delta onto a tensor of the checkpoint, or of the model."""
        base = self._base
        own = self._shape_of(name)
        if own is None:
            return None
        if own != shape:
            raise _Misfit(f"{list(shape)} for {name} {list(own)}")
        if name in base.weights:
            return match, base.to_rows(base.weights[name], [piece])
        if name in base.targets:
            return match, base.to_rows(base.targets[name], [piece])
        return match, base.published_to_rows(base.published_targets[name], piece)

    def _onto_matrix(self, pair: Pair, weight: str, shape: tuple[int, ...]) -> _Found | None:
        a, b = self._shapes(pair)
        own = self._base.renamed(pair.module) if self._adapter.form == TRANSFORMERS else pair.module
        stated = f"{own}.weight" if self._is_targeted(f"{own}.weight") else own
        rank, (outputs, inputs) = self._adapter.config.rank(stated), shape[::-1] if pair.is_embedding else shape
        if (a, b) != ((rank, inputs), (outputs, rank)):
            swapped = "; A and B are swapped" if (a, b) == ((outputs, rank), (rank, inputs)) else ""
            raise _Misfit(f"A {list(a)}, B {list(b)} for {weight} {list(shape)} at rank {rank}{swapped}")
        delta = self._delta(pair, (1, outputs, inputs), stated)
        match = Match(delta, weight, pair.is_embedding)
        piece = delta.onto(0, 1, outputs) if pair.is_embedding else delta.onto(0, inputs, 1)
        return self._onto(match, weight, shape, piece)

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor of the checkpoint, of the model, or of the published form; None if none is."""
        base = self._base
        target = base.weights.get(name) or base.targets.get(name) or base.published_targets.get(name)
        return None if target is None else target.shape

    def _onto_stack(self, pair: Pair, path: str, depth: int, model_path: str) -> _Found | None:
        parameter = self._parameter(pair, path, depth, model_path)
        name = f"{model_path}.{parameter}"
        stated = name
        if self._adapter.form == VLLM:
            stated = stated_in_vllm(path, parameter, depth, self._wrappers[path])
        target = self._base.targets[name]
        count, rows, columns = (1, *target.shape)[-3:]
        (ranks, inputs), (outputs, b_ranks) = self._shapes(pair)
        rank = self._adapter.config.rank(stated)
        if ranks != count * rank or ranks != b_ranks or (inputs, outputs) not in ((columns, rows), (rows, columns)):
            found = f"A {[ranks, inputs]}, B {[outputs, b_ranks]} for {name} {list(target.shape)}"
            raise _Misfit(f"{found} at rank {rank}")
        if inputs == (columns if rows != columns or self._reads_last(target, model_path) else -1):
            delta = self._delta(pair, (count, rows, columns), stated)
            piece = delta.onto(0, columns, 1, rows * columns)
        else:
            delta = self._delta(pair, (count, columns, rows), stated)
            piece = delta.onto(0, 1, columns, rows * columns)
        # A tensor of the checkpoint may have the same name and hold the matrices transposed.
        return Match(delta, name), self._base.to_rows(target, [piece])

    def _reads_last(self, target: Target, path: str) -> bool:
        """Return whether A belongs to the last dimension of a stack of square matrices, and B to the one before it."""
        if self._adapter.form == VLLM:
            return self._base.has_inputs_last(target)
        return self._adapter.config.reads_last(self._base.is_transposed(path))

    def _path_of_stacks(self, path: str) -> str | None:
        """Return the path of the module in the model whose parameters the wrappers at ``path`` adapt, if any."""
        if not self._base.targets:
            return None
        found = path if self._base.parameters_of(path) else self._base.published_paths.get(path)
        return found if found is not None and self._stacks(found) else None

    def _stacks(self, model_path: str) -> list[str]:
        """Return the names of a module's own parameters that an adapter can belong to, in the order of wrapping."""
        names = self._base.parameters_of(model_path)
        return [name for name in names if self._dims(f"{model_path}.{name}") in (2, 3)]

    def _dims(self, name: str) -> int:
        """Return the number of dimensions of a parameter of the model; 0 if the checkpoint does not fill it."""
        return len(self._base.targets[name].shape) if name in self._base.targets else 0

    def _parameter(self, pair: Pair, path: str, depth: int, model_path: str) -> str:
        """Return the name of the parameter that a pair belongs to.

        The first parameter is wrapped innermost.
        """
        stacks = self._stacks(model_path)
        wrappers = self._wrappers[path]
        targeted = [name for name in stacks if self._is_targeted(f"{model_path}.{name}")]
        three = [name for name in stacks if self._dims(f"{model_path}.{name}") == 3]
        chosen = next((names for names in (targeted, three) if len(names) == wrappers > depth), None)
        if chosen is not None:
            return chosen[wrappers - 1 - depth]
        (_, inputs), (outputs, _) = self._shapes(pair)
        fitting = [
            name for name in three if {inputs, outputs} == {*self._base.targets[f"{model_path}.{name}"].shape[1:]}
        ]
        if wrappers == 1 and len(fitting) == 1:
            return fitting[0]
        raise _Misfit(f"one of {', '.join(three)}: state which in target_parameters of adapter_config.json")

    def _is_targeted(self, name: str) -> bool:
        return any(f".{name}".endswith(f".{stated}") for stated in self._adapter.config.target_parameters)

    def _shapes(self, pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._adapter.tensors.shapes[pair.a], self._adapter.tensors.shapes[pair.b]

    def _delta(self, pair: Pair, shape: tuple[int, int, int], stated: str) -> Delta:
        config = self._adapter.config
        scale = config.scale(stated) * self._adapter.weight
        return Delta(pair.module, self._number, shape, pair.a, pair.b, config.rank(stated), scale, config.groups_b)


def _unwrapped(module: str) -> tuple[str, int]:
    """Return the name of a module without the names of wrappers at its end, and their number."""
    path = module
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path, (len(module) - len(path)) // len(WRAPPED)
