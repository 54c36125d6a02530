"""Tests in one process of checksums of parts and of which ranks hold them. Many ranks: tests/distributed."""

from __future__ import annotations

import zlib
from itertools import product

import pytest
import torch

from automodel_conv.distributed.holders import (
    Holders,
    checksum_of,
    checksums_of_parts,
    find_holders,
    refuse_unlike_replicas,
)
from automodel_conv.errors import RankError
from automodel_conv.planning.sharding import region_of
from automodel_conv.testing import address_valued


def in_order(tensor):
    """Return the CRC32 of a tensor's elements, one at a time."""
    checksum = 0
    for index in product(*map(range, tensor.shape)):
        checksum = zlib.crc32(tensor[index].reshape(1).contiguous().view(torch.uint8).numpy().tobytes(), checksum)
    return checksum


@pytest.mark.parametrize("most_bytes", [1, 7, 16, 1 << 20])
@pytest.mark.parametrize(
    "lay",
    [
        lambda t: t,
        lambda t: t.transpose(0, 2),
        lambda t: t[:, 1:3],
        lambda t: t[::2, ::3, ::2],
        lambda t: t[1:2].expand(3, -1, -1),
        lambda t: t.reshape(-1),
        lambda t: t.view(1, 1, -1).mT,
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.complex64], ids=str)
def test_checksum_is_that_of_the_elements_in_order(lay, dtype, most_bytes):
    tensor = lay(address_valued((4, 5, 6), dtype))
    assert checksum_of(tensor, most_bytes) == in_order(tensor) == checksum_of(tensor.contiguous(), 1 << 20)


def test_checksums_of_scalars_empty_tensors_and_parameters():
    number = torch.tensor(3.5, requires_grad=True)
    assert checksum_of(number, 1) == in_order(number.detach())
    assert checksum_of(torch.empty(0, 5), 1) == checksum_of(torch.empty(5, 0).t(), 64) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_each_part_has_its_own_checksum(threads):
    parts = {str(n): torch.arange(n, n + 10) for n in range(8)}
    checksums = checksums_of_parts(parts, threads, 64)
    assert checksums == {name: zlib.crc32(part.numpy().tobytes()) for name, part in parts.items()}
    assert len(set(checksums.values())) == 8


def test_one_process_writes_all_tensors_with_elements():
    tensors = {"b": torch.ones(2, 3), "a": torch.tensor(1), "none": torch.ones(0, 3)}
    holders = find_holders([], tensors, {name: region_of(tensor) for name, tensor in tensors.items()})
    assert holders == Holders(frozenset("ab"), frozenset(), [])
    assert find_holders([], {}, {}) == Holders(frozenset(), frozenset(), [])
    refuse_unlike_replicas([], holders, {})


def test_all_differing_tensors_and_ranks_are_named(monkeypatch):
    sums = [[1, 2, 3], [1, 2, 3], [1, 9, 3], [1, 9, 8]]
    from automodel_conv.distributed import holders

    monkeypatch.setattr(
        holders, "all_gather_bytes", lambda *_: [torch.tensor(s, dtype=torch.uint32).numpy() for s in sums]
    )
    known = Holders(frozenset(), frozenset("abc"), [(["a", "b"], [[0, 1, 2, 3]]), (["c"], [[0, 2], [1, 3]])])
    with pytest.raises(RankError) as caught:
        refuse_unlike_replicas([], known, {"a": 1, "b": 2, "c": 3})
    assert str(caught.value).startswith("ranks hold different bytes of b\n")
    assert "b: ranks 2, 3 and rank 0\n    c: rank 3 and rank 1" in str(caught.value)
