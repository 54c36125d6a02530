"""Small plans and random plans."""

import random

from hypothesis import strategies as st

from automodel_conv.planning.copies import SourceTable, Target, zero_rows
from automodel_conv.planning.lowering import copies_of, lower
from automodel_conv.planning.operations import Context, Operation
from automodel_conv.planning.plan import CopyPlan
from automodel_conv.planning.values import leaf

MERGE = Operation("MergeModulelist", (("dim", 0),))
JOIN = Operation("Concatenate", (("dim", 1),))
SWAP = Operation("Transpose", (("dim0", 1), ("dim1", 2)))
ALTERNATE = Operation("Interleave", (("dim", 1), ("inverse", True)))
CHUNK = Operation("Chunk", (("dim", 0),))
SEEDS = st.integers(0, 2**32)


def table(**shapes):
    names = [name.replace("__", ".") for name in shapes]
    return SourceTable(names, ["BF16"] * len(names), [tuple(shape) for shape in shapes.values()])


def table_of(plan):
    return SourceTable([t.name for t in plan.targets], [t.dtype for t in plan.targets], [t.shape for t in plan.targets])


def targets_of(sources, groups, operations, outputs, dtype="BF16", rule=-1):
    """Return the targets of a chain of operations on groups of sources."""
    rows = [sources.names.index(name) for group in groups for name in group]
    leaves, ordinal = {}, 0
    for i, group in enumerate(groups):
        leaves[f"p{i}"] = [leaf(ordinal + k, sources.shapes[sources.names.index(name)]) for k, name in enumerate(group)]
        ordinal += len(group)
    values = lower(operations, leaves, Context(tuple(leaves), tuple(outputs), ()))
    if not operations:
        values = {outputs[0]: values["p0"]}
    return [
        Target(name, dtype, v.shape, rule, tuple(rows), copies_of(v), fills=zero_rows(v.shape, v.zero_rows))
        for name, v in values.items()
    ]


def plan_of(sources, targets, **more):
    plan = CopyPlan(sources, tuple(targets), **more)
    plan.validate()
    return plan


def experts_plan(dtype="BF16", count=2):
    names = {f"e__{i}__{w}": (3, 4) for i in range(count) for w in ("gate", "up")}
    sources = table(**names, norm=(4,))
    groups = [[f"e.{i}.{w}" for i in range(count)] for w in ("gate", "up")]
    merged = targets_of(sources, groups, [MERGE, JOIN], ["gate_up"], dtype, rule=0)
    return plan_of(
        sources,
        [*merged, *targets_of(sources, [["norm"]], [], ["norm"])],
        rules=("e.*.gate + e.*.up -> gate_up: merge, join",),
    )


def transposing_plan(sources=None):
    sources = sources or table_of(experts_plan())
    return plan_of(
        sources,
        [
            *targets_of(sources, [["gate_up"]], [ALTERNATE, SWAP], ["w13"], rule=0),
            *targets_of(sources, [["norm"]], [], ["norm"]),
        ],
        rules=("gate_up -> w13: alternate, swap",),
    )


def padded_plan(rows=2, size=5):
    """Return a plan of a matrix with rows of zeros at its end."""
    sources = table(head=(rows, 4))
    pad = Operation("Inkling2UnpadVocab", (("inverse", True), ("rows", size)))
    return plan_of(sources, targets_of(sources, [["head"]], [pad], ["padded"]))


def random_plan(seed):
    """Return experts of random sizes through a random chain of operations; every plan of it is valid."""
    rng = random.Random(seed)
    count, rows, columns = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 5)
    sources = table(**{f"e__{i}__{w}": (rows, columns) for i in range(count) for w in ("gate", "up")})
    groups = [[f"e.{i}.{w}" for i in range(count)] for w in ("gate", "up")]
    chain = [MERGE, JOIN, *rng.choice([(), (SWAP,), (ALTERNATE,), (ALTERNATE, SWAP)])]
    return rng, plan_of(sources, targets_of(sources, groups, chain, ["result"]))


def three_plans():
    first = experts_plan()
    second = transposing_plan()
    sources = table_of(second)
    third = plan_of(
        sources,
        [*targets_of(sources, [["w13"]], [CHUNK], ["e0", "e1"]), *targets_of(sources, [["norm"]], [], ["n"])],
    )
    return first, second, third
