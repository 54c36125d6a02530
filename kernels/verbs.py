"""The table of verbs that strided copies may become: one line each, all else is in the verb's file."""

from __future__ import annotations

from automodel_conv.kernels.deinterleave import DEINTERLEAVE
from automodel_conv.kernels.interleave import INTERLEAVE
from automodel_conv.kernels.strided_copy import STRIDED_COPY
from automodel_conv.kernels.transpose import TRANSPOSE
from automodel_conv.kernels.verb import Verb

VERBS: tuple[Verb, ...] = (
    STRIDED_COPY,
    TRANSPOSE,
    INTERLEAVE,
    DEINTERLEAVE,
)
"""The first whose walk is that of the copies carries them out."""
