"""One rule for each distinct chain of operations of the installed registry, with names and shapes that fit it."""

from types import SimpleNamespace

import pytest
import torch

from tests.planning import oracles
from tests.planning.operation_cases import HEADS


class Config(SimpleNamespace):
    def get_text_config(self):
        return self


def model_with(shapes, dtype=torch.float32, **config):
    """Return the parts of a model that operations use."""
    return SimpleNamespace(
        config=Config(num_attention_heads=HEADS, **config),
        get_parameter=lambda name: torch.empty(shapes[name], dtype=dtype, device="meta"),
    )


def registered_chains():
    """Return one rule for each distinct chain of operations of the installed registry."""
    try:
        rules = oracles.registry()
    except ModuleNotFoundError:
        return []
    chains = {}
    for model_type, entry in rules.items():
        for rule in entry:
            if hasattr(rule, "operations"):
                texts = [f"{type(op).__name__}{vars(op)}" for op in rule.operations]
                key = (*texts, len(rule.source_patterns), len(rule.target_patterns))
                chains.setdefault(key, (model_type, rule))
    return [
        pytest.param(rule, id=f"{model_type}-{'-'.join(type(op).__name__ for op in rule.operations)}")
        for model_type, rule in chains.values()
    ]


def example_names(rule, count):
    """Return source names of one target of a rule: ``count`` for each pattern that matches many."""
    names = []
    for pattern in rule.source_patterns:
        glob = pattern.replace(r"\.", ".").replace(".*.", ".*").replace("*.", "*")
        for i in range(count) if "*" in glob else (0,):
            regex = next(
                branch
                for branch in rule.compiled_sources.pattern.split("|(?P<")
                if branch.removeprefix("(?P<").startswith(f"g{rule.source_patterns.index(pattern)}>")
            )
            regex = regex.removeprefix("(?P<").split(">", 1)[1].removesuffix(")")
            name = oracles.example(regex, i)
            names.append(name if regex.startswith("^") else f"model.layers.7.{name.lstrip('.')}")
    return names


def source_shape(rule):
    """Return a shape that every operation of the chain accepts."""
    operations = [(type(op).__name__, vars(op)) for op in rule.operations]
    if operations[0][0] in ("MergeModulelist", "ErnieFuseAndSplitTextVisionExperts"):
        return (4, 6)
    dims = [v for _, o in operations for k, v in o.items() if k in ("dim", "dim0", "dim1")]
    if any(n == "PermuteForRope" for n, _ in operations):
        return (24, 5)
    return (24, 12, 8)[: max([2, *(d + 1 for d in dims)])]


PADDING = 5
"""Rows that an unpadded vocabulary lacks."""


def parameter_shapes(rule, targets, shape, transposed=False):
    """Return the shape of each target of a rule whose sources have a shape, as a model would state it.

    Args:
        rule: the rule.
        targets: names of its targets.
        shape: shape of each source.
        transposed: whether a source is stored transposed.
    """
    shapes = dict.fromkeys(targets, shape)
    for op in rule.operations:
        if type(op).__name__ == "Split":
            others = [shape[op.dim] // 2 // (len(targets) - 1)] * (len(targets) - 1)
            sizes = [shape[op.dim] - sum(others), *others]
            for target, size in zip(targets, sizes, strict=True):
                shapes[target] = (*shape[: op.dim], size, *shape[op.dim + 1 :])
        if type(op).__name__ == "Transpose" and transposed:
            stored_transposed = list(shape)
            stored_transposed[op.dim0], stored_transposed[op.dim1] = shape[op.dim1], shape[op.dim0]
            shapes = dict.fromkeys(targets, tuple(stored_transposed))
        if type(op).__name__ == "Inkling2UnpadVocab":
            shapes = dict.fromkeys(targets, (shape[0] - PADDING, *shape[1:]))
    return shapes


def config_values(rule, names, shape):
    """Return the values that the operations of a rule read from a config, for sources of a shape."""
    counted = [op.num_shards_attribute for op in rule.operations if getattr(op, "num_shards_attribute", None)]
    values = dict.fromkeys(counted, len(names))
    if any(type(op).__name__ == "Inkling2UnpadVocab" for op in rule.operations):
        values |= {"vocab_size": shape[0], "unpadded_vocab_size": shape[0] - PADDING}
    return values
