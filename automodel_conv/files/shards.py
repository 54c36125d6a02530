"""The files of a checkpoint to be written: which tensor lies where, headers and index, before any data is there.

Pure. Files are laid out as the safetensors library does it, so that the same tensors give the same bytes, but for the
spaces at the end of the header: as many as let the data begin at a page, so that it can be mapped in whole pages. Files
are divided as huggingface_hub does it. Source: safetensors 0.8.0, ``prepare`` in ``tensor.rs``, and the format section
of its README, which allows the spaces; huggingface_hub 1.33.0, ``split_state_dict_into_shards_factory``; transformers
5.23.0, ``save_pretrained``.
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
"""Under it the metadata of files and of their index name the layout of the experts."""

PAGE_BYTES = 4096
"""The data of a file begins at a multiple of it."""

_ORDER = {code: place for place, code in enumerate(BITS)}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", re.IGNORECASE)


class Form(NamedTuple):
    """The names of a checkpoint's files, and the layout of experts that they name."""

    stem: str = "model"
    """Names begin with it. transformers and engines look for "model", and pass over others."""
    layout: str | None = None
    """The layout of the experts; None: the files do not say."""

    @property
    def index_name(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    def file_name(self, number: int, of: int) -> str:
        """Name of a file, counted from 1."""
        return f"{self.stem}-{number:05}-of-{of:05}.safetensors" if of > 1 else f"{self.stem}.safetensors"


FORM = Form()
"""The form of transformers' own files."""


class Spec(NamedTuple):
    """A tensor to be written; the shape as torch sees it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, prod(self.shape))


class Shard(NamedTuple):
    """One file: its header, and its tensors with the byte of the file where each begins."""

    name: str
    header: bytes
    specs: tuple[Spec, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def parse_size(size: int | str) -> int:
    """Bytes from a number or from words such as "5GB" or "300 MiB".

    Raises:
        UnsupportedError: it is neither, or not above zero.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match is not None else size
    if not isinstance(found, int) or isinstance(found, bool) or found <= 0:
        raise UnsupportedError(message("not a size", expected='bytes, or words such as "5GB"', found=repr(size)))
    return found


def divide(specs: Iterable[Spec], most_bytes: int, form: Form = FORM) -> list[Shard]:
    """Files of at most ``most_bytes`` of data each, in the order of ``specs``; a larger tensor has its own file."""
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
    names = [form.file_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    return [shard_of(name, group, form.layout) for name, group in zip(names, groups, strict=True)]


def divide_like(specs: Iterable[Spec], files: Mapping[str, str], layout: str | None = None) -> list[Shard]:
    """The files that ``files`` names for the tensors; all must be in it."""
    groups: dict[str, list[Spec]] = {}
    for spec in specs:
        groups.setdefault(files[spec.name], []).append(spec)
    return [shard_of(name, groups[name], layout) for name in sorted(groups)]


def shard_of(name: str, specs: Sequence[Spec], layout: str | None = None) -> Shard:
    """A file with these tensors: the widest dtypes first, so that each tensor is aligned, and then by name.

    Raises:
        UnsupportedError: a tensor that the format cannot hold: float4 without a dimension; or a name that is not read.
    """
    if (odd := odd_name([spec.name for spec in specs])) is not None:
        expected = f"at most {LONGEST_NAME} printable characters"
        raise UnsupportedError(message("a name that no tensor may have", expected=expected, found=short(odd)))
    specs = sorted(specs, key=lambda spec: (-_ORDER[spec.dtype], spec.name))
    metadata = {"format": "pt"} if layout is None else {"format": "pt", LAYOUT_KEY: layout}
    header: dict[str, object] = {"__metadata__": metadata}
    starts, end = [], 0
    for spec in specs:
        shape = list(spec.shape)
        if spec.dtype == "F4":
            if not shape:
                raise UnsupportedError(message(f"{spec.name} is a pair of numbers in the shape of one", found="F4 []"))
            shape[-1] *= 2  # torch counts pairs
        starts.append(end)
        end += spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": shape, "data_offsets": [starts[-1], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    data = 8 + len(text)
    return Shard(name, len(text).to_bytes(8, "little") + text, tuple(specs), tuple(data + start for start in starts))


def index_of(shards: Sequence[Shard], parameters: int | None = None, form: Form = FORM) -> bytes | None:
    """The text of the index; None for a single file under its usual name, which needs none.

    Args:
        parameters: elements of the model's parameters; None: all elements count as such.
    """
    if [shard.name for shard in shards] == [form.file_name(1, 1)]:
        return None
    specs = [spec for shard in shards for spec in shard.specs]
    metadata: dict[str, object] = {
        "total_parameters": sum(prod(spec.shape) for spec in specs) if parameters is None else parameters,
        "total_size": sum(spec.nbytes for spec in specs),
    }
    if form.layout is not None:
        metadata[LAYOUT_KEY] = form.layout
    weight_map = {spec.name: shard.name for shard in shards for spec in shard.specs}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def is_checkpoint(name: str) -> bool:
    """Whether a file of this name is one that loaders take weights from."""
    own = name.endswith((".safetensors", ".safetensors.index.json", ".gguf"))
    return own or (name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json")))
