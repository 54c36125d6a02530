"""Write an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source of the settings: PEFT 0.21.2, ``LoraConfig`` in ``tuners/lora/config.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from automodel_conv.errors import UnsupportedError, listing, message
from automodel_conv.execution.buffers import byte_view
from automodel_conv.execution.factors import Factors
from automodel_conv.execution.writing import create_shard_file
from automodel_conv.files import system
from automodel_conv.files.companions import companions_of
from automodel_conv.files.full_io import write_exactly
from automodel_conv.files.shards import Shard, Spec, shard_of
from automodel_conv.files.uploads.output_folders import OutputFolder
from automodel_conv.files.write_errors import write_errors
from automodel_conv.lora.adapter import PREFIX, WEIGHTS_NAME, WRAPPED, Adapter
from automodel_conv.lora.base import Base
from automodel_conv.lora.config import CONFIG_NAME, OLDEST_PEFT, ORDER_OF_B, AdapterConfig, alpha_for
from automodel_conv.lora.forms import TRANSFORMERS
from automodel_conv.lora.matching import match_adapters
from automodel_conv.lora.parts import NewModule
from automodel_conv.lora.reforming import Reformed, codes_of, matrices, reform
from automodel_conv.progress import bytes_progress

# Settings that select modules in another way than by their names.
_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Written(NamedTuple):
    """An adapter that was written."""

    shard: Shard
    """The file of its weights."""
    reformed: Reformed
    """Its content."""
    copied: tuple[str, ...]
    """Paths of the other files that were copied."""


def write_reformed(adapter: Adapter, base: Base, folder: OutputFolder, form: str, progress: bool) -> Written:
    """Write an adapter in a form, with the other files of its directory, if it has one.

    Args:
        adapter: the adapter.
        base: its base model.
        folder: the destination.
        form: name of the form.
        progress: whether to show a progress bar.

    Raises:
        NameProblems: the adapter does not fit its base model.
        UnsupportedError: the form cannot hold the adapter.
        DestinationError, WriteError, ReadError: see ``write_adapter``.
    """
    matches = match_adapters([adapter], base)
    factors = Factors([adapter.tensors], matches.deltas)
    reformed = reform(matches, base, form, factors)
    settings = new_settings(adapter.config, reformed, base, form)
    companions = adapter.directory or None
    shard, copied = write_adapter(folder, reformed, factors, settings, form, companions, progress)
    return Written(shard, reformed, copied)


def write_adapter(
    folder: OutputFolder,
    reformed: Reformed,
    factors: Factors,
    settings: Mapping[str, Any],
    form: str,
    companions: str | None,
    progress: bool,
) -> tuple[Shard, tuple[str, ...]]:
    """Write an adapter into a folder that has no weights yet.

    Args:
        folder: the folder.
        reformed: the modules.
        factors: the old matrices, from which the new ones are computed.
        settings: the content of the new config.
        form: name of the form, which the file states.
        companions: path of a directory whose other files are copied; None: none are.
        progress: whether to show a progress bar.

    Returns:
        The file of the weights, and the paths of the files that were copied.

    Raises:
        DestinationError: the folder holds weights already, or another process writes to it.
        WriteError, ReadError: writing or reading failed.
    """
    shard = _shard(reformed, factors, form)
    others = [] if companions is None else companions_of(companions, folder.directory)
    copied = tuple(name for name in others if name != CONFIG_NAME)
    data = sum(spec.nbytes for spec in shard.specs)
    with folder.open([shard], None) as place, bytes_progress(data, "writing", progress) as advance:
        path = place.path(shard.name)
        create_shard_file(shard, path)
        with write_errors(path, "a file"), system.open_existing(path) as file:
            offsets = {spec.name: offset for spec, offset in zip(shard.specs, shard.offsets, strict=True)}
            for name, tensor in _tensors(reformed, factors):
                write_exactly(file.fileno(), [byte_view(tensor.contiguous())], offsets[name], path)
                advance(tensor.nbytes)
            system.sync(file.fileno())
        place.write(CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n")
        for name in copied:
            with write_errors(folder.directory):
                system.copy_file(os.path.join(companions or "", *name.split("/")), place.companion_path(name))
        place.finish(shard)
        place.commit(None)
    return shard, copied


def _tensors(reformed: Reformed, factors: Factors) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an adapter with their names, those of an old module one after the other."""
    for module in reformed.modules:
        yield from zip(_names(module), matrices(module, factors), strict=True)
    for name, number in reformed.whole.items():
        yield PREFIX + name, factors.of(number)[0]


def _names(module: NewModule) -> tuple[str, str]:
    """Return the names of A and B."""
    part, end = ("lora_embedding_", "") if module.is_embedding else ("lora_", ".weight")
    return f"{PREFIX}{module.name}.{part}A{end}", f"{PREFIX}{module.name}.{part}B{end}"


def _shard(reformed: Reformed, factors: Factors, form: str) -> Shard:
    specs = []
    for module in reformed.modules:
        (count, outputs, inputs), (a, b) = module.shape, codes_of(module, factors)
        name_a, name_b = _names(module)
        specs += [
            Spec(name_a, a, (count * module.rank, inputs)),
            Spec(name_b, b, (outputs, module.rank * count)),
        ]
    twice = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if twice:
        text = f"the form {form!r} has one name for several modules of the adapter"
        raise UnsupportedError(message(text, found="\n" + listing(twice), do="choose another form with {layout=}"))
    for name, number in reformed.whole.items():
        specs.append(Spec(PREFIX + name, factors.dtypes(number)[0], factors.stored_shape(number)))
    return shard_of(WEIGHTS_NAME, specs, form)


def new_settings(config: AdapterConfig, reformed: Reformed, base: Base, form: str) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for an adapter in another form.

    Args:
        config: the old config, whose other settings are kept.
        reformed: the modules of the new form.
        base: the base model.
        form: name of the new form.
    """
    modules = reformed.modules
    layers = [module.stated for module in modules if not module.is_parameter]
    parameters = [module.stated for module in modules if module.is_parameter]
    ranks = {module.stated: module.rank for module in modules}
    alphas = {module.stated: alpha_for(module.scale, module.rank, config.uses_rslora) for module in modules}
    rank = _usual(ranks.values(), config.settings["r"])
    alpha = _usual(alphas.values(), config.settings["lora_alpha"])
    known = _all_layers(base, form)
    targets = _shortened(layers, known, 1)
    settings = {
        **config.settings,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns({name: value for name, value in ranks.items() if value != rank}, ranks),
        "alpha_pattern": _patterns({name: value for name, value in alphas.items() if value != alpha}, alphas),
        "target_modules": targets,
        "target_parameters": _shortened(parameters, _all_parameters(base) if parameters else (), 2) or None,
        **{key: None for key in _SELECTING if key in config.settings},
    }
    settings.pop(ORDER_OF_B, None)
    if unwanted := _found_by(targets, known) - set(layers):
        settings["exclude_modules"] = sorted(unwanted)
    paths = {name.rpartition(".")[0] for name in reformed.whole}
    if saved := sorted(path for path in paths if not path.endswith(WRAPPED)):
        settings["modules_to_save"] = saved
    if parameters:
        settings["lora_dropout"] = 0.0  # PEFT accepts no other for parameters
        if config.peft_version < tuple(map(int, OLDEST_PEFT.split("."))):
            settings["peft_version"] = OLDEST_PEFT
    return settings


def _usual(values: Iterable[Any], otherwise: Any) -> Any:
    """Return the most frequent value."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else otherwise


def _patterns(values: Mapping[str, Any], all_values: Mapping[str, Any]) -> dict[str, Any]:
    """Return regular expressions for names with these values, which match no name with another value.

    The first of three kinds is used that does not: the end of the name, the name with any number in place of its last
    one, the name itself. PEFT also tries a pattern after any dot of a name, so "^" marks the start.
    """
    patterns: dict[str, Any] = {}
    for pattern_of in (_end, _any_number, _whole):
        groups: dict[str, set[Any]] = {}
        for name, value in all_values.items():
            groups.setdefault(pattern_of(name), set()).add(value)
        fits = {name: value for name, value in values.items() if len(groups[pattern_of(name)]) == 1}
        patterns |= {pattern_of(name): value for name, value in fits.items()}
        values = {name: value for name, value in values.items() if name not in fits}
    return patterns


def _end(name: str) -> str:
    return re.escape(name.rpartition(".")[2])


def _any_number(name: str) -> str:
    before, number, after = re.fullmatch(r"(.*\.)?(\d+)(\..*)|(.*)", name).groups()[:3]  # type: ignore[union-attr]
    return _whole(name) if number is None else f"{_whole(before or '')}\\d+{re.escape(after)}"


def _whole(name: str) -> str:
    return f"^{re.escape(name)}"


def _shortened(names: Sequence[str], known: Collection[str], parts: int) -> list[str]:
    """Return names by which PEFT finds these among ``known``: their last parts, where they find no others.

    Args:
        names: full names.
        known: all names in the base model, including these.
        parts: number of parts at the end of a name that may replace it.
    """

    def end(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    wanted = set(names)
    ambiguous = {end(name) for name in known if name not in wanted}
    return sorted({name if end(name) in ambiguous else end(name) for name in names})


def _found_by(targets: Sequence[str], known: Collection[str]) -> set[str]:
    """Return the names that PEFT finds: those that equal a target, or end with one after a dot."""
    wanted = set(targets)
    return {name for name in known if any(name[part.end() :] in wanted for part in re.finditer(r"^|\.", name))}


def _all_layers(base: Base, form: str) -> list[str]:
    if form == TRANSFORMERS:
        return [name for name, _ in base.loading.model.named_modules() if name]
    return [name.removesuffix(".weight") for name in base.rows if name.endswith(".weight")]


def _all_parameters(base: Base) -> list[str]:
    return [name for name, _ in base.loading.model.named_parameters()]
