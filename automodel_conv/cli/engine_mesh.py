"""How an engine divides the tensors of a model among its ranks: the parallel layers of vLLM, by names of transformers.

Source: vLLM 0.33.0.

- ``layers/linear.py``: ``ColumnParallelLinear`` (q_proj, q_b_proj, kv_b_proj, gate_proj, up_proj) divides rows,
  ``QKVParallelLinear`` whole heads of keys and values, ``RowParallelLinear`` (o_proj, down_proj) columns, and
  ``ReplicatedLinear`` (routers, q_a_proj, kv_a_proj_with_mqa) nothing.
- ``layers/vocab_parallel_embedding.py``: embed_tokens and lm_head are divided by rows, after padding.
- ``layers/fused_moe/config.py`` (``FusedMoEParallelConfig.make``) and ``expert_map_manager.py``: routed experts.
- ``models/deepseek_v2.py``: latent attention, and shared experts.

The classes fuse tensors, such as q, k and v. That changes no division.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from automodel_conv.cli.forecast import parse_sizes
from automodel_conv.errors import UnsupportedError, message
from automodel_conv.planning.layouts import holds_grouped_experts
from automodel_conv.planning.regions import Region, box, whole

_VOCABULARY_MULTIPLE = 64
"""vLLM pads the rows of embeddings to a multiple of this. Source: ``DEFAULT_VOCAB_PADDING_SIZE``."""

Shape = tuple[int, ...]


class EngineMesh(NamedTuple):
    """The ranks of an engine, in vLLM's words; tp changes fastest from rank to rank, then dp, then replicate."""

    tp: int
    dp: int
    has_ep: bool
    """Whether routed experts are divided whole, over tp x dp ranks. Otherwise their intermediate size is."""
    replicate: int
    """Number of engines with equal weights."""

    @property
    def ranks(self) -> int:
        return self.tp * self.dp * self.replicate

    @property
    def replicates_shared_experts(self) -> bool:
        """Whether MoE blocks divide tokens over tp; see ``ParallelConfig.use_sequence_parallel_moe`` of vLLM."""
        return self.has_ep and self.tp > 1 and self.dp > 1


def parse_engine_mesh(text: str) -> EngineMesh:
    """Parse sizes by name, such as "tp=8,ep=32".

    ``ep`` is tp x dp, as in vLLM; so ``dp`` need not be given with it.

    Raises:
        UnsupportedError: another form, or an ep that is not tp x dp.
    """
    sizes = parse_sizes(text, ("tp", "ep", "dp", "replicate"), "tp=8,ep=32")
    tp, ep = sizes.get("tp", 1), sizes.get("ep")
    dp = sizes.get("dp", 1 if ep is None else max(ep // tp, 1))
    if ep not in (None, tp * dp):
        raise UnsupportedError(
            message(
                "ep is not tp x dp", expected=f"a multiple of {tp}, or tp x dp", found=repr(text), do="leave dp out"
            )
        )
    return EngineMesh(tp, dp, ep is not None, sizes.get("replicate", 1))


class Division(Enum):
    """How tensors are divided."""

    EXPERTS = "experts over ep"
    INTERMEDIATE = "intermediate size of each expert over tp x dp"
    ROWS = "rows over tp"
    HEADS = "rows over tp, or each head on several ranks"
    COLUMNS = "columns over tp"
    VOCABULARY = f"rows over tp, padded to a multiple of {_VOCABULARY_MULTIPLE}"
    WHOLE = "whole on each rank"
    UNKNOWN = "not known here, so counted as whole on each rank"


_REPLICATED = (
    *("gate", "router", "shared_expert_gate"),
    *("q_a_proj", "kv_a_proj_with_mqa"),  # of latent attention
    *("wq_b", "wk", "weights_proj"),  # its indexer
)
_BY_MODULE = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"), Division.ROWS),
    **dict.fromkeys(("k_proj", "v_proj"), Division.HEADS),
    **dict.fromkeys(("o_proj", "down_proj"), Division.COLUMNS),
    **dict.fromkeys(("embed_tokens", "lm_head"), Division.VOCABULARY),
    **dict.fromkeys(_REPLICATED, Division.WHOLE),
}
# Classes that do not divide shared experts if tokens are divided. Source: ``disable_tp=`` in ``models/*.py``.
_WHOLE_SHARED_EXPERTS = (
    "DeepseekForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration",
    "MistralLarge3ForCausalLM",
    "NemotronHForCausalLM",
    "PanguProMoEV2ForCausalLM",
    "PanguUltraMoEForCausalLM",
)
_SHARED_EXPERTS = re.compile(r"\.shared_experts?\.")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def division_of(name: str, shape: Sequence[int], mesh: EngineMesh, architecture: str) -> Division:
    """Return how a tensor is divided.

    Args:
        name: name in transformers' model, with routed experts in the layout of vLLM.
        shape: shape of the whole tensor.
        mesh: the ranks.
        architecture: name of the class of the model.
    """
    if holds_grouped_experts(name):
        return Division.EXPERTS if mesh.has_ep else Division.INTERMEDIATE
    if _ONE_EXPERT.search(name) or not shape:
        return Division.UNKNOWN if len(shape) > 1 else Division.WHOLE
    is_whole_shared = mesh.replicates_shared_experts and architecture in _WHOLE_SHARED_EXPERTS
    if is_whole_shared and _SHARED_EXPERTS.search(name):
        return Division.WHOLE
    division = _BY_MODULE.get(name.rpartition(".")[0].rpartition(".")[2])
    if division is Division.COLUMNS and len(shape) == 1:  # a bias, which one rank adds
        return Division.WHOLE
    return division or (Division.UNKNOWN if len(shape) > 1 else Division.WHOLE)


def region_on(
    name: str, shapes: Mapping[str, Shape], division: Division, mesh: EngineMesh, rank: int, kv_heads: int | None
) -> Region:
    """Return what a rank holds of a tensor.

    Args:
        name: name of the tensor.
        shapes: shapes of all tensors by name.
        division: how it is divided.
        mesh: the ranks.
        rank: number of the rank.
        kv_heads: number of heads of keys and of values; None: not known, so rows are divided evenly.

    Raises:
        UnsupportedError: vLLM would not divide the tensor evenly, as it requires.
    """
    shape = shapes[name]
    in_engine = rank % (mesh.tp * mesh.dp)
    tp_rank = in_engine % mesh.tp
    if division is Division.EXPERTS:
        base, rest = divmod(shape[0], mesh.tp * mesh.dp)
        return _run(shape, 0, in_engine * base + min(in_engine, rest), base + (in_engine < rest))
    if division is Division.INTERMEDIATE:
        return _of_each_expert(name, shapes, mesh.tp * mesh.dp, in_engine)
    if division is Division.ROWS:
        return _even(name, shape, 0, mesh.tp, tp_rank)
    if division is Division.COLUMNS:
        return _even(name, shape, 1, mesh.tp, tp_rank)
    if division is Division.HEADS:
        heads = kv_heads or mesh.tp
        _refuse_uneven(name, shape, max(heads, mesh.tp), min(heads, mesh.tp))
        return _even(name, shape, 0, min(heads, mesh.tp), tp_rank * min(heads, mesh.tp) // mesh.tp)
    if division is Division.VOCABULARY:
        padded = -(-shape[0] // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        _refuse_uneven(name, shape, padded, mesh.tp)
        start = min(tp_rank * (padded // mesh.tp), shape[0])
        return _run(shape, 0, start, min(padded // mesh.tp, shape[0] - start))
    return whole(shape)


def _of_each_expert(name: str, shapes: Mapping[str, Shape], count: int, index: int) -> Region:
    """Return a part of the intermediate size of each expert: of gate and up each, and of the columns of down."""
    shape = shapes[name]
    path, _, leaf = name.rpartition(".")
    if leaf == "w2_bias" or count == 1:
        return whole(shape)
    if leaf == "w2_weight":
        return _even(name, shape, 2, count, index)
    if leaf not in ("w13_weight", "w13_bias"):
        raise UnsupportedError(
            message(f"the layout of the experts in {name} is not known", do="divide whole experts: pass ep")
        )
    size = shapes[f"{path}.w2_weight"][2]
    _refuse_uneven(name, shape, size, count)
    runs = tuple((first + index * (size // count), size // count) for first in range(0, shape[1], size))
    return Region(shape, (*whole(shape[:1]).runs, runs, *whole(shape[2:]).runs))


def _even(name: str, shape: Shape, dim: int, count: int, index: int) -> Region:
    _refuse_uneven(name, shape, shape[dim], count)
    return _run(shape, dim, index * (shape[dim] // count), shape[dim] // count)


def _run(shape: Shape, dim: int, start: int, length: int) -> Region:
    offsets, lengths = [0] * len(shape), list(shape)
    offsets[dim], lengths[dim] = start, length
    return box(shape, offsets, lengths)


def _refuse_uneven(name: str, shape: Shape, size: int, count: int) -> None:
    if size % count:
        raise UnsupportedError(
            message(
                f"the ranks of the engine do not divide {name}",
                expected=f"a divisor of {size}",
                found=f"{count} for shape {list(shape)}",
                do="pass another tp, as vLLM needs it too",
            )
        )
