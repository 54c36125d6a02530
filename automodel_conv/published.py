"""The public function that iterates over the tensors of a model under their published names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from automodel_conv.doors import door, keyword_options
from automodel_conv.files.source_options import SourceOptions, SourceSettings
from automodel_conv.publishing.named_tensors import named_tensors
from automodel_conv.types import LayoutName


@door("publishing")
@keyword_options(SourceOptions, SourceSettings)
def published_tensors(
    module: nn.Module,
    *,
    rules: Iterable[Any] | None = None,
    layout: LayoutName | None = None,
    reference: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    contiguous: bool = False,
    **options: Unpack[SourceOptions],
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of a model under the names of a checkpoint, one tensor for each expert.

    These are the names, shapes, dtypes and bytes that ``save_checkpoint`` writes: parameters and persistent buffers,
    tied weights once. ``load_weights`` of vLLM and SGLang accepts such pairs.

    A tensor is a view of the model's own tensor if it has one stride in each dimension: an expert's slice of grouped
    experts, or the transpose of one. Others, such as heads whose halves are interleaved, are new tensors, which are
    created one at a time. A view changes with the model; do not write to it.

    DTensors are gathered, one at a time: when the first tensor that needs one is due, all ranks of its mesh exchange
    their parts of it, and each rank holds it whole until the iterator has passed the last tensor that needs it. So all
    ranks must iterate, to the end. A rank outside of a mesh gets no tensor that needs it. Keeping what the iterator
    yields, as ``dict()`` does, keeps what was gathered too.

    Planning, which takes microseconds per name, happens in the call; the tensors are read when they are due.

    Args:
        module: the model, which torch may have wrapped (see ``compile_plan``). Its tensors are plain, or DTensors with
            any placements except partial sums. Plain tensors must be whole.
        rules: rule objects of transformers; they are reversed. None: the model's own rules. ``[]``: keep the names.
        layout: layout of the experts in the model: "transformers", "nemo", "gpt_oss" or "vllm". None: the layout of
            the model's own parameters.
        reference: the checkpoint that the model comes from, see ``open_checkpoint``. Its names and shapes are restored,
            for engines that accept only those: transformers saves some types in another form than they are published
            in (Qwen3-VL-MoE with experts that are not transposed). Only its headers are read.
        dtype: dtype of all floating-point tensors, as in ``save_checkpoint``. Tensors of other dtypes are cast, one at
            a time. None: the dtypes that they have.
        contiguous: copy views that are not contiguous, such as those of transposed layouts.
        **options: see ``SourceOptions``.

    Returns:
        An iterator of pairs of a name and a tensor, in the order in which ``save_pretrained`` writes them, or in that
        of ``reference``.

    Raises:
        NameProblems: the tensors do not fit ``reference`` or the rules.
        CoverageError: the model has fewer experts than its config states, as with rank-local experts; or it provides
            only a part of a tensor of ``reference``.
        UnsupportedError: ``save_checkpoint`` could not save the model either: it is on the meta device, quantized by
            transformers, or has PEFT adapters; or its experts have names that the rules do not match.
        ConversionError: the model was changed between the call and the first tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from automodel_conv import get_checkpoint_conversion_mapping, published_tensors
        >>> experts = nn.Module()
        >>> experts.gate_up_proj = nn.Parameter(torch.arange(48.0).reshape(2, 4, 6))
        >>> experts.down_proj = nn.Parameter(torch.ones(2, 6, 2))
        >>> trainer = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
        >>> rules = get_checkpoint_conversion_mapping("qwen3_moe")
        >>> tensors = dict(published_tensors(trainer, rules=rules))
        >>> up = tensors["mlp.experts.1.up_proj.weight"]
        >>> len(tensors), up.shape
        (6, torch.Size([2, 6]))
        >>> up.untyped_storage().data_ptr() == experts.gate_up_proj.untyped_storage().data_ptr()
        True
    """
    named = named_tensors(module, rules=rules, layout=layout, reference=reference, dtype=dtype, **options)
    pairs = named.whole(named.plan.targets)
    return ((name, tensor.contiguous()) for name, tensor in pairs) if contiguous else pairs
