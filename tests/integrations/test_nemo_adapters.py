"""Tests of NeMo AutoModel's adapters as loading code: traced and executed, each does what it does when it is run.

They are skipped if it is not installed; ``make test`` installs it. The adapters are those of the installed release.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping

import pytest

pytest.importorskip("nemo_automodel", reason="its adapters are run")

from torch import Tensor

from automodel_conv.execution.report import LoadReport
from tests.integrations.loading_code import addressed, load_both
from tests.integrations.nemo_models import (
    DONORS,
    NOT_BUILT,
    WITHOUT_ADAPTER,
    Built,
    adapter_classes,
    architectures,
    build,
    lend,
)

NAMES = [*(name for name in architectures() if name not in NOT_BUILT and name not in WITHOUT_ADAPTER), *DONORS]

# Targets that an adapter computes, by the pattern of their names, with the reason.
COMPUTED: dict[str, dict[str, str]] = {
    # The scale of an expert is multiplied into it.
    "DiffusionGemmaForBlockDiffusion": {"model.layers.0.moe.experts.down_projs": "aten.mul.Tensor"},
    "Gemma4ForConditionalGeneration": {"model.language_model.layers.0.moe.experts.down_projs": "aten.mul.Tensor"},
    # Frequencies that are in no checkpoint.
    "MuseGlimmerForConditionalGeneration": dict.fromkeys(
        ("model.rotary_emb.freqs", "model.vision_encoder.rotary_emb.inv_freq"), "the loading code makes values itself"
    ),
}

# How adapters decode codes: they multiply by scales, or by powers of two. What they compute of values that they have
# read has no name.
DECODING = {"aten.mul.Tensor", "aten.ldexp.Tensor", "aten.ldexp.out", "the loading code makes values itself"}


def adapter_of(name: str) -> Built:
    return lend(name) if name in DONORS else build(name)


def reasons(report: LoadReport) -> dict[str, str]:
    return {re.sub(r"\d+", "0", name): reason for name, reason in report.computed.items()}


def test_each_adapter_of_the_release_is_tested():
    adapters = [adapter_of(name).adapter for name in NAMES]
    tested = {type(adapter).__name__ for adapter in adapters}
    tested |= {type(part).__name__ for adapter in adapters for part in vars(adapter).values()}
    assert adapter_classes() <= tested


@pytest.mark.parametrize("name", WITHOUT_ADAPTER)
def test_models_that_are_left_out_have_no_adapter(name):
    assert build(name).adapter is None


@pytest.mark.parametrize("name", NOT_BUILT)
def test_architectures_that_are_left_out_cannot_be_built(name):
    with pytest.raises(LookupError, match=NOT_BUILT[name]):
        build(name)


def checkpoints(adapter, native: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield checkpoints that an adapter loads: one that is not quantized, and one that is, if it knows such."""
    plain = copy.deepcopy(adapter).to_hf(dict(native))
    yield addressed(plain)
    quantized = copy.deepcopy(adapter).to_hf(dict(native), quantization=True, for_checkpoint_load=True)
    if quantized.keys() != plain.keys():
        yield addressed(quantized)


@pytest.mark.parametrize("name", NAMES)
def test_to_hf_equals_its_own(name, tmp_path):
    adapter, tensors = adapter_of(name)
    _, report = load_both(copy.deepcopy(adapter).to_hf, copy.deepcopy(adapter).to_hf, addressed(tensors), tmp_path)
    assert not report.computed


@pytest.mark.parametrize("name", NAMES)
def test_from_hf_equals_its_own(name, tmp_path):
    adapter, tensors = adapter_of(name)
    for is_quantized, checkpoint in enumerate(checkpoints(adapter, addressed(tensors))):
        loaded, report = load_both(copy.deepcopy(adapter).from_hf, copy.deepcopy(adapter).from_hf, checkpoint, tmp_path)
        if is_quantized:
            assert set(report.computed.values()) <= DECODING
            assert 0 < len(report.computed) < len(loaded)
        else:
            assert reasons(report) == COMPUTED.get(name, {})
