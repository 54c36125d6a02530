"""The table of the verbs that execute strided copies.

A new verb is a file and one line here.
"""

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
"""The verbs in order of preference: the first whose ``transposes`` and ``steps`` match the copies executes them."""
