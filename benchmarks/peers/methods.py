"""Methods that load per-expert files into the same grouped buffers: a function for each peer, and ours.

Each function receives the checkpoint, the number of threads that it may use, and whether to store experts as
``[E, H, 2I]``. Its preparation is not timed: imports, and the shapes of the buffers, which a caller with a model has.
It returns the function to time, buffers included. That function ends with all bytes in their final places and returns
them under transformers' names.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import automodel_conv as amc
from benchmarks.grouped import GROUPED, grouped_shapes, new_buffers
from benchmarks.memory import AS_FOUND, READY

Run = Callable[[], dict[str, Tensor]]
"""Called while the clock runs."""
Prepare = Callable[[str, int, bool], Run]

# NeMo's names of tensors that transformers names differently.
_NEMO_NAMES = {"gate_up_proj": "gate_and_up_projs", "down_proj": "down_projs"}
_TRANSFORMERS_NAMES = {nemo: name for name, nemo in _NEMO_NAMES.items()}


class Loaded(dict[str, Tensor]):
    """Tensors by name, and the seconds of reading only, for methods that report them."""

    read_seconds: float | None = None


class Method(NamedTuple):
    """One method of loading."""

    title: str
    package: str
    """The distribution that the reported version belongs to."""
    prepare: Prepare
    installed: bool = True
    """Whether the development environment has it."""
    huge_pages: tuple[str, ...] = (READY,)
    """The states of memory in which torch is configured to request huge pages. Its default is not to."""


def from_pretrained(directory: str, threads: int, transposed: bool) -> Run:
    """Load with ``AutoModelForCausalLM.from_pretrained``, then ``transpose(1, 2).contiguous()``, tensor by tensor."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def run() -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(directory)
        if transposed:
            for name, parameter in model.named_parameters():
                if name.endswith(GROUPED):
                    parameter.data = parameter.data.transpose(1, 2).contiguous()
        return model.state_dict()

    return run


def safetensors_copy(directory: str, threads: int, transposed: bool) -> Run:
    """Call ``copy_`` for every tensor that ``safe_open`` returns, in the order of the files."""
    from safetensors import safe_open

    shapes = grouped_shapes(directory)

    def run() -> dict[str, Tensor]:
        buffers, views = new_buffers(shapes, transposed)
        for path in _files(directory):
            with safe_open(path, "pt") as file:
                for name in file.offset_keys():
                    views[name].copy_(file.get_tensor(name))
        return buffers

    return run


def safetensors_stack(directory: str, threads: int, transposed: bool) -> Run:
    """Call ``stack`` for each projection and ``cat`` for gate and up, one layer at a time; then transpose."""
    from safetensors import safe_open

    shapes = grouped_shapes(directory)

    def run() -> dict[str, Tensor]:
        files = [safe_open(path, "pt") for path in _files(directory)]
        where = {name: file for file in files for name in file.keys()}

        def stacked(path: str, part: str, experts: int) -> Tensor:
            names = [f"{path}.{expert}.{part}.weight" for expert in range(experts)]
            return torch.stack([where[name].get_tensor(name) for name in names])

        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            path, _, leaf = name.rpartition(".")
            if leaf not in GROUPED:
                tensors[name] = where[name].get_tensor(name).clone()  # copies it out of the mapped file
                continue
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            stacks = [stacked(path, part, shape[0]) for part in parts]
            tensor = torch.cat(stacks, dim=1) if len(stacks) > 1 else stacks[0]
            tensors[name] = tensor.transpose(1, 2).contiguous() if transposed else tensor
        return tensors

    return run


def torch_dcp(directory: str, threads: int, transposed: bool) -> Run:
    """Call ``dcp.load`` with ``HuggingFaceStorageReader`` into views of the buffers, with one thread per file."""
    import torch.distributed.checkpoint as dcp

    shapes = grouped_shapes(directory)

    def run() -> dict[str, Tensor]:
        buffers, views = new_buffers(shapes, transposed)
        dcp.load(views, storage_reader=dcp.HuggingFaceStorageReader(directory, thread_count=threads))
        return buffers

    return run


def fastsafetensors(directory: str, threads: int, transposed: bool) -> Run:
    """Call ``copy_`` for every tensor that ``ParallelLoader`` lends."""
    library = import_module("fastsafetensors")
    shapes = grouped_shapes(directory)

    def run() -> dict[str, Tensor]:
        buffers, views = new_buffers(shapes, transposed)
        loader = library.ParallelLoader(
            library.SingleGroup(),
            _files(directory),
            use_tqdm_on_load=False,
            device="cpu",
            nogds=True,
            max_threads=threads,
            accumulate_resident=False,  # requires the next setting
            borrowed_tensors=True,  # avoids a copy between its buffer and ours
        )
        with closing(loader), closing(loader.iterate_weights()) as weights:
            for name, tensor in weights:
                views[name].copy_(tensor)
        return buffers

    return run


def runai_streamer(directory: str, threads: int, transposed: bool) -> Run:
    """Call ``copy_`` for every tensor that ``SafetensorsStreamer`` lends from its ring."""
    os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(threads)
    library = import_module("runai_model_streamer")
    shapes = grouped_shapes(directory)

    def run() -> dict[str, Tensor]:
        buffers, views = new_buffers(shapes, transposed)
        with library.SafetensorsStreamer() as streamer:
            streamer.load_to_device(_files(directory), device="cpu", owned=False)
            for name, tensor in streamer.get_tensors():
                views[name].copy_(tensor)
        return buffers

    return run


def nemo_automodel(directory: str, threads: int, transposed: bool) -> Run:
    """Follow ``Checkpointer.load_base_model`` for a model on the host.

    ``[E, H, 2I]`` is the path of NeMo's own models: ``to_hf`` returns views of them, ``dcp.load`` fills the views with
    NeMo's reader, and ``from_hf`` follows. A model of transformers uses ``_convert_checkpoint_with_transformers``, and
    is then copied into.
    """
    return (_nemo_model if transposed else _nemo_of_transformers)(directory)


def _nemo_of_transformers(directory: str) -> Run:
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpointing = import_module("nemo_automodel.components.checkpoint.checkpointing")
    configs = import_module("nemo_automodel.components.checkpoint.config")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    config = configs.CheckpointingConfig(
        checkpoint_dir=os.path.join(directory, "none"), model_cache_dir=directory, save_consolidated=False
    )
    checkpointer = checkpointing.Checkpointer(config, 0, 0, 0)

    def run() -> dict[str, Tensor]:
        model.to_empty(device="cpu")
        checkpointer.load_base_model(model, torch.device("cpu"), directory, directory)
        return model.state_dict()

    return run


def _nemo_model(directory: str) -> Run:
    import torch.distributed.checkpoint as dcp

    reader = import_module("nemo_automodel.components.checkpoint._backports.hf_storage")._HuggingFaceStorageReader
    shapes = grouped_shapes(directory)
    adapter = _nemo_adapter(shapes)

    def run() -> dict[str, Tensor]:
        buffers, _ = new_buffers(shapes, transposed=True)
        native = {_renamed(name, _NEMO_NAMES): tensor for name, tensor in buffers.items()}
        parts = adapter.to_hf(dict(native), exclude_key_regex=r".*_extra_state.*", for_checkpoint_load=True)
        dcp.load(parts, storage_reader=reader(directory))
        for name, tensor in adapter.from_hf(parts).items():
            if tensor.data_ptr() != native[name].data_ptr():
                native[name].copy_(tensor)  # as load_state_dict does with tensors that were not read in place
        return buffers

    return run


def _nemo_adapter(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    adapters = import_module("nemo_automodel.components.models.qwen3_moe.state_dict_adapter")
    common = import_module("nemo_automodel.components.models.common")
    moe = import_module("nemo_automodel.components.moe.config")
    experts, hidden, intermediate = next(shape for name, shape in shapes.items() if name.endswith("down_proj"))
    config = moe.MoEConfig(
        **dict.fromkeys(("n_routed_experts", "n_activated_experts"), experts),
        **dict.fromkeys(("n_shared_experts", "gate_bias_update_factor", "aux_loss_coeff"), 0),
        **dict.fromkeys(("n_expert_groups", "n_limited_groups", "route_scale"), 1),
        **dict.fromkeys(("inter_dim", "moe_inter_dim"), intermediate),
        **dict.fromkeys(("train_gate", "norm_topk_prob"), True),
        dim=hidden,
        score_func="softmax",
    )
    backend = common.BackendConfig(
        attn="sdpa", linear="torch", rms_norm="torch", experts="torch_mm", dispatcher="torch"
    )
    return adapters.Qwen3MoeStateDictAdapter(SimpleNamespace(), config, backend, dtype=torch.bfloat16)


def ours(directory: str, threads: int, transposed: bool, **choices: Any) -> Run:
    """Call ``load_state_dict`` with transformers' rules of the model.

    The shapes follow from them and the files.
    """
    rules = amc.get_checkpoint_conversion_mapping("qwen3_moe")

    def run() -> Loaded:
        layout = "nemo" if transposed else None
        loaded = amc.load_state_dict(directory, rules=rules, layout=layout, threads=threads, **choices)
        result = Loaded({_renamed(name, _TRANSFORMERS_NAMES): tensor for name, tensor in loaded.items()})
        result.read_seconds = loaded.report.seconds["read"]
        return result

    return run


def _renamed(name: str, names: Mapping[str, str]) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}.{names[leaf]}" if leaf in names else name


def _files(directory: str) -> list[str]:
    return sorted(glob.glob(os.path.join(directory, "*.safetensors")))


METHODS: Mapping[str, Method] = {
    "transformers": Method(
        "transformers from_pretrained, huge pages", "transformers", from_pretrained, huge_pages=(READY, AS_FOUND)
    ),
    "transformers-as-it-comes": Method(
        "transformers from_pretrained, as it comes", "transformers", from_pretrained, huge_pages=()
    ),
    "safetensors-stack": Method("safetensors, stack and cat", "safetensors", safetensors_stack),
    "safetensors-copy": Method("safetensors, copy_", "safetensors", safetensors_copy),
    "dcp": Method("torch DCP into views", "torch", torch_dcp),
    "fastsafetensors": Method("fastsafetensors, copy_", "fastsafetensors", fastsafetensors, installed=False),
    "runai": Method("Run:ai Model Streamer, copy_", "runai-model-streamer", runai_streamer, installed=False),
    "nemo": Method("NeMo AutoModel", "nemo_automodel", nemo_automodel, installed=False),
    "ours-huge": Method("automodel_conv, huge pages", "automodel_conv", partial(ours, huge_pages=True), huge_pages=()),
    "ours-small": Method(
        "automodel_conv, small pages", "automodel_conv", partial(ours, huge_pages=False), huge_pages=()
    ),
    "ours": Method("automodel_conv", "automodel_conv", ours, huge_pages=()),
}
