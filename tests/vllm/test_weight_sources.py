"""Tests of the source of weights with vLLM: its models load what it yields, and its trainers' side accepts it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from queue import Queue
from unittest import mock

import pytest

pytest.importorskip("vllm")

import torch
import transformers
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine, NCCLWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

import automodel_conv as amc
from automodel_conv.integrations.vllm import published_source
from automodel_conv.testing import assert_bytes_equal
from tests.distributed.starting import results, run_suite
from tests.vllm.cases import MOE, write
from tests.vllm.engine import _loaded, engine_config, every_platform, join, loaded_by_vllm, tensors
from tests.vllm.weight_sources import KINDS, TYPES

# vLLM accepts only the published form of this one, in which experts are transposed; transformers saves another.
OTHER_FORM = {"Qwen3VLMoeForConditionalGeneration"}
# transformers does not load the small checkpoint that vLLM loads.
NOT_LOADED = {"LongcatFlashForCausalLM"}

ARCHITECTURES = [name for name in MOE if not MOE[name].divided and name not in NOT_LOADED]

# Outcomes for the names of ModuleSource, for docs/tasks/weight_sources.md; the others are loaded.
REFUSED = {
    *("AXK1ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"),
    *("Ernie4_5_MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM", "GraniteMoeHybridForCausalLM"),
    *("HYV3ForCausalLM", "LagunaForCausalLM", "MiniMaxM2ForCausalLM", "MixtralForCausalLM"),
    "Qwen3VLMoeForConditionalGeneration",
}
WITHOUT_BUFFERS = {
    *("ExaoneMoeForCausalLM", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Glm4MoeForCausalLM"),
    *("Glm4vMoeForConditionalGeneration", "Lfm2MoeForCausalLM", "MiMoV2FlashForCausalLM", "NemotronHForCausalLM"),
}


@pytest.fixture(scope="module", autouse=True)
def engine(tmp_path_factory):
    # vLLM makes the group of experts only if the first model has some.
    directory = tmp_path_factory.mktemp("engine")
    write("Qwen3MoeForCausalLM", directory)
    with every_platform():
        join(engine_config(directory))
        yield


def trainer_of(directory):
    """Return the model of transformers for a checkpoint."""
    [name] = json.loads((Path(directory) / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(directory)


def assert_same_tensors(actual, expected):
    """Check that a model has the tensors of another one; an update adds those that vLLM derives to run the model."""
    left, right = tensors(actual), tensors(expected)
    assert right.keys() <= left.keys()
    for name, tensor in right.items():
        try:
            assert_bytes_equal(left[name], tensor, strides=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_loads_what_the_source_yields(architecture, tmp_path):
    write(architecture, tmp_path)
    config = engine_config(tmp_path)
    reference = tmp_path if architecture in OTHER_FORM else None
    source = published_source(trainer_of(tmp_path), reference=reference)
    actual = _loaded(config, lambda model, _: model.load_weights(source.iter_full()))
    assert_same_tensors(actual.model, loaded_by_vllm(config).model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_of_the_module_are_loaded_refused_or_without_buffers(architecture, tmp_path):
    """Run vLLM's own source: this is why there is another one, and shows that the comparison can fail."""
    write(architecture, tmp_path)
    config = engine_config(tmp_path)
    source = ModuleSource(trainer_of(tmp_path))

    def load():
        actual = _loaded(config, lambda model, _: model.load_weights(source.iter_full()))
        assert_same_tensors(actual.model, loaded_by_vllm(config).model)

    if architecture in REFUSED:
        with pytest.raises((KeyError, ValueError, RuntimeError), match=r"mlp|block_sparse_moe|size of tensor"):
            load()
    elif architecture in WITHOUT_BUFFERS:
        with pytest.raises(AssertionError, match=r"bias: |layer_scalar: |std_bias|std_scale|differ"):
            load()
    else:
        load()


class Wire:
    """A communicator between a trainer and a worker in this process; both call ``broadcast`` in the same order."""

    def __init__(self):
        self._sent = Queue()
        self.sender = mock.Mock(broadcast=self._send)
        self.receiver = mock.Mock(broadcast=self._receive)

    def _send(self, tensor, src, stream=None):
        assert tensor.is_contiguous()
        self._sent.put(tensor.detach().clone())

    def _receive(self, tensor, src, stream=None):
        sent = self._sent.get(timeout=60)
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)


class Client:
    """The calls from a trainer to a worker, as an inference server would forward them."""

    def __init__(self, worker, config):
        self._worker, self._config = worker, config

    def start_weight_update(self):
        self._worker.start_weight_update()

    def update_weights(self, info):
        assert threading.current_thread() is not threading.main_thread()
        with set_current_vllm_config(self._config):
            self._worker.update_weights(info)

    def finish_weight_update(self, weight_version=None):
        self._worker.finish_weight_update()


@pytest.fixture
def connected(tmp_path, monkeypatch):
    """Return a function from an architecture to a trainer, the engine's model, and the call that updates it."""
    # Repacks experts for kernels that the wheel does not have on a CPU.
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "process_weights_after_loading", lambda self, layer: None)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)

    def connect(architecture):
        write(architecture, tmp_path / "first")
        config = engine_config(tmp_path / "first")
        trainer, model = trainer_of(tmp_path / "first"), loaded_by_vllm(config).model
        record_metadata_for_reloading(model)
        wire = Wire()
        worker = NCCLWeightTransferEngine(mock.Mock(), config, torch.device("cpu"), model)
        worker.model_update_group, worker.packed = wire.receiver, False
        source = published_source(trainer)
        sender = NCCLTrainerWeightTransferEngine(client=Client(worker, config), source=source, packed=False)
        sender.model_update_group = wire.sender
        return trainer, model, sender.send_weights

    return connect


def step(trainer):
    """Change all weights, as a step of training does."""
    with torch.no_grad():
        for tensor in trainer.state_dict().values():
            tensor.mul_(-0.5)


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"])
def test_engine_has_the_saved_weights_after_each_update(architecture, connected, tmp_path):
    """Run both sides of NCCL broadcast; only the communicator is another one."""
    trainer, model, update = connected(architecture)
    for number in range(3):
        step(trainer)
        update()
        amc.save_checkpoint(trainer, tmp_path / str(number))
        assert_same_tensors(model, loaded_by_vllm(engine_config(tmp_path / str(number))).model)


def test_updates_of_gpt_oss_do_not_reach_its_experts(connected):
    """Show what docs/tasks/weight_sources.md says of vLLM 0.33.0: its code copies experts to tensors without data."""
    trainer, model, update = connected("GptOssForCausalLM")
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    step(trainer)
    update()
    unchanged = {name for name, tensor in tensors(model).items() if torch.equal(tensor, before[name])}
    assert {name for name in before if ".routed_experts.w" in name} <= unchanged
    assert "model.layers.0.attn.qkv_proj.weight" not in unchanged


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_packed_buffers_have_the_published_tensors(architecture, tmp_path):
    write(architecture, tmp_path)
    trainer = trainer_of(tmp_path)
    source = published_source(trainer)
    wanted = dict(amc.published_tensors(trainer))
    pairs, received = source.iter_full(), {}
    while (packed := pack_tensors(pairs, lambda item: item[1], 20_000)) is not None:
        shapes = packed.names, packed.shapes, packed.dtypes, packed.tensor_sizes
        received |= dict(unpack_tensor(packed.packed_tensor, *shapes))
    assert list(received) == [meta.name for meta in source.metadata]
    for name, tensor in wanted.items():
        assert_bytes_equal(received[name], tensor)


@pytest.mark.parametrize("world", KINDS)
def test_every_backend_of_a_sharded_trainer_gets_the_saved_tensors(world, tmp_path):
    ended = run_suite("tests.vllm.weight_sources", world, tmp_path, KINDS[world])
    for kind, ranks in ended.items():
        for sent in results(ranks):
            by_type = {name: more for name, *more in sent}
            assert list(by_type) == TYPES
            for gathers, of_module, _, _ in by_type.values():
                assert gathers == 0
                assert (of_module > 0) == (kind == "fsdp over tensor")
            _, _, accepted_by_m2n, experts = by_type["qwen3_moe"]
            assert accepted_by_m2n or kind != "inner"
            if world == 2:
                assert experts == {"none": 72, "fsdp": 36, "inner": 0}[kind]
