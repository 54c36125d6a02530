"""Run loading code on tensors without data, and plan what it does."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from automodel_conv.dtypes import torch_dtype
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.loading_code.attributes import changes_in, containers_in
from automodel_conv.loading_code.calling import Load, Targets, call, returned
from automodel_conv.loading_code.changes import Changes, changes_of, is_in_place
from automodel_conv.loading_code.stand_ins import (
    as_before,
    check_plain,
    is_same_memory,
    named_tensors,
    with_stand_ins,
)
from automodel_conv.loading_code.threads import in_threads
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.loader_trace import LoaderTrace
from automodel_conv.planning.loader_writes import OLD_VALUES, Computed, NeedsValues, View, key_of
from automodel_conv.planning.origins import Unknown
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.traced_copies import Composer, Filled
from automodel_conv.planning.traced_plan import traced_plan
from automodel_conv.planning.value_reads import ValueReads
from automodel_conv.types import LoaderCalls


@dataclass(frozen=True)
class Traced:
    """The plan of loading code, and what else it does."""

    plan: CopyPlan
    """The copies that it makes."""
    computed: Mapping[str, Unknown]
    """Targets that only the code itself can fill, by name."""
    names: tuple[str, ...]
    """Names of all targets, in the order of the module or of what the code returns."""
    changes: Changes
    """Tensors that it puts into the module or the mapping, and removes from it."""
    values_read: frozenset[int] = frozenset()
    """Rows of the sources whose values it reads."""
    targets_read: frozenset[str] = frozenset()
    """Names of the targets whose values it reads."""
    needed: frozenset[str] = frozenset()
    """Names of the targets that computed ones are made of, and of these."""
    rewritten: tuple[str, ...] = ()
    """Names of the targets to which it writes elements more than once; the last write counts."""

    @property
    def rows_for_computed(self) -> frozenset[int]:
        """Rows of the sources that it needs with data, so that it can fill the targets that it computes."""
        rows = self.values_read.union(*(unknown.rows for unknown in self.computed.values()))
        return rows.union(*(target.sources for target in self.plan.targets if target.name in self.needed))


def traced(
    load: Load,
    sources: SourceTable,
    targets: Targets,
    calls: LoaderCalls,
    read: Callable[[Sequence[int]], list[Tensor]],
) -> Traced:
    """Return what loading code does with the tensors of a checkpoint.

    Args:
        load: the loading code.
        sources: the tensors, as stored.
        targets: what it fills; None: it returns tensors. They are not changed.
        calls: what it is called with.
        read: returns sources with data, by their rows.
    """
    check_plain(targets)
    with _without_collections():
        return _traced(load, sources, targets, calls, read)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Turn Python's collector off within a ``with`` statement.

    A trace makes hundreds of thousands of small objects, none of them garbage. Passes over them would take a third of
    its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _traced(
    load: Load,
    sources: SourceTable,
    targets: Targets,
    calls: LoaderCalls,
    read: Callable[[Sequence[int]], list[Tensor]],
) -> Traced:
    own = named_tensors(targets)
    data: dict[int, Tensor] = {}
    targets_read: frozenset[str] = frozenset()
    fills_large = False
    default_dtype = torch.get_default_dtype()
    while True:
        try:
            with torch.random.fork_rng(devices=[]):
                seen = _seen(load, _sources_of(sources, data), targets, calls, targets_read, fills_large)
        except _ReadsValues as error:
            rows = sorted(_like(sources, error.rows) - data.keys())
            names = frozenset() if rows else _like_names(own, error.targets)
            if not rows and names <= targets_read:
                rows = sorted(_like(sources, error.rows_beside) - data.keys())
                if not rows and fills_large:
                    raise _no_values(error.reason) from None
                fills_large = fills_large or not rows
            data |= zip(rows, read(rows) if rows else (), strict=True)
            targets_read |= names
            continue
        finally:
            torch.set_default_dtype(default_dtype)
        plan = traced_plan(seen.filled, sources)
        behind = seen.composer.storages_behind(seen.filled[name][0].storage for name in plan.computed)
        changed = seen.composer.changed_rows(behind)
        return Traced(
            plan=plan.plan,
            computed={name: unknown._replace(rows=unknown.rows | changed) for name, unknown in plan.computed.items()},
            names=tuple(seen.filled),
            changes=seen.changes,
            values_read=frozenset(data),
            targets_read=targets_read,
            needed=frozenset(
                name for name, (view, _) in seen.filled.items() if {view.storage, seen.first.get(name)} & behind
            ),
            rewritten=tuple(name for name, (view, _) in seen.filled.items() if seen.composer.is_rewritten(view)),
        )


class _ReadsValues(Exception):
    """Loading code reads values of sources or targets without data."""

    def __init__(self, reason: str, rows: frozenset[int], targets: frozenset[str], rows_beside: frozenset[int]):
        super().__init__(reason)
        self.reason, self.rows, self.targets = reason, rows, targets
        self.rows_beside = rows_beside
        """Rows of the sources of other elements of the same storages: these lose their data all together."""


def _no_values(reason: str) -> UnsupportedError:
    return UnsupportedError(
        message(
            "the loading code reads values that nothing has",
            expected="values of tensors of the checkpoint, or of targets",
            found=reason,
            do="let the loading code make these values of the tensors that it is called with",
        )
    )


def _sources_of(sources: SourceTable, data: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return the sources by name; those in ``data``, by row, have values."""
    given = {}
    for row, (name, code, shape) in enumerate(zip(sources.names, sources.dtypes, sources.shapes, strict=True)):
        if row in data:
            given[name] = data[row].clone()  # the code may change it
        else:
            given[name] = torch.empty(shape, dtype=torch_dtype(code), device="meta")
    return given


def _like(sources: SourceTable, rows: frozenset[int]) -> frozenset[int]:
    """Return the rows of sources whose names differ only in numbers from those of ``rows``, and that are alike."""

    def kind(row: int) -> tuple[object, ...]:
        return _template(sources.names[row]), sources.dtypes[row], sources.shapes[row]

    kinds = set(map(kind, rows))
    return frozenset(row for row in range(len(sources.names)) if kind(row) in kinds) if rows else rows


def _like_names(tensors: Mapping[str, Tensor], names: frozenset[str]) -> frozenset[str]:
    """Return the names that differ only in numbers from ``names``."""
    templates = set(map(_template, names))
    return frozenset(name for name in tensors if _template(name) in templates)


def _template(name: str) -> str:
    return re.sub(r"\d+", "0", name)


class _Seen(NamedTuple):
    """The effects of one run of loading code."""

    filled: dict[str, tuple[View, Filled]]
    changes: Changes
    first: Mapping[str, int]
    """Storage that each target has before, by name."""
    composer: Composer


def _seen(
    load: Load,
    given: Mapping[str, Tensor],
    targets: Targets,
    calls: LoaderCalls,
    targets_read: Collection[str],
    fills_large: bool,
) -> _Seen:
    """Run loading code on sources, and return what it does.

    Args:
        load: the loading code.
        given: the sources by name.
        targets: what it fills.
        calls: what it is called with.
        targets_read: names of the targets whose values it reads.
        fills_large: see ``LoaderTrace``.

    Raises:
        _ReadsValues: the code reads values of sources or targets without data.
        UnsupportedError: it does what tensors without data cannot.
    """
    before = named_tensors(targets)
    read_keys = {key_of(before[name]) for name in targets_read}
    with _in_place_of(targets, read_keys) as replaced:
        own = named_tensors(targets)
        containers = containers_in(targets) if isinstance(targets, nn.Module) else ()
        forms = {name: tensor.detach() for name, tensor in own.items()}
        keys = {key_of(replaced[id(tensor)]): key_of(tensor) for tensor in own.values() if id(tensor) in replaced}
        with_data = [key_of(tensor) for tensor in given.values() if not tensor.is_meta]
        read = [tensor for name, tensor in own.items() if key_of(before[name]) in read_keys]
        read_ids = set(map(id, read))
        unread = [tensor for tensor in own.values() if id(tensor) not in read_ids]
        trace = LoaderTrace([*unread, *replaced.values()], keys, with_data, read, fills_large)
        rows = {trace.keep(tensor).storage: (row, tensor.dtype) for row, tensor in enumerate(given.values())}
        first = {name: trace.keep(tensor).storage for name, tensor in own.items()}
        old = {storage: None if before[name].is_meta else OLD_VALUES for name, storage in first.items()}
        reads = ValueReads(trace)
        try:
            with torch.no_grad(), trace, reads, in_threads(trace, reads):
                result = call(load, given.items(), calls)
        except NeedsValues as error:
            composer = _composed(trace, rows, old)
            read_rows = frozenset(row for view in error.inputs for row in composer.rows(view))
            storages = composer.storages_behind(view.storage for view in error.inputs)
            names = frozenset(
                name for name, tensor in own.items() if {trace.keep(tensor).storage, first[name]} & storages
            )
            raise _ReadsValues(error.reason, read_rows, names, composer.source_rows(storages)) from None
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            if not _NO_DATA.search(str(error)):
                raise
            raise UnsupportedError(
                message(
                    "the loading code does not run on tensors without data",
                    expected="code that moves tensors by operations of torch",
                    found=f"{type(error).__name__}: {error}",
                    do="change this step of the loading code, or call it on tensors with data yourself",
                )
            ) from error
        found = named_tensors(targets) if targets is not None else returned(result)
        sharing = Counter(first[name] for name in {id(tensor): name for name, tensor in own.items()}.values())
        composer = _composed(trace, rows, old)
        filled, made = {}, {}
        for name, tensor in found.items():
            view, content = trace.keep(tensor), _content(trace, composer, tensor)
            is_own = tensor is own.get(name)
            if not is_in_place(tensor, own.get(name), replaced) or _leaves(view.storage, first[name], sharing):
                made[name] = tensor
            if is_own and id(tensor) not in replaced and not is_same_memory(tensor, forms[name]):
                content = Filled(unknown=Unknown("changes the memory of a target", composer.rows(view)))
            elif not content.is_written and (targets is None or (name in made and old.get(view.storage, OLD_VALUES))):
                everything = frozenset(range(len(given)) if targets is None else ())
                content = Filled(unknown=Unknown("the loading code writes nothing to it", everything))
            filled[name] = view, content
        written = {write.target.storage for write in trace.writes}
        attributes = changes_in(containers, replaced, trace.has_data, written)
        changes = replace(changes_of(targets, own, found, made), attributes=attributes)
        return _Seen(filled, changes, first, composer)


_NO_DATA = re.compile(r"\bmeta\b|\bMeta\w*Type\b", re.IGNORECASE)
"""Words of torch's errors about tensors without data."""


@contextmanager
def _in_place_of(targets: Targets, read: Collection[int]) -> Iterator[Mapping[int, Tensor]]:
    """Make targets ready for loading code, and put everything back; yield what ``with_stand_ins`` yields.

    Targets whose values the code reads stay, since it may know them from elsewhere than the module; their values are
    put back.
    """

    def is_read(tensor: Tensor) -> bool:
        return key_of(tensor) in read

    own = named_tensors(targets).values()
    values = [(tensor.detach(), tensor.detach().clone()) for tensor in own if is_read(tensor)]
    try:
        if isinstance(targets, nn.Module):
            with with_stand_ins(targets, lambda tensor: tensor.is_meta or not is_read(tensor), is_read) as replaced:
                yield replaced
        else:
            with as_before(targets):
                yield {}
    finally:
        for tensor, value in values:
            tensor.copy_(value)


def _leaves(storage: int, first: int, sharing: Mapping[int, int]) -> bool:
    """Return whether a target has a storage other than its first one, which other targets have, too."""
    return storage != first and sharing[first] > 1


def _composed(
    trace: LoaderTrace, rows: Mapping[int, tuple[int, torch.dtype]], old: Mapping[int, Computed | None]
) -> Composer:
    composer = Composer(trace.nbytes, rows, old)
    for write in trace.writes:
        composer.write(write)
    return composer


def _content(trace: LoaderTrace, composer: Composer, tensor: Tensor) -> Filled:
    """Return what fills a tensor."""
    if trace.is_unwritten(tensor):
        return Filled(is_written=False)
    content = trace.content(tensor)
    if isinstance(content, View):
        return composer.filled(content)
    return composer.filled_with(trace.keep(tensor), content)
