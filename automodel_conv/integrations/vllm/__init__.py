"""Integration with vLLM: a load format, and a source of published tensors for vLLM's weight transfer.

The load format fills vLLM's models by plans traced from their own ``load_weights``.
vLLM finds ``register`` by the entry point of this package in the group ``vllm.general_plugins``, in every process that
it starts. Users state ``--load-format automodel_conv``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Unpack

    from automodel_conv.files.source_options import SourceOptions
    from automodel_conv.integrations.vllm.weight_source import PublishedSource
    from automodel_conv.types import LayoutName, Owners

LOAD_FORMAT = "automodel_conv"
"""Name of the load format."""

_VERSIONS = ("0.33.",)


def register() -> None:
    """Register the load format "automodel_conv" with vLLM in this process.

    vLLM calls this when it loads its plugins. With a version of vLLM that is not supported, the format refuses each
    load, and other load formats work.

    Raises:
        ImportError: vLLM is not installed.

    Example:
        >>> from contextlib import suppress
        >>> with suppress(ImportError):  # raised if vLLM is not installed
        ...     register()
    """
    from vllm import __version__  # pyright: ignore
    from vllm.model_executor.model_loader import register_model_loader  # pyright: ignore[reportMissingImports]

    if __version__.startswith(_VERSIONS):
        from automodel_conv.integrations.vllm.loader import ModelLoader
    else:
        from automodel_conv.integrations.vllm.other_version import ModelLoader
    register_model_loader(LOAD_FORMAT)(ModelLoader)


def published_source(
    module: nn.Module,
    *,
    rules: Iterable[Any] | None = None,
    layout: LayoutName | None = None,
    reference: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    owners: Owners = "mesh",
    **options: Unpack[SourceOptions],
) -> PublishedSource:
    """Return a ``WeightSource`` of vLLM that yields a model's tensors under their published names.

    It takes the place of vLLM's ``ModuleSource``, which yields the names of the trainer's module, without buffers: many
    of vLLM's models refuse the names of grouped experts. Pass it as ``source`` to
    ``WeightTransferTrainerFactory.trainer_init``, on all ranks of the trainer. Names, shapes, dtypes and bytes are
    those that ``save_checkpoint`` writes, with persistent buffers; the order is by layer.

    - ``iter_full`` yields tensors whole. They are views of the model's own tensors if they have one stride in each
      dimension, and not always contiguous. DTensors are gathered, one at a time.
    - ``iter_local`` yields what this rank holds, contiguous, and gathers nothing. ``metadata`` states the parts as
      owners, mesh and placements. The strided shards of FSDP2 over tensor parallelism are a mesh in another order.

    Each call of either begins a new pass, which reads the model's tensors as they are then. Global ranks must be the
    ranks of the trainer in vLLM's ``TrainerInitInfo``. With DTensors, this function is a collective of all ranks.

    Args:
        module: the trainer's model, sharded and with its dtype; see ``published_tensors``.
        rules: rule objects of transformers; they are reversed. None: the model's own rules. ``[]``: keep the names.
        layout: layout of the experts in the model. None: that of the model's own parameters.
        reference: the checkpoint that the engine has loaded, see ``open_checkpoint``, to restore exactly its names and
            shapes. None: those that transformers saves.
        dtype: dtype of all floating-point tensors, as in ``save_checkpoint``: they are cast before they are sent. None:
            the dtypes that they have.
        owners: "mesh": each tensor belongs to all ranks of the mesh that its source is on, as NCCL broadcast, IPC and
            M2N ask. "holders": a tensor that some ranks hold whole, such as an expert, belongs to these ranks, so that
            it is not gathered; or it belongs to the ranks along fewer dimensions of the mesh that hold it together.
            Sharded RDT accepts this.
        **options: where ``reference`` is and how it is reached; see ``SourceOptions``.

    Raises:
        ImportError: vLLM is not installed.
        NameProblems, CoverageError, UnsupportedError: as ``published_tensors``; or ``owners`` is unknown.
        RankError: ranks have different tensors, or divide them differently, or a rank no longer responds.

    Example:
        >>> import torch
        >>> from contextlib import suppress
        >>> with suppress(ImportError):  # raised if vLLM is not installed
        ...     source = published_source(torch.nn.Linear(3, 2))
        ...     names = [meta.name for meta in source.metadata]
    """
    from automodel_conv.integrations.vllm.weight_source import PublishedSource

    return PublishedSource(
        module, rules=rules, layout=layout, reference=reference, dtype=dtype, owners=owners, **options
    )
