"""The dtypes of the safetensors format against torch and against the safetensors library."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save

from automodel_conv.dtypes import BITS, DECODED, FLOATING, dtype_code, itemsize, nbytes, promoted, torch_dtype

IN_TORCH = [code for code in BITS if torch_dtype(code) is not None]


@pytest.mark.parametrize("code", IN_TORCH)
def test_codes_are_those_that_safetensors_writes(code):
    tensor = torch.zeros(2 * itemsize(code), dtype=torch.uint8).view(torch_dtype(code))
    written = save({"a": tensor})
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert header["a"]["dtype"] == code == dtype_code(torch_dtype(code))


def test_dtypes_that_only_one_side_has_are_none():
    assert torch_dtype("F6_E2M3") is None
    assert torch_dtype("no such code") is None
    assert dtype_code(torch.complex128) is None
    assert dtype_code(torch.qint8) is None


@pytest.mark.parametrize("code", IN_TORCH)
@pytest.mark.parametrize("numel", [0, 1, 7])
def test_bytes_are_those_of_a_tensor_of_torch(code, numel):
    assert nbytes(code, numel) == torch.empty(numel, dtype=torch_dtype(code), device="meta").nbytes
    assert itemsize(code) == torch_dtype(code).itemsize


def test_elements_narrower_than_a_byte_share_bytes():
    assert nbytes("F6_E2M3", 4) == 3


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(("U8", "I8", "I64", "BF16", "F16", "F32"), repeat=2))
)
def test_stack_has_the_dtype_that_torch_gives_it(first, second):
    both = [torch.ones(2, dtype=torch_dtype(code)) for code in (first, second)]
    assert promoted([first, second]) == dtype_code(torch.cat(both).dtype)


def test_stack_of_one_or_of_equal_dtypes_keeps_its_dtype():
    assert promoted(["F8_E4M3"]) == promoted(iter(["F8_E4M3"] * 3)) == "F8_E4M3"
    assert promoted(["BF16", "F16", "BF16"]) == "F32"


def test_floating_dtypes_are_those_of_plain_values():
    plain = {c for c in IN_TORCH if torch_dtype(c).is_floating_point and torch_dtype(c).itemsize > 1}
    assert plain == FLOATING
    assert FLOATING - DECODED == {"F64"}
