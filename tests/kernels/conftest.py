"""Fixtures for tests of the verbs: small tiles, and a record of the launches."""

from contextlib import ExitStack
from unittest import mock

import pytest

from automodel_conv.kernels import deinterleave as deinterleaving
from automodel_conv.kernels import interleave as interleaving
from automodel_conv.kernels import launch, strided_copy, transpose

BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "bfloat16": 2, "float16": 2, "float32": 4}


def tiles_patched():
    """Shrink the tiles so that small matrices have several, the last ones partial."""
    tiles = dict.fromkeys([(1, 1), (2, 2), (4, 4), (2, 4), (4, 2)], (16, 16))
    return (
        mock.patch.multiple(strided_copy, _WIDE=(4, 64), _NARROW=(8, 32), _SCALAR=(4, 32)),
        mock.patch.multiple(transpose, _TILES=tiles, SCALAR_TILE=(16, 16)),
        mock.patch.multiple(interleaving, _TILES=tiles, SCALAR_TILE=(16, 16)),
        mock.patch.multiple(deinterleaving, _TILES=tiles, SCALAR_TILE=(16, 16)),
    )


@pytest.fixture
def small_tiles():
    """Use these tiles in kernels."""
    with ExitStack() as stack:
        for patch in tiles_patched():
            stack.enter_context(patch)
        yield


@pytest.fixture
def launched():
    """Return the launched variants with the number of matrices. Check the promise that the interpreter ignores."""
    seen = []

    def spy(variant, grid, table, integers):
        pairs_at = (
            {"interleave_tiles": "dst", "deinterleave_tiles": "src"}.get(variant.kernel.name) if variant.pairs else ""
        )
        src, dst = (
            nbytes * vector * (2 if pairs_at == side else 1)
            for side, nbytes, vector in (
                ("src", 1 if variant.bytewise else BYTES[variant.src], variant.src_vector),
                ("dst", BYTES[variant.dst], variant.dst_vector),
            )
        )
        destinations = 2 if variant.kernel.name == "deinterleave_tiles" else 1
        assert not (table[:, :destinations] % dst).any()
        assert not (table[:, destinations:] % src).any()
        seen.append((variant, grid[1]))
        return real(variant, grid, table, integers)

    real = launch.queue
    with mock.patch.object(launch, "queue", spy):
        yield seen
