"""Open an adapter: its config and the headers of its file, with the two matrices of each module as a pair.

Source of the names: PEFT 0.21.2, ``get_peft_model_state_dict`` in ``utils/save_and_load.py``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from automodel_conv.dtypes import FLOATING
from automodel_conv.errors import CheckpointError, NameProblems, UnsupportedError, listing, message
from automodel_conv.execution.factors import AdapterTensors, FileTensors
from automodel_conv.files import system
from automodel_conv.files.checkpoint import open_source
from automodel_conv.files.located import may_be_repository
from automodel_conv.files.paths import text_of_path
from automodel_conv.files.remote.urls import is_url, without_secrets
from automodel_conv.files.shards import LAYOUT_KEY
from automodel_conv.files.source import ByteSource, LocalFile
from automodel_conv.files.source_options import SourceSettings
from automodel_conv.lora.config import CONFIG_NAME, AdapterConfig, read_config

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Start of the names in an adapter, before those of the model."""
_PART = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(\.weight)?")
# A name that adapters give to the weight of a layer that they wrap.
WRAPPED = ".base_layer"
_DEFAULTS = SourceSettings()


class Pair(NamedTuple):
    """The two matrices of a module: A ``[rank, in]`` and B ``[out, rank]``."""

    module: str
    """Name of the module, without the prefix of adapters."""
    a: int
    """Row of A in the file."""
    b: int
    """Row of B in the file."""
    is_embedding: bool = False
    """Whether the module is an embedding, whose weight ``[in, out]`` changes by the transposed product."""


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    Attributes:
        path: path or URL of its directory.
        config: its config.
        tensors: its tensors.
        pairs: its pairs of matrices, in the order of the file.
        whole: rows of tensors that replace those of the base model (``modules_to_save``), by their names.
        form: the form that the file states, if this package wrote it.
        weight: factor of all of its products.
        sources: its files; none for an adapter in memory.
        directory: path of a directory with the files that accompany it; empty for an adapter in memory.
    """

    path: str
    config: AdapterConfig
    tensors: AdapterTensors
    pairs: tuple[Pair, ...]
    whole: dict[str, int]
    form: str | None = None
    weight: float = 1.0
    sources: tuple[ByteSource, ...] = ()
    directory: str = ""


def open_adapter(
    path: str | os.PathLike[str], weight: float = 1.0, settings: SourceSettings = _DEFAULTS, *, companions: bool = False
) -> Adapter:
    """Open an adapter without reading tensor data.

    Args:
        path: path or URL of a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or a repository
            of the Hub with these files.
        weight: factor of all of its products.
        settings: how to reach the files.
        companions: whether the files that accompany the adapter must be in ``directory`` of the result.

    Raises:
        CheckpointError: a file is missing or malformed, or holds no adapter.
        NameProblems: a module has only one of its two matrices, or one of them twice.
        UnsupportedError: the adapter has a variant of LoRA that is not supported.
    """
    text = os.path.expanduser(text_of_path(path))
    if settings.variant is not None:
        raise UnsupportedError(message("adapters have no variants", where=without_secrets(text)))
    is_local = not is_url(text) and (system.exists(text) or not may_be_repository(text))
    local = _checked_directory(text, settings.subfolder) if is_local else None
    file = open_source(text, settings, companions=companions, weights=WEIGHTS_NAME, small=(CONFIG_NAME,))
    directory = local or file.path
    config = read_config(file.directory, directory)
    adapter = adapter_of(file.files[0], config, FileTensors(file))
    return replace(
        adapter,
        path=directory,
        form=file.metadata.get(LAYOUT_KEY),
        weight=weight,
        sources=file.sources if is_url(text) else (LocalFile(os.path.join(file.directory, CONFIG_NAME)), *file.sources),
        directory=file.directory,
    )


def _checked_directory(path: str, subfolder: str) -> str:
    """Return the absolute path of the directory of an adapter on this machine.

    Raises:
        CheckpointError: there is no such directory, or a file is missing.
    """
    directory = os.path.abspath(os.path.join(path, *filter(None, subfolder.split("/"))))
    if not system.is_directory(directory):
        raise CheckpointError(
            message("no such adapter", where=directory, expected="a directory with adapter_config.json")
        )
    read_config(directory)
    if not system.is_file(os.path.join(directory, WEIGHTS_NAME)):
        do = "load adapter_model.bin with PEFT and save it with save_pretrained, which writes safetensors"
        has_bin = system.is_file(os.path.join(directory, "adapter_model.bin"))
        raise CheckpointError(
            message(f"the adapter has no {WEIGHTS_NAME}", where=directory, do=do if has_bin else None)
        )
    return directory


def adapter_of(where: str, config: AdapterConfig, tensors: AdapterTensors) -> Adapter:
    """Return the adapter with these tensors.

    Args:
        where: path of their file, or a name of the tensors in memory, for errors.
        config: the config of the adapter.
        tensors: the tensors.

    Raises:
        CheckpointError: there are none.
        NameProblems: a module has only one of its two matrices, or one of them twice.
        UnsupportedError: a tensor is of a kind that is not supported.
    """
    pairs, whole = _pairs(tensors, where)
    if not pairs and not whole:
        raise CheckpointError(
            message("the file holds no adapter", where=where, expected="names with lora_A and lora_B")
        )
    return Adapter(where, config, tensors, pairs, whole)


def _pairs(file: AdapterTensors, where: str) -> tuple[tuple[Pair, ...], dict[str, int]]:
    rows: dict[tuple[str, bool], dict[str, int]] = {}
    whole: dict[str, int] = {}
    odd: list[str] = []
    again: list[str] = []

    def note(group: dict[str, int], key: str, row: int) -> None:
        if key in group:
            again.append(f"{file.names[group[key]]} and {file.names[row]}")
        group[key] = row

    for row, stored in enumerate(file.names):
        name = stored.removeprefix(PREFIX)
        part = _PART.fullmatch(name)
        if part is None and ".lora_" not in name:
            note(whole, name.replace(WRAPPED, ""), row)
        elif part is None or bool(part[2]) == bool(part[4]) or len(file.shapes[row]) != 2:
            odd.append(f"{stored} {list(file.shapes[row])}")
        else:
            note(rows.setdefault((part[1], bool(part[2])), {}), part[3], row)
    odd += [f"{file.names[row]} {file.dtypes[row]}" for row, dtype in enumerate(file.dtypes) if dtype not in FLOATING]
    if odd:
        expected = "floating matrices lora_A.weight [rank, in] and lora_B.weight [out, rank]"
        text = "the adapter has tensors of a kind that is not supported"
        raise UnsupportedError(message(text, where=where, expected=expected, found="\n" + listing(odd)))
    if again:
        text = "the adapter has two tensors for one place"
        raise NameProblems(message(text, where=where, expected="one", found="\n" + listing(again)))
    lone = [f"{name}: only lora_{part}" for (name, _), parts in rows.items() if len(parts) == 1 for part in parts]
    if lone:
        raise NameProblems(
            message(
                "modules of the adapter lack a matrix",
                where=where,
                expected="lora_A and lora_B",
                found="\n" + listing(lone),
            )
        )
    return tuple(Pair(name, parts["A"], parts["B"], kind) for (name, kind), parts in rows.items()), whole
