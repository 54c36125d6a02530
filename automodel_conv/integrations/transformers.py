"""transformers' own ``from_pretrained``, with its tensor conversions planned and executed here.

transformers opens a checkpoint's files and hands lazy slices to ``convert_and_load_state_dict_in_model``, which does
all that users know: dtypes, placement, offloading, quantization, sharding, the loading report. With the hook that
function runs twice: first on the converted tensors, whole and under their final names, then on everything else. What
cannot be lowered (see ``whole_conversions``), is quantized or sharded while it is loaded, or is on its way to the disk,
is in the second call and takes upstream's way unchanged, unless it would make numbers of quantized codes without their
scales (``codes``): that is an error.

An index decides which file a tensor is read from, as everywhere in this package; transformers alone takes all tensors
of all files that the index names. Files that it reads whole, with ``disable_mmap=True``, are left to it.

transformers itself maps what it does not convert, cast or move to a device: safetensors' slices are views of a private
mapping of the file. With ``memory_map`` the same holds for what is converted here and lies in a file as it shall in the
model. Source: transformers 5.23.0, ``_materialize_copy`` in ``core_model_loading.py``; safetensors 0.8.0, ``open`` in
``bindings/python/src/lib.rs``.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_conv.dtypes import dtype_code
from automodel_conv.errors import CheckpointError, QuantizationError, UnsupportedError, listing, message
from automodel_conv.execution.filling import Limits, fill
from automodel_conv.execution.mapping import map_targets, with_new, without
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.files.header import read_header
from automodel_conv.files.source import LocalFile
from automodel_conv.integrations.codes import refuse_codes
from automodel_conv.integrations.quantizers import PlainLoad, plain_load, rounds_alike
from automodel_conv.planning.compiler import Conversion, TargetSpec, whole_conversions
from automodel_conv.planning.composition import table_of
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.quantization import as_meant, quantized_table
from automodel_conv.planning.resolve import resolve
from automodel_conv.planning.square import WHICH_SOURCE_LAYOUT, conditional_transposes, square_matrices
from automodel_conv.upstream.models import matching
from automodel_conv.upstream.registry import transformers_available
from automodel_conv.upstream.rules import RuleSet, natural_key

_CONVERT = "convert_and_load_state_dict_in_model"
_LIST = "get_checkpoint_shard_files"
# The modules that open files and convert what is in them; the second from 5.17 on.
_MODULES = ("transformers.modeling_utils", "transformers.modeling_layers")

# What is left where nothing of a load is converted here, and reasons why.
ALL = "all that is converted"
NOT_OPENED_HERE = "some tensors are not in safetensors files that were opened under the hook"
WAITS_FOR_NAMES = "other tensors are renamed only if transformers sees its sources"


class HookedLoad(NamedTuple):
    """What became of the tensors that a load converts."""

    model: str
    """Class of the model."""
    lowered: tuple[str, ...]
    """Targets made by plan."""
    left: Mapping[str, str]
    """Targets left to transformers, with the reason; one entry, ``ALL``, where nothing was looked at."""
    left_out: tuple[str, ...] = ()
    """Tensors of the checkpoint that no parameter takes, also those that the model says to ignore, and of its files."""
    unindexed: tuple[tuple[str, str], ...] = ()
    """Name and file name of each tensor that was not loaded, since the index does not give it to the file in which it
    lies; by file, then name."""
    bytes_mapped: int = 0
    """Bytes of ``lowered`` that were mapped, and so not read (``memory_map=True``)."""


@dataclass
class Acceleration:
    """The loads that went through the hook."""

    loads: list[HookedLoad] = field(default_factory=list)
    """In order. All are kept, with every name, as long as the hook is; a process that loads without end clears it."""

    def __str__(self) -> str:
        lines = []
        for load in self.loads:
            left = "all" if ALL in load.left else len(load.left)
            lines.append(f"{load.model}: {len(load.lowered)} converted by plan, {left} by transformers")
            lines += [f"  {name}: {reason}" for name, reason in load.left.items()]
            lines += [f"  {name} is left out: no parameter takes it" for name in load.left_out]
            lines += [
                f"  {name} of {file}: not loaded, the index gives it to no file or another"
                for name, file in load.unindexed
            ]
        return "\n".join(lines)


def install(memory_map: bool = False) -> Acceleration:
    """Let every ``from_pretrained`` of this process convert its tensors by plan, until ``uninstall``.

    A load raises QuantizationError where transformers would cast quantized codes without their scales. Calling this
    again changes ``memory_map`` alone and returns the same object.

    Args:
        memory_map: map what need not move, as ``load_model`` does: parameters on the CPU whose sources lie in a file
            one after the other in the order of the parameter. What transformers does not convert, it maps anyway.

    Raises:
        UnsupportedError: transformers is missing, or its loader is not one that this was made for.
    """
    with _HOOK.lock:
        acceleration = _HOOK.put()
        _HOOK.kept, _HOOK.kept_maps = True, memory_map
        return acceleration


def uninstall() -> None:
    """Give transformers its own functions back; nothing happens if they are not replaced.

    Loads under way end as they began. A block of ``accelerate_transformers`` that is still open stays without effect.
    """
    with _HOOK.lock:
        _HOOK.kept, _HOOK.kept_maps, _HOOK.blocks, _HOOK.mapping_blocks = False, False, 0, 0
        _HOOK.take()


@contextmanager
def accelerate_transformers(memory_map: bool = False) -> Iterator[Acceleration]:
    """``install`` for the length of a block. Blocks may be nested, and open in several threads at once.

    Patching is for the whole process: loads of other threads, too, are planned while any block is open, and mapped
    while any that is open says ``memory_map``. What a load raises: see ``install``.

    Args:
        memory_map: see ``install``.

    Raises:
        UnsupportedError: see ``install``.
    """
    with _HOOK.lock:
        acceleration = _HOOK.put()
        _HOOK.blocks += 1
        _HOOK.mapping_blocks += memory_map
    try:
        yield acceleration
    finally:
        with _HOOK.lock:
            if _HOOK.acceleration is acceleration:  # unless it was uninstalled meanwhile
                _HOOK.blocks -= 1
                _HOOK.mapping_blocks -= memory_map
                if not _HOOK.blocks and not _HOOK.kept:
                    _HOOK.take()


# --- replacing the functions ------------------------------------------------------------------------------------------


class _Hook:
    """Which functions of transformers are replaced, by whom they were asked for, and what they have done."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.kept = False  # by install()
        self.kept_maps = False
        self.blocks = 0
        self.mapping_blocks = 0
        self.acceleration: Acceleration | None = None
        self._replaced: list[tuple[ModuleType, str, Any, Any]] = []

    @property
    def maps(self) -> bool:
        """Whether anybody has asked for ``memory_map``."""
        return self.kept_maps or self.mapping_blocks > 0

    def put(self) -> Acceleration:
        if self.acceleration is None:
            acceleration = Acceleration()
            replacements = [
                (module, name, function, wrap(function, acceleration))
                for module in _loaders()
                for name, wrap in ((_CONVERT, _converting), ("safe_open", _Opening), (_LIST, _listing))
                if (function := getattr(module, name, None)) is not None
            ]
            for module, name, _, replacement in replacements:
                setattr(module, name, replacement)
            self._replaced, self.acceleration = replacements, acceleration
        return self.acceleration

    def take(self) -> None:
        for module, name, function, replacement in self._replaced:
            if getattr(module, name) is replacement:  # unless somebody has put another one over it
                setattr(module, name, function)
        self._replaced, self.acceleration = [], None


_HOOK = _Hook()


def _loaders() -> list[ModuleType]:
    if not transformers_available():
        raise UnsupportedError(message("transformers 5.1 or newer is not installed", do="pip install transformers"))
    import transformers

    modules = [importlib.import_module(name) for name in _MODULES]
    modules = [module for module in modules if hasattr(module, _CONVERT) and hasattr(module, "safe_open")]
    config = getattr(modules[0], "LoadStateDictConfig", None) if modules else None
    known = "dtype_plan" in getattr(config, "__dataclass_fields__", ())  # not in 5.0
    if transformers.__version__.split(".")[0] != "5" or not known:
        raise UnsupportedError(
            message(
                "this transformers loads checkpoints in a way that is not known here",
                expected="transformers 5.1 or newer, and older than 6",
                found=transformers.__version__,
                do="use load_model(), which needs no hook",
            )
        )
    return modules


# --- what the index says of a file ------------------------------------------------------------------------------------


class _ListedFile(str):
    """The path of a file of an index, which knows the tensors that the index gives to it."""

    given: frozenset[str]
    ignored: dict[str, list[str]]
    """By file name, what lies in a file without being given to it; all files of a load share it, and fill it when they
    are opened."""


def _listing(list_files: Callable[..., Any], acceleration: Acceleration) -> Callable[..., Any]:
    """transformers' reader of an index, whose paths know what the index gives them.

    transformers itself takes every tensor of these files, and of two with one name the later. Source: transformers
    5.23.0, ``utils/hub.py`` and ``_load_pretrained_model`` in ``modeling_utils.py``.
    """

    @functools.wraps(list_files)
    def listed(*args: Any, **kwargs: Any) -> Any:
        paths, metadata = list_files(*args, **kwargs)
        if _HOOK.acceleration is not acceleration:
            return paths, metadata
        given: dict[str, set[str]] = {}
        for name, file in metadata["weight_map"].items():
            given.setdefault(file, set()).add(name)
        files = [_ListedFile(path) for path in paths]
        ignored: dict[str, list[str]] = {}
        for file, (_, names) in zip(files, sorted(given.items()), strict=True):
            file.given, file.ignored = frozenset(names), ignored
        return files, metadata

    return listed


# --- knowing where a tensor lies --------------------------------------------------------------------------------------


class _Slice:
    """safetensors' lazy slice, that also says which tensor of which file it is."""

    def __init__(self, lazy: Any, file: _OpenFile, name: str):
        self._lazy = lazy
        self.path = file.path
        self.listed = file.listed
        self.name = name

    def __getitem__(self, index: Any) -> Tensor:
        return self._lazy[index]

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_lazy":  # of a copy that is not yet filled
            raise AttributeError(attribute)
        return getattr(self._lazy, attribute)


class _OpenFile:
    """safetensors' open file, whose slices say where they are from.

    It has the tensors that the index gives to it, where it was found by one, and all of them elsewhere.
    """

    def __init__(self, file: Any, path: Any):
        self._file = file
        self.path = os.path.abspath(os.fspath(path))
        self.listed = path if isinstance(path, _ListedFile) else None

    def keys(self) -> list[str]:
        names = list(self._file.keys())
        if self.listed is None:
            return names
        given = self.listed.given
        self.listed.ignored[os.path.basename(self.path)] = sorted(name for name in names if name not in given)
        return [name for name in names if name in given]

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file.get_slice(name), self, name)

    def __enter__(self) -> _OpenFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_file":
            raise AttributeError(attribute)
        return getattr(self._file, attribute)


class _Opening:
    """``safe_open``, whose files say where their slices are from; ``isinstance`` takes it for the class it replaces."""

    def __init__(self, safe_open: Any, acceleration: Acceleration):
        functools.update_wrapper(self, safe_open, updated=())
        self._safe_open = safe_open
        self._acceleration = acceleration

    def __call__(self, filename: Any, *args: Any, **kwargs: Any) -> Any:
        if _HOOK.acceleration is not self._acceleration:  # uninstalled, under somebody else's replacement
            return self._safe_open(filename, *args, **kwargs)
        return _OpenFile(self._safe_open(filename, *args, **kwargs), filename)

    def __instancecheck__(self, thing: Any) -> bool:
        return isinstance(thing, (_OpenFile, self._safe_open))


# --- converting -------------------------------------------------------------------------------------------------------


def _converting(convert: Callable[..., Any], acceleration: Acceleration) -> Callable[..., Any]:
    from transformers.utils.import_utils import is_env_variable_true

    @functools.wraps(convert)
    def converted(model: Any, state_dict: dict[str, Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if _HOOK.acceleration is not acceleration:
            return convert(model, state_dict, load_config, *args, **kwargs)
        unindexed = _unindexed(state_dict)
        plain = plain_load(load_config.hf_quantizer, load_config.weight_mapping)
        objects = [rule for rule in plain.rules if rule is not None]
        rules = RuleSet(objects, model)
        # Before 5.17 a plan says what is sharded; since then the parameters do.
        sharded = kwargs.get("tp_plan") if load_config.device_mesh is not None else None
        # Rules of its own: the others are asked below which of them this load has used.
        turned = _square_and_transposed(model, state_dict, RuleSet(objects, model))
        work, left = _planned(model, state_dict, load_config, plain, rules, sharded or {})
        _refuse_left(turned, work, left, model)
        rest = state_dict if work is None else {n: source for n, source in state_dict.items() if n not in work.taken}
        refuse_codes(model, rest, load_config)
        names = list(state_dict)
        unclaimed = resolve(names, RuleSet(load_config.weight_mapping, model), model.state_dict()).unclaimed
        left_out = (*(names[row] for row in unclaimed), *(name for name, _ in unindexed if name not in state_dict))
        if work is None:
            found = convert(model, state_dict, load_config, *args, **kwargs)
            acceleration.loads.append(HookedLoad(type(model).__name__, (), left, left_out, unindexed))
            return found
        mapped = map_targets(work.plan, work.checkpoint, work.devices) if _HOOK.maps else {}
        buffers = with_new(work.plan.targets, mapped, work.devices)
        # As transformers itself does: without threads if its users have said so.
        threads = 1 if is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD") else None
        fill(without(work.plan, mapped), work.checkpoint, buffers, Limits(threads))
        of_plain = replace(load_config, weight_mapping=[], hf_quantizer=None)
        of_converted, *_ = convert(model, buffers, of_plain, *args, **kwargs)
        # Which rules a load has used decides how transformers saves the model.
        used = iter(rules.used)
        for rule, own in zip(load_config.weight_mapping, plain.rules, strict=True):
            if (work.plan.sources.decodes if own is None else next(used)) and hasattr(rule, "_was_used"):
                rule._was_used = True
        of_rest, *others = convert(model, rest, load_config, *args, **kwargs)
        _add(of_rest, of_converted)
        lowered = tuple(target.name for target in work.plan.targets)
        bytes_mapped = sum(tensor.nbytes for tensor in mapped.values())
        acceleration.loads.append(HookedLoad(type(model).__name__, lowered, left, left_out, unindexed, bytes_mapped))
        return (of_rest, *others)

    return converted


def _unindexed(state_dict: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Name and file name of what lies in the files of a load, and is not given to them by their index."""
    listed = (source.listed for source in state_dict.values() if isinstance(source, _Slice))
    ignored = next((file.ignored for file in listed if file is not None), {})
    return tuple((name, file) for file, names in sorted(ignored.items()) for name in names)


class _Work(NamedTuple):
    """What is converted here: sources ``taken``, to buffers on the devices where the parameters will be."""

    plan: CopyPlan
    checkpoint: Checkpoint
    devices: dict[str, torch.device]
    taken: frozenset[str]


def _planned(
    model: Any,
    state_dict: Mapping[str, Any],
    load_config: Any,
    plain: PlainLoad,
    rules: RuleSet,
    tp_plan: Mapping[str, Any],
) -> tuple[_Work | None, dict[str, str]]:
    """The work that is done here, if any, and what is left to transformers with the reason."""
    if plain.why_not is not None:
        return None, {ALL: plain.why_not}
    if not rules.converters and plain.config is None:
        return None, {}
    slices = {name: source for name, source in state_dict.items() if isinstance(source, _Slice)}
    if len(slices) < len(state_dict):
        return None, {ALL: NOT_OPENED_HERE}
    made = type(torch.empty(0, device="cpu"))
    if made is not Tensor:
        return None, {ALL: f"torch makes {made.__name__} here, and nothing can be read into one"}
    try:
        checkpoint = _checkpoint(slices)
    except CheckpointError as error:  # which transformers may read all the same
        return None, {ALL: str(error)}
    wanted = _wanted(model, load_config, tp_plan)
    sources = SourceTable.of(checkpoint)
    if plain.config is not None:
        try:
            sources = quantized_table(sources, plain.config, like_upstream=True)
        except (QuantizationError, UnsupportedError) as error:  # which transformers may load, or tells in its own way
            return None, {ALL: error.reason()}
    first, meant, stored = None, sources, range(len(sources.names))
    if any(decode.swapped for decode in sources.decodes.values()):
        first = as_meant(sources)
        meant, stored = table_of(first.targets), [target.sources[0] for target in first.targets]
    coded = {row for row, own in enumerate(stored) if own in sources.decodes} if sources.decodes else set()
    specs = {name: want.spec for name, want in wanted.items()}
    found, left = whole_conversions(meant, rules, specs, coded)
    conversions: list[Conversion] = []
    for conversion in found:
        conversion = conversion._replace(rows=tuple(stored[row] for row in conversion.rows))
        reason = _why_left(conversion, wanted, rules, sources)
        if reason is None:
            conversions.append(conversion)
        else:
            left[conversion.targets[0].name] = reason
    rows = {row for conversion in conversions for row in conversion.rows}
    parts = {part for decode in sources.decodes.values() for part in decode.parts}
    rows |= {part for row in rows & sources.decodes.keys() for part in sources.decodes[row].parts}
    rows |= sources.hidden - parts  # what belongs to no number
    taken = frozenset(checkpoint.names[row] for row in rows)
    if _renames_otherwise_without(taken, load_config.weight_mapping, model, state_dict):
        left |= {conversion.targets[0].name: WAITS_FOR_NAMES for conversion in conversions}
        conversions = []
    if not conversions:
        return None, left
    texts = tuple(rules.describe(row) for row in range(len(rules.converters)))
    plan = CopyPlan(meant, tuple(target for conversion in conversions for target in conversion.targets), texts)
    plan.validate()
    plan = plan if first is None else first.then(plan)
    devices = {target.name: torch.device(wanted[target.name].device) for target in plan.targets}
    return _Work(plan, checkpoint, devices, taken), left


def _square_and_transposed(model: Any, state_dict: Mapping[str, Any], rules: RuleSet) -> list[str]:
    """Targets made of square matrices that lie transposed, which transformers takes for the model's own.

    Raises:
        UnsupportedError: a square matrix of which nothing tells how it lies.
    """
    if not conditional_transposes(rules):
        return []
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = [tuple(s.get_shape() if hasattr(s, "get_shape") else s.shape) for s in state_dict.values()]
    assignments = resolve(list(state_dict), rules, parameters).assignments
    lies = square_matrices(
        assignments,
        rules,
        shapes,
        parameters,
        do=[f"use load_model(), which needs no hook, with {WHICH_SOURCE_LAYOUT}"],
    )
    return [name for name, transposed in lies.items() if transposed]


def _refuse_left(turned: Iterable[str], work: _Work | None, left: Mapping[str, str], model: Any) -> None:
    """Raise UnsupportedError if a square matrix that lies transposed is left to transformers, which does not see it."""
    made = {target.name for target in work.plan.targets} if work is not None else set()
    names = [name for name in turned if name not in made]
    state = model.state_dict() if names else {}
    wrong = [f"{name}: {left.get(name, left.get(ALL))}" for name in names if not _is_cut(state[name])]
    if wrong:
        raise UnsupportedError(
            message(
                "square matrices lie transposed, and transformers, to which they are left, does not see it:\n"
                + listing(wrong),
                do="use load_model(), which needs no hook",
            )
        )


def _is_cut(parameter: Tensor) -> bool:
    """True if transformers cuts experts out of its source first, whose shape it then takes for one to be transposed."""
    if not hasattr(parameter, "placements") or parameter.shape[0] < 2:
        return False
    sharded = zip(parameter.placements, parameter.device_mesh.shape, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    return any(placement.is_shard(0) and ranks > 1 for placement, ranks in sharded)


class _Want(NamedTuple):
    """What a parameter must become, and where; why it cannot be made here, if it cannot."""

    spec: TargetSpec
    device: Any
    why_not: str | None


def _wanted(model: Any, load_config: Any, tp_plan: Mapping[str, Any]) -> dict[str, _Want]:
    from transformers.integrations.accelerate import expand_device_map

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    devices = expand_device_map(load_config.device_map or {"": "cpu"}, list(state))
    planned, sharded = matching(load_config.dtype_plan or {}), matching(tp_plan)
    wanted = {}
    for name, tensor in state.items():
        # As transformers does: what the plan of dtypes says, or else what the parameter has.
        code = dtype_code(planned(name) or tensor.dtype)
        device, why_not = devices[name], None
        if hasattr(tensor, "placements") or sharded(name) is not None:
            why_not = "it is sharded while it is loaded"
        elif device == "disk" or code is None:
            why_not = f"it is {tensor.dtype} on {device}"
        elif torch.device(device).type not in ("cpu", "cuda"):
            why_not = f"it goes to {device}"
        wanted[name] = _Want(TargetSpec(code or "", tuple(tensor.shape)), device, why_not)
    return wanted


def _renames_otherwise_without(taken: Container[str], rules: list[Any], model: Any, names: Iterable[str]) -> bool:
    """Whether some of the other names would be renamed differently if ``taken`` were not seen: GroupWeightRename."""
    if not any(hasattr(rule, "_active") for rule in rules):
        return False
    with_all, with_rest = RuleSet(rules, model), RuleSet(rules, model)
    ordered = sorted(names, key=natural_key)
    renamed = {name: with_all.rename(name) for name in ordered}
    return any(with_rest.rename(name) != renamed[name] for name in ordered if name not in taken)


def _why_left(conversion: Conversion, wanted: Mapping[str, _Want], rules: RuleSet, sources: SourceTable) -> str | None:
    for row in conversion.rows:
        decode = sources.decodes.get(row)
        if decode is not None and not rounds_alike(decode, sources.dtypes[row], conversion.targets[0].dtype):
            return "transformers rounds its numbers on the way in another dtype"
        if sources.decodes and decode is None and sources.dtypes[row] != conversion.targets[0].dtype:
            return "transformers may leave it in its stored dtype"
    for target in conversion.targets:
        if wanted[target.name].why_not is not None:
            return wanted[target.name].why_not
        if rules.with_prefix(target.name, wanted) != target.name:
            return "transformers would change the prefix of its name once more"
    if len({target.dtype for target in conversion.targets}) > 1:
        return "its targets differ in dtype, and transformers casts before it converts"
    return None


def _checkpoint(slices: Mapping[str, _Slice]) -> Checkpoint:
    """The places of these tensors.

    Raises:
        CheckpointError: the header of a file is broken.
    """
    files = tuple(sorted({source.path for source in slices.values()}))
    sources = {path: LocalFile(path) for path in files}
    headers = {path: read_header(source) for path, source in sources.items()}
    rows = {path: {name: row for row, name in enumerate(header.names)} for path, header in headers.items()}
    number = {path: file for file, path in enumerate(files)}
    places = [(headers[source.path], rows[source.path][source.name]) for source in slices.values()]
    names = list(slices)
    return Checkpoint(
        path=os.path.commonpath(files) if files else "",
        directory=os.path.dirname(files[0]) if files else "",
        files=files,
        names=names,
        dtypes=[header.dtypes[row] for header, row in places],
        shapes=[header.shapes[row] for header, row in places],
        file_ids=[number[source.path] for source in slices.values()],
        offsets=[header.offsets[row] for header, row in places],
        nbytes=[header.nbytes[row] for header, row in places],
        metadata={},
        position={name: row for row, name in enumerate(names)},
        sources=tuple(sources.values()),
    )


def _add(found: Any, of_converted: Any) -> None:
    """Add what the first call found to what the second did: a key is missing if both miss it."""
    found.missing_keys &= of_converted.missing_keys
    for name in ("unexpected_keys", "mismatched_keys", "skipped_pp_keys"):
        if hasattr(found, name):
            getattr(found, name).update(getattr(of_converted, name))
    found.conversion_errors.update(of_converted.conversion_errors)
    found.error_msgs.extend(of_converted.error_msgs)
