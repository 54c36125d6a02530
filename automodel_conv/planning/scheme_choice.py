"""Choose the scheme of a config that fits the parts of a weight, and raise a ``Misfit`` if none does; pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, prod
from typing import NamedTuple

from automodel_conv.planning.methods.method import (
    ANY_MODULE,
    FLOAT_SCALES,
    TENSOR,
    Block,
    Method,
    Packing,
    Scheme,
    part_name,
)


class Part(NamedTuple):
    """A tensor of a quantized weight."""

    row: int
    """Its row in the source table."""
    name: str
    dtype: str
    shape: tuple[int, ...]


class CodedWeight(NamedTuple):
    """A weight and its parts."""

    name: str
    """Name of the weight."""
    packing: Packing
    shape: tuple[int, ...]
    """Shape of the codes as a matrix or a stack of matrices, as stored."""
    codes: Part
    scales: Part
    zero_points: Part | None
    global_scale: Part | None
    global_divisor: Part | None


class Misfit(Exception):
    """Raised for parts that do not fit each other or the config."""

    def __init__(self, kind: str, *names: str):
        """Create the exception, with the arguments of ``ProblemKinds.add``."""
        super().__init__(kind.format(*names))
        self.kind, self.names = kind, names


def choose_scheme(
    weight: CodedWeight, method: Method, schemes: Sequence[Scheme], stated: Sequence[Scheme] = ()
) -> Scheme:
    """Return the scheme that fits the parts of a weight.

    Args:
        weight: the weight and its parts.
        method: the method of the config.
        schemes: all schemes of the config.
        stated: schemes that the config states for the module of the weight; none if it states none for it.

    Raises:
        Misfit: no scheme fits, or several fit that differ in their blocks.
    """
    allowed = _of_format(weight, schemes, stated)
    if method.whole_name(weight.name) is not None:
        allowed.append(Scheme(weight.packing.format, TENSOR, FLOAT_SCALES))
    fitting = _with_scales(weight, allowed)
    has_zero_points, has_global = weight.zero_points is not None, weight.global_scale is not None
    agreeing = [scheme for scheme in fitting if scheme.zero_points == has_zero_points]
    if not agreeing:
        raise _without(weight, weight.zero_points, "zero points", [method.zero_points])
    fitting = [scheme for scheme in agreeing if scheme.global_scale == has_global]
    if not fitting:
        raise _without(weight, weight.global_scale, "global scale", method.global_scale)
    if not stated:
        fitting = [scheme for scheme in fitting if scheme.modules == ANY_MODULE] or fitting
    if len({block_within(scheme.block, weight.shape) for scheme in fitting}) > 1:
        blocks = " and ".join(str(list(scheme.block)) for scheme in fitting)
        raise Misfit(f"{{}} of {{}} {_shape(weight)} fits several blocks: {blocks}", weight.scales.name, weight.name)
    return fitting[0]


def _of_format(weight: CodedWeight, schemes: Sequence[Scheme], stated: Sequence[Scheme]) -> list[Scheme]:
    """Return the schemes for the codes of a weight, from those of its module or else from all."""
    format, is_stack = weight.packing.format, len(weight.shape) > 2
    allowed = [scheme for scheme in stated or schemes if scheme.format == format]
    allowed = [scheme for scheme in allowed if is_stack or scheme.stack_arrangement is None]
    if not allowed and stated:
        others = " or ".join(sorted({scheme.format for scheme in stated}))
        raise Misfit(f"{{}} has {format} codes; the config states {others} for its module", weight.codes.name)
    if not allowed:
        raise Misfit(f"{{}} has {format} codes, which the config does not describe", weight.codes.name)
    return allowed


def _with_scales(weight: CodedWeight, schemes: Sequence[Scheme]) -> list[Scheme]:
    """Return the schemes that the dtype and the shape of a weight's scales fit."""
    scales = weight.scales
    typed = [scheme for scheme in schemes if scales.dtype in scheme.scales]
    if not typed:
        wanted = ", ".join(sorted({dtype for scheme in schemes for dtype in scheme.scales}))
        kind = f"{{}} is {scales.dtype}; these {weight.packing.format} codes have scales of {wanted}"
        raise Misfit(kind, scales.name)
    fitting = [scheme for scheme in typed if _fit(scales.shape, weight.shape, scheme.block)]
    if not fitting:
        wanted = " or ".join(dict.fromkeys(str(list(scale_shapes(weight.shape, scheme.block)[0])) for scheme in typed))
        kind = f"{{}} of {{}} {_shape(weight)}: expected {wanted}, found {list(scales.shape)}"
        raise Misfit(kind, scales.name, weight.name)
    return fitting


def _without(weight: CodedWeight, part: Part | None, what: str, suffixes: Sequence[str]) -> Misfit:
    """Return the error for a part that the weight or else the config does not have."""
    if part is not None:
        return Misfit(f"{{}}: the config has no {what}", part.name)
    wanted = " or ".join(filter(None, (part_name(weight.name, suffix) for suffix in suffixes)))
    return Misfit(f"{{}} has no {what}: no tensor is named {{}}", weight.name, wanted or suffixes[0])


def check_zero_points(weight: CodedWeight, scheme: Scheme) -> None:
    """Raise Misfit if the zero points of a weight have another dtype or shape than its scheme requires."""
    zero_points = weight.zero_points
    if zero_points is None:
        return
    rows, columns = block_within(scheme.block, weight.shape)
    grid_rows, grid_columns = ceil(weight.shape[-2] / rows), ceil(weight.shape[-1] / columns)
    wanted = scheme.zero_packing.rows(0, grid_rows)[1], scheme.zero_packing.columns(grid_columns)
    if len(weight.shape) > 2 or (zero_points.dtype, zero_points.shape) != ("I32", wanted):
        raise _difference(zero_points, f"I32 {list(wanted)}")


def check_global_scale(weight: CodedWeight) -> None:
    """Raise Misfit if the global scale of a weight is not one F32, or one for each matrix of a stack."""
    global_scale = weight.global_scale
    if global_scale is None:
        return
    of_stack = scale_shapes(weight.shape, TENSOR)
    fits = prod(global_scale.shape) == 1 or global_scale.shape in of_stack
    if global_scale.dtype != "F32" or not fits:
        wanted = ["one F32", *(f"F32 {list(one_each)}" for one_each in of_stack[-1:] if one_each)]
        raise _difference(global_scale, " or ".join(wanted))


def check_divisor(weight: CodedWeight, suffix: str) -> None:
    """Raise Misfit unless a weight has a divisor that is like its global scale, or neither.

    Args:
        weight: the weight and its parts.
        suffix: ``global_divisor`` of its method.
    """
    divisor, global_scale = weight.global_divisor, weight.global_scale
    if not suffix or divisor is global_scale is None:
        return
    if divisor is None:
        raise Misfit(
            "{} has no divisor of its global scale: no tensor is named {}", weight.name, f"{weight.name}{suffix}"
        )
    if global_scale is None:
        raise Misfit("{} has no global scale to divide", divisor.name)
    if (divisor.dtype, divisor.shape) != ("F32", global_scale.shape):
        raise _difference(divisor, f"F32 {list(global_scale.shape)} like {{}}", global_scale.name)


def _difference(part: Part, wanted: str, *names: str) -> Misfit:
    return Misfit(f"{{}}: expected {wanted}, found {part.dtype} {list(part.shape)}", part.name, *names)


def _shape(weight: CodedWeight) -> list[int]:
    """Return the shape of a weight for errors, given the shape of its codes."""
    *lead, rows, columns = weight.shape
    return [*lead, *(weight.packing.arrangement.shape((rows, columns)) or (rows, columns))]


@lru_cache(maxsize=1024)
def block_within(block: Block, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a block, cut to the matrix that holds it."""
    rows, columns = max(1, shape[-2]), max(1, shape[-1])
    return min(block[0] or rows, rows), min(block[1] or columns, columns)


@lru_cache(maxsize=1024)
def _fit(scales: tuple[int, ...], shape: tuple[int, ...], block: Block) -> bool:
    """Return whether scales of a shape fit a weight; one scale for each matrix of a stack may be one for all."""
    return scales in scale_shapes(shape, block) or (block == TENSOR and prod(scales) == 1)


def scale_shapes(shape: Sequence[int], block: Block) -> list[tuple[int, ...]]:
    """Return the shapes that the scales of a weight may have, the most explicit first.

    Args:
        shape: shape of the codes, at least two dimensions.
        block: the block.
    """
    *lead, rows, columns = shape
    grid_rows = 1 if block[0] is None else ceil(rows / block[0])
    grid_columns = 1 if block[1] is None else ceil(columns / block[1])
    shapes = [[*lead, grid_rows, grid_columns]]
    if block[1] is None:
        shapes.append([*lead, grid_rows])
    if block == TENSOR:
        shapes.append(lead)
    elif lead:  # the rows of blocks of all matrices, one below the other
        shapes.append([prod(lead) * grid_rows, grid_columns])
    if None not in block:
        shapes.append([*lead, grid_rows, 1, grid_columns, 1])  # FP8_PB_WO of modelopt
    if lead and prod(lead) == 1:
        shapes += [scale_shape[len(lead) :] for scale_shape in shapes]  # modelopt leaves out leading dimensions of 1
    return [tuple(scale_shape) for scale_shape in shapes]
