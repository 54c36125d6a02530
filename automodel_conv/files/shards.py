"""Layout of the files of a checkpoint before any data is written: offsets of tensors, headers and index.

The module is pure. Files have the same bytes as those of the safetensors library, except for the number of spaces at
the end of the header. These pad the header so that the data begins at a page boundary and can be mapped in whole pages.
Tensors are divided among files as huggingface_hub does it. Source: safetensors 0.8.0, ``prepare`` in ``tensor.rs``, and
the format section of its README, which allows the spaces; huggingface_hub 1.33.0,
``split_state_dict_into_shards_factory``; transformers 5.24.0, ``save_pretrained``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from automodel_conv.dtypes import BITS, nbytes
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.files.header import LONGEST_NAME, odd_name, short

CHECKSUMS_NAME = "model.safetensors.checksums.json"
LAYOUT_KEY = "expert_layout"
"""Key of the experts' layout in the metadata of files and of their index."""

PAGE_BYTES = 4096
"""Alignment in bytes of the start of a file's data."""

_ORDER = {code: position for position, code in enumerate(BITS)}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Not the parser of huggingface_hub: it rejects "MiB" and "B", and accepts sizes of zero and below. More than 18 digits
# would be an infinite float.
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]?I?B)\s*", re.IGNORECASE)


class Naming(NamedTuple):
    """How the files of a checkpoint are named, and the expert layout that they record."""

    stem: str = "model"
    """Start of every file name. transformers and inference engines look for "model" and ignore other names."""
    layout: str | None = None
    """Layout of the experts; None if the files do not record it."""

    @property
    def index_name(self) -> str:
        """Name of the index."""
        return f"{self.stem}.safetensors.index.json"

    def file_name(self, number: int, count: int) -> str:
        """Return the name of file ``number`` of ``count``, counted from 1."""
        return f"{self.stem}-{number:05}-of-{count:05}.safetensors" if count > 1 else f"{self.stem}.safetensors"


DEFAULT_NAMING = Naming()
"""The file names of transformers."""


class Spec(NamedTuple):
    """The name, dtype and shape of a tensor to write."""

    name: str
    dtype: str
    """safetensors dtype code."""
    shape: tuple[int, ...]
    """Shape as torch reports it, with two F4 values per element."""

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return nbytes(self.dtype, prod(self.shape))


class Shard(NamedTuple):
    """An output file: its header, and the positions of its tensors."""

    name: str
    header: bytes
    """All bytes before the data, including the length of the header."""
    specs: tuple[Spec, ...]
    offsets: tuple[int, ...]
    """Offset in bytes of each tensor from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def parse_size(size: int | str) -> int:
    """Return the number of bytes given as an integer or as text such as "5GB" or "300 MiB".

    Raises:
        UnsupportedError: the size is neither, or is not above zero.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match is not None else size
    if not isinstance(count, int) or isinstance(count, bool) or count <= 0:
        raise UnsupportedError(
            message("not a size", expected='a number of bytes, or text such as "5GB"', found=repr(size))
        )
    return count


def divide(specs: Iterable[Spec], most_bytes: int, naming: Naming = DEFAULT_NAMING) -> list[Shard]:
    """Divide tensors among files of at most ``most_bytes`` of data each, in the order of ``specs``.

    A tensor larger than ``most_bytes`` gets a file of its own.
    """
    groups: list[list[Spec]] = []
    current: list[Spec] = []
    used = 0
    for spec in specs:
        if spec.nbytes > most_bytes:
            groups.append([spec])
            continue
        if used + spec.nbytes > most_bytes:
            groups.append(current)
            current, used = [], 0
        current.append(spec)
        used += spec.nbytes
    if current or not groups:
        groups.append(current)
    names = [naming.file_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    return [shard_of(name, group, naming.layout) for name, group in zip(names, groups, strict=True)]


def divide_like(specs: Iterable[Spec], files: Mapping[str, str], layout: str | None = None) -> list[Shard]:
    """Divide tensors among the files that ``files`` assigns to their names.

    It must contain every name.
    """
    groups: dict[str, list[Spec]] = {}
    for spec in specs:
        groups.setdefault(files[spec.name], []).append(spec)
    return [shard_of(name, groups[name], layout) for name in sorted(groups)]


def shard_of(name: str, specs: Sequence[Spec], layout: str | None = None) -> Shard:
    """Return a file with these tensors, sorted by dtype and then by name.

    The widest dtypes come first, so that every tensor is aligned.

    Raises:
        UnsupportedError: the format cannot hold a tensor (float4 without a dimension), or readers refuse its name.
    """
    if (odd := odd_name([spec.name for spec in specs])) is not None:
        expected = f"at most {LONGEST_NAME} printable characters"
        raise UnsupportedError(message("an invalid tensor name", expected=expected, found=short(odd)))
    specs = sorted(specs, key=lambda spec: (-_ORDER[spec.dtype], spec.name))
    metadata = {"format": "pt"} if layout is None else {"format": "pt", LAYOUT_KEY: layout}
    header: dict[str, object] = {"__metadata__": metadata}
    starts, end = [], 0
    for spec in specs:
        shape = list(spec.shape)
        if spec.dtype == "F4":
            if not shape:
                raise UnsupportedError(
                    message(
                        f"{spec.name} is float4 without a dimension, which cannot hold a pair of values", found="F4 []"
                    )
                )
            shape[-1] *= 2  # torch counts pairs
        starts.append(end)
        end += spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": shape, "data_offsets": [starts[-1], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    data = 8 + len(text)
    return Shard(name, len(text).to_bytes(8, "little") + text, tuple(specs), tuple(data + start for start in starts))


def index_of(shards: Sequence[Shard], parameters: int | None = None, naming: Naming = DEFAULT_NAMING) -> bytes | None:
    """Return the text of the index; None for a single file of the default name, which needs no index.

    Args:
        shards: files of the checkpoint.
        parameters: number of elements in the model's parameters; None: the elements of all tensors.
        naming: names of the files, and the layout to record.
    """
    if [shard.name for shard in shards] == [naming.file_name(1, 1)]:
        return None
    specs = [spec for shard in shards for spec in shard.specs]
    metadata: dict[str, object] = {
        "total_parameters": sum(prod(spec.shape) for spec in specs) if parameters is None else parameters,
        "total_size": sum(spec.nbytes for spec in specs),
    }
    if naming.layout is not None:
        metadata[LAYOUT_KEY] = naming.layout
    weight_map = {spec.name: shard.name for shard in shards for spec in shard.specs}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def is_checkpoint(name: str) -> bool:
    """Return whether loaders may read weights from a file of this name."""
    is_known = name.endswith((".safetensors", ".safetensors.index.json", ".gguf"))
    return is_known or (name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json")))
