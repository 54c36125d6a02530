"""The public function that converts checkpoints on disk: from files to files, from any layout to any other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from typing_extensions import Unpack

from automodel_conv.compiling.carrying import checked_patterns
from automodel_conv.doors import door, keyword_options
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.files.uploads.folder_by_path import folder_of
from automodel_conv.publishing.conversion_files import Writing, convert
from automodel_conv.publishing.convert_report import ConvertReport
from automodel_conv.types import LayoutInFiles
from automodel_conv.upstream.given_rules import given_rules


@door("converting")
@keyword_options(SourceOptions, SourceSettings)
def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    rules: Iterable[Any] | None = None,
    layout: LayoutInFiles | None = None,
    source_layout: LayoutInFiles | None = None,
    dtype: torch.dtype | str | None = None,
    dequantize: bool = False,
    drop: str | Iterable[str] = (),
    max_shard_size: int | str = "5GB",
    resume: bool = True,
    verify: bool = True,
    checksums: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
    **options: Unpack[SourceOptions],
) -> ConvertReport:
    """Convert a checkpoint on disk to another layout of its experts, in bounded memory.

    Unchanged bytes are copied by the operating system if the file system supports it. All other files in the
    directory of the source and its folders are copied too, such as ``config.json``, the tokenizer, chat templates and
    code; the report lists them. Weights of any format, files of trainers (``.bin``, ``.pt``, folders like
    ``checkpoint-500``), and hidden files and folders are not copied. If the source is one file, nothing is copied.

    The destination becomes a checkpoint at the end or not at all. Until then all files are in a folder of their own
    inside it. After a crash or an error, the same call continues with the files that are not finished. If the
    destination is complete already, the call compares everything in it with the source, and writes nothing.

    Tensors that the model has no place for, such as layers for multi-token prediction and draft heads, are written byte
    for byte under their own names, or decoded with ``dequantize``.

    Args:
        source: a directory, an index file, one ``.safetensors`` file, ``org/name`` on the Hub, or a URL; see
            ``open_checkpoint``. Weights that are not on this machine are read by range.
        destination: path of a directory that is new, or has no weights in it; ``s3://bucket/prefix``; or
            ``hf://org/name``, with ``@branch`` for another branch than the main one. Each file that is written for a
            URL is uploaded and then removed from this machine.
        rules: rule objects of transformers. None: the rules of the model that ``config.json`` describes. ``[]``: keep
            all names, to change only the layout, the dtype or the file size.
        layout: layout of the routed experts in the destination: "transformers", "nemo", "gpt_oss", "vllm"; one for
            vLLM's kernels: "vllm_w31", "vllm_trtllm", "vllm_trtllm_padded" or "vllm_deepep"; or "per_expert" as
            ``save_pretrained`` writes them. None: the layout of the model's own parameters. The files state the layout.
            If transformers does not load this layout for the type, file names begin with its name
            (``nemo-00001-of-00004.safetensors``), so that ``from_pretrained`` refuses the directory;
            ``open_checkpoint`` and all readers of this package find such files.
        source_layout: layout of grouped experts in the source: a layout, or "per_expert", the form in which the type is
            published. None: the layout that the files state (those written by this package do), or else the model's. It
            is an error if the model's shapes contradict that layout or do not determine it. With ``rules=[]`` and no
            ``layout``, experts are converted to "transformers".
        dtype: dtype of all floating-point tensors, except those that a transformers model keeps in float32: a dtype of
            torch, its name ("bfloat16"), or "auto", the dtype that ``config.json`` states, or else that of the first
            floating-point tensor. Codes that are kept, and their scales, are not cast. None: the dtypes that they have.
        dequantize: decode the tensors that ``quantization_config`` in ``config.json`` describes as quantized, to
            ``dtype`` or the dtype that the config states, and leave that setting out of the new ``config.json``.
            False: keep codes and scales byte for byte. FP8 codes and their scales are then grouped and arranged like
            their weights (``gate_up_proj_scale_inv``). This is possible if no block would hold rows of both gate and
            up and, in a transposed layout, if blocks are square. File names then begin with the name of the layout,
            even if it is "transformers".
        drop: tensors to leave out, by their names in the source: a pattern or several. ``*`` matches any text, ``?``
            one character and ``[abc]`` one of these; a pattern matches whole names ("model.layers.61.*"). A pattern
            that matches none is an error. If codes are not decoded, drop both codes and their scales, or neither. This
            does not apply to a conversion that leaves the names and the layout of the experts unchanged.
        max_shard_size: bound of the tensor data in a file, in bytes or as in "5GB".
        resume: continue with the files that an earlier call finished. False: discard them.
        verify: read each file back after it is written, and compare all of it with the source. This includes files
            that an earlier call finished without ``verify``. The bytes may come from the page cache.
        checksums: write a checksum of each tensor next to the index, for ``verify=True`` of the loaders and for
            ``verify`` of the command line. This reads the files once more.
        threads: number of threads that copy and write. None: the number of cores, at most 16.
        scratch_bytes: bound of the memory used, in bytes. None: 256 MiB.
        progress: show a progress bar in bytes, GB/s and time left.
        **options: see ``SourceOptions``. ``storage_options`` and ``token`` are for the destination too.

    Returns:
        A ``ConvertReport``: names of the files, tensors that were carried and left out, bytes, seconds and memory.

    Raises:
        CheckpointError: the source is missing or broken. Nothing has been written.
        NameProblems: the source does not fit its model or the rules; lists all problems. Nothing has been written.
        QuantizationError: parts of quantized tensors are missing, or contradict each other or the config. Nothing has
            been written.
        UnsupportedError: the source cannot be converted, or a layout is unknown. Nothing has been written.
        DestinationError: the destination holds another checkpoint already, another process writes to it, it holds
            unfinished work of another kind, or the source has changed.
        ReadError: reading failed.
        WriteError: writing failed; the disk may be full.
        VerificationError: a file does not have the bytes that were written.
        ConversionError: the system has no more memory or threads. The same call continues the work.

    Example:
        >>> import torch
        >>> from automodel_conv import open_checkpoint
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> tensors = {"norm.weight": torch.ones(4), "mtp.norm.weight": torch.ones(4)}
        >>> with TemporaryDirectory() as source, TemporaryDirectory() as destination:
        ...     save_file(tensors, f"{source}/model.safetensors")
        ...     report = convert_checkpoint(source, destination, rules=[], dtype=torch.bfloat16, drop="mtp.*")
        ...     converted = open_checkpoint(destination)
        >>> converted.names, converted.dtypes, report.left_out
        (['norm.weight'], ['BF16'], ('mtp.norm.weight',))
    """
    settings = SourceSettings(**options)
    return convert(
        source,
        folder_of(destination, settings),
        settings,
        {
            "rules": given_rules(rules),
            "layout": layout,
            "source_layout": source_layout,
            "dtype": dtype,
            "dequantize": dequantize,
            "drop": checked_patterns(drop),
            "max_shard_size": max_shard_size,
        },
        Writing(resume, verify, checksums, threads, scratch_bytes, progress),
    )
