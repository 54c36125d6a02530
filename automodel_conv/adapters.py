"""Public functions for adapters (LoRA): merge them into a checkpoint on disk, and convert them between their forms."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import torch
from typing_extensions import Unpack

from automodel_conv.compiling.options import AdapterArgument
from automodel_conv.doors import door, keyword_options
from automodel_conv.errors import count_of, size_text
from automodel_conv.execution.report_text import Report, Row, count_row
from automodel_conv.files.checkpoint import open_checkpoint
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.files.uploads.folder_by_path import folder_of
from automodel_conv.lora.adapter import open_adapter
from automodel_conv.lora.base import base_of
from automodel_conv.lora.forms import checked_form
from automodel_conv.lora.merging import open_adapters
from automodel_conv.lora.writing import write_reformed
from automodel_conv.publishing.conversion_files import Writing, convert
from automodel_conv.publishing.convert_report import ConvertReport
from automodel_conv.types import AdapterForm, LayoutInFiles

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class AdapterReport(Report):
    """The outcome of ``convert_adapter``; ``print`` shows it.

    Attributes:
        files: names of the weight files.
        modules: names of the modules in the new adapter.
        zeros: names of stacks, each with the number of a matrix that has zeros because the adapter does not train all
            of it, as in "model.layers.0.mlp.experts.down_proj[3]".
        left_out: tensors of the base model whose matrices in a stack were zero, and have no module in the new adapter.
        shared: tensors of the base model whose modules have all ranks of an old module, because the product does not
            show which ranks belong to which tensor.
        bytes_written: size of the weight files in bytes.
        files_copied: paths of the files next to the weights that were copied.
        seconds: duration of the call.

    Example:
        >>> report = AdapterReport(("adapter_model.safetensors",), ("lm_head",), (), (), (), 4352, (), 0.1)
        >>> print(report)
        files                       1
        seconds                     0.100
        modules                     1
            lm_head
        zero in a stack             0
        left out, as they are zero  0
        with all ranks of a stack   0
        other files copied          0 files
    """

    files: tuple[str, ...]
    modules: tuple[str, ...]
    zeros: tuple[str, ...]
    left_out: tuple[str, ...]
    shared: tuple[str, ...]
    bytes_written: int
    files_copied: tuple[str, ...]
    seconds: float

    def _rows(self) -> list[Row]:
        return [
            Row("files", str(len(self.files))),
            Row("seconds", f"{self.seconds:.3f}"),
            count_row("modules", self.modules),
            count_row("zero in a stack", self.zeros),
            count_row("left out, as they are zero", self.left_out),
            count_row("with all ranks of a stack", self.shared),
            Row("other files copied", count_of(len(self.files_copied), "file")),
        ]


@door("converting")
@keyword_options(SourceOptions, SourceSettings)
def convert_adapter(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    layout: AdapterForm,
    progress: bool = False,
    **options: Unpack[SourceOptions],
) -> AdapterReport:
    """Convert an adapter (LoRA) to another form, for experts and all other modules.

    The product ``scale * B @ A`` of each weight stays the same. Bytes of the matrices are copied, never computed.

    ==============  ===================================================  ==============================================
    form            A and B of a layer of ``E`` experts at rank ``r``    used by
    ==============  ===================================================  ==============================================
    per_expert      ``[r, in]``, ``[out, r]`` for each expert and        models with a module for each expert; vLLM
                    projection, with published names
    transformers    ``[E*r, in]``, ``[out, r*E]`` for each parameter     PEFT, ``target_parameters``
    vllm            the same, with published names; ``in`` are always    vLLM, ``is_3d_lora_weight``
                    the inputs; every parameter is present
    ==============  ===================================================  ==============================================

    In a stack, the expert varies slowest in A and fastest in B. If gate and up share a parameter, their ranks add up,
    and B is block-diagonal. Experts and projections that the adapter does not train are zero in a stack, and are left
    out where there are none.

    Args:
        source: path or URL of a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, in any of the
            forms; or a repository of the Hub with them.
        destination: path of a directory that is new, or has no weights in it; or a URL, see ``convert_checkpoint``.
        base: the checkpoint of the base model, see ``open_checkpoint``. Only its headers and its config are read. Its
            revision and folder are those that its URL states, as in ``hf://org/name@revision/folder``.
        layout: the new form: "per_expert", "transformers" or "vllm".
        progress: show a progress bar.
        **options: see ``SourceOptions``.

    Returns:
        An ``AdapterReport``: the modules, and what is zero or left out.

    Raises:
        CheckpointError: the adapter or the base is missing or broken.
        NameProblems: the adapter does not fit the base: it has modules that the base lacks, or matrices of other
            shapes or ranks. Lists all of them.
        UnsupportedError: the form is unknown; the adapter has a variant of LoRA that is not supported, such as DoRA;
            or the form cannot hold the adapter, as experts of one stack have different ranks or scales.
        DestinationError: the destination holds weights already, or another process writes to it.
        ReadError, WriteError: reading or writing failed.

    Example:
        Give the adapter to vLLM::

            convert_adapter("my-adapter", "my-adapter-vllm", base="Qwen/Qwen3-30B-A3B", layout="per_expert")

        Give an adapter for one projection of one expert to PEFT:

        >>> import json
        >>> import torch
        >>> from automodel_conv import open_checkpoint, save_checkpoint
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4, "vocab_size": 32, "head_dim": 8}
        >>> model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
        >>> expert = "base_model.model.model.layers.0.mlp.experts.3.down_proj"
        >>> lora = {f"{expert}.lora_A.weight": torch.ones(2, 8), f"{expert}.lora_B.weight": torch.ones(16, 2)}
        >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
        >>> with TemporaryDirectory() as base, TemporaryDirectory() as source, TemporaryDirectory() as destination:
        ...     saved = save_checkpoint(model, base)
        ...     save_file(lora, f"{source}/adapter_model.safetensors")
        ...     _ = Path(source, "adapter_config.json").write_text(json.dumps(config))
        ...     report = convert_adapter(source, destination, base=base, layout="transformers")
        ...     converted = open_checkpoint(f"{destination}/adapter_model.safetensors")
        >>> report.modules, converted.shapes
        (('model.layers.0.mlp.experts',), [(8, 8), (16, 8)])
        >>> report.zeros[0], len(report.zeros)
        ('model.layers.0.mlp.experts.down_proj[0]', 3)
    """
    began = time.perf_counter()
    form = checked_form(layout)
    settings = SourceSettings(**options)
    folder = folder_of(destination, settings)
    adapter = open_adapter(source, settings=settings.shared(source), companions=True)
    model = base_of(open_checkpoint(base, **settings.further(base).source()), dequantize=True)
    shard, reformed, copied = write_reformed(adapter, model, folder, form, progress)
    report = AdapterReport(
        files=(shard.name,),
        modules=tuple(module.name for module in reformed.modules),
        zeros=tuple(f"{module.weight}[{matrix}]" for module in reformed.modules for matrix in module.untrained()),
        left_out=reformed.left_out,
        shared=reformed.shared,
        bytes_written=shard.nbytes,
        files_copied=copied,
        seconds=time.perf_counter() - began,
    )
    size = size_text(report.bytes_written)
    _LOG.info("converted the adapter %s to %s: %s in %.3f s", adapter.path, folder.name, size, report.seconds)
    return report


@door("merging")
@keyword_options(SourceOptions, SourceSettings)
def merge_adapter(
    base: str | os.PathLike[str],
    adapter: AdapterArgument,
    destination: str | os.PathLike[str],
    *,
    layout: LayoutInFiles | None = None,
    dtype: torch.dtype | str | None = None,
    dequantize: bool = False,
    max_shard_size: int | str = "5GB",
    resume: bool = True,
    verify: bool = True,
    checksums: bool = False,
    threads: int | None = None,
    scratch_bytes: int | None = None,
    progress: bool = False,
    **options: Unpack[SourceOptions],
) -> ConvertReport:
    """Merge an adapter into a checkpoint on disk, in bounded memory and without loading the model.

    Each weight ``W`` that the adapter changes becomes ``W + scale * B @ A``, computed in float32 and rounded once to
    the dtype of the file (in float64 for weights of float64). All other tensors are copied byte for byte, as
    ``convert_checkpoint`` copies them.

    Every module of the adapter takes effect, or the call raises an error before it writes anything.

    Args:
        base: the checkpoint of the base model; see ``source`` of ``convert_checkpoint``.
        adapter: path, URL or repository of an adapter, in any form that ``convert_adapter`` reads. Its revision and
            folder are those that its URL states, as in ``hf://org/name@revision/folder``. Or a list of pairs of such a
            path and a weight: the adapters' products are multiplied by their weights and added up.
        destination: path of a directory that is new, or has no weights in it; or a URL, see ``convert_checkpoint``.
        layout: see ``convert_checkpoint``. None: the names and the layout of the base.
        dtype: dtype of all floating-point tensors, or "auto"; see ``convert_checkpoint``. Weights are cast to it before
            the sum, which is rounded to it again. None: the dtypes that they have.
        dequantize: decode quantized weights before the sum; see ``convert_checkpoint``. False: it is an error if the
            adapter changes one.
        max_shard_size, resume, verify, checksums, threads, progress: see ``convert_checkpoint``.
        scratch_bytes: bound of the memory used, in bytes. None: 256 MiB. The matrices that one layer's tensors need in
            turns are in memory whatever their size.
        **options: see ``SourceOptions``.

    Returns:
        A ``ConvertReport``, whose ``adapted`` lists the tensors that changed.

    Raises:
        CheckpointError: the base or the adapter is missing or broken.
        NameProblems: the adapter does not fit the base: it has modules that the base lacks, or matrices of other
            shapes or ranks. Lists all of them.
        UnsupportedError: the adapter has a variant of LoRA that is not supported, such as DoRA; or it changes quantized
            tensors; or see ``convert_checkpoint``.
        ConversionError: see ``convert_checkpoint`` for all other errors.

    Example:
        >>> import json
        >>> import torch
        >>> from pathlib import Path
        >>> from safetensors.torch import load_file, save_file
        >>> from tempfile import TemporaryDirectory
        >>> lora = {
        ...     "base_model.model.proj.lora_A.weight": torch.ones(1, 3),
        ...     "base_model.model.proj.lora_B.weight": torch.tensor([[1.0], [2.0]]),
        ... }
        >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["proj"]}
        >>> with TemporaryDirectory() as base, TemporaryDirectory() as adapter, TemporaryDirectory() as merged:
        ...     save_file({"proj.weight": torch.zeros(2, 3), "norm.weight": torch.ones(3)}, f"{base}/model.safetensors")
        ...     save_file(lora, f"{adapter}/adapter_model.safetensors")
        ...     _ = Path(adapter, "adapter_config.json").write_text(json.dumps(config))
        ...     report = merge_adapter(base, adapter, merged)
        ...     tensors = load_file(f"{merged}/model.safetensors")
        >>> report.adapted, tensors["proj.weight"].tolist()
        (('proj.weight',), [[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    """
    settings = SourceSettings(**options)
    adapters = open_adapters(adapter, settings)
    conversion = {
        "rules": [] if layout is None else None,
        "layout": layout,
        "source_layout": None,
        "dtype": dtype,
        "dequantize": dequantize,
        "drop": [],
        "max_shard_size": max_shard_size,
    }
    writing = Writing(resume, verify, checksums, threads, scratch_bytes, progress)
    return convert(base, folder_of(destination, settings), settings, conversion, writing, adapters)
