"""Collect the problems between a checkpoint and a model, and raise them as one error."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from automodel_conv.errors import Advice, Message, NameProblems, listing
from automodel_conv.planning.layouts import holds_grouped_experts


@dataclass
class Problems:
    """All problems of a plan; ``NameProblems`` describes the first five fields."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    duplicated: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    incomplete: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Targets that cannot be filled, each with the reason."""
    unclaimed: list[int] = field(default_factory=list)
    """Rows of the sources that no rule assigns to a target."""
    without_place: list[str] = field(default_factory=list)
    """Names in ``unexpected`` that ``unclaimed`` sources would have."""
    lacks_all_experts: bool = False
    """Whether the model has experts, and all of them are in ``missing``."""
    keeps_codes: bool = False
    """Whether the load keeps codes of quantized tensors although the model was given or built."""

    def accept_unclaimed(self) -> frozenset[int]:
        """Stop treating sources that no rule assigns to a target as a problem, and return their rows."""
        accepted = set(self.without_place)
        self.unexpected = [name for name in self.unexpected if name not in accepted]
        return frozenset(self.unclaimed)

    def reasons(self) -> list[str]:
        """Return a line for each problem of a target that some source provides."""
        return [
            *(f"parts are absent: {', '.join(parts[:3])}" for _, parts in self.incomplete),
            *(f"shape {list(found)} instead of {list(expected)}" for _, found, expected in self.mismatched),
            *(f"several sources claim it: {', '.join(sources[:3])}" for _, sources in self.duplicated),
            *(f"the model has no {name}" for name in self.unexpected),
            *(reason for _, reason in self.failed),
        ]

    def raise_unless_fit(
        self,
        where: str,
        strict: bool = True,
        unindexed: Sequence[tuple[str, str]] = (),
        do: Sequence[Advice] = (),
        *,
        in_files: Collection[str] | None = None,
        model_is_built: bool = False,
    ) -> None:
        """Raise one error for all problems, if there are any.

        Args:
            where: names of the checkpoint and the model, for the message.
            strict: whether all problems count. Otherwise only targets that cannot be filled count, as in transformers.
            unindexed: name and file of each tensor that is in the checkpoint's files and not in its index. The missing
                tensors may be among them.
            do: further advice.
            in_files: names of the tensors of the checkpoint, even if the caller leaves some out. None: the tensors are
                not those of files.
            model_is_built: whether the model was built from the checkpoint's ``config.json``.

        Raises:
            NameProblems: there is a problem; the message lists all problems.
        """
        if not strict and not self.failed:
            return
        explained = {name for name, _ in self.incomplete}
        mismatched = [item for item in self.mismatched if item[0] not in explained]
        failed = [item for item in self.failed if item[0] not in explained]
        parts = [
            ("missing: nothing in the checkpoint provides", self.missing),
            ("unexpected: the model has no parameter for", self.unexpected),
            (
                "incomplete: parts of a merged parameter are absent",
                [_named(n, p) for n, p in self.incomplete],
            ),
            ("wrong shape", [f"{n}: expected {list(e)}, found {list(f)}" for n, f, e in mismatched]),
            (
                "ignored, because the index does not list them for these files",
                [f"{name} in {file}" for name, file in unindexed if self.missing or self.incomplete],
            ),
            ("provided twice", [_named(n, p) for n, p in self.duplicated]),
            ("cannot be converted", [f"{n}: {reason}" for n, reason in failed]),
        ]
        sections = [f"  {title} ({len(items)}):\n{listing(items)}" for title, items in parts if items]
        if sections:
            numbers = self._numbers_of_experts()
            if numbers is not None:
                stated = "config.json states" if model_is_built else "the model has"
                sources = "tensors" if in_files is None else "files"
                sections.insert(0, f"  {stated} {numbers[0]} experts, the {sources} have {numbers[1]}")
            advice: list[Advice] = ["check that config and checkpoint belong together", *do]
            absent = {part for _, parts in self.incomplete for part in parts}
            holds_some_experts = bool(mismatched) and all(_is_part_of_experts(*item) for item in mismatched)
            if holds_some_experts:
                advice[0] = (
                    "if each rank has tensors of its own experts, wrap them as DTensors with Shard(0) on the mesh that "
                    "divides the experts; otherwise check that config and checkpoint belong together"
                )
                advice.append("{experts=} names the experts of this rank")
            if unindexed and (self.missing or self.incomplete):
                advice.append("download the index and the files again: they may be of different versions")
            elif absent and in_files is not None and absent.isdisjoint(in_files) and numbers is None:
                advice.append("copy or download the files again: no file has these tensors")
            # A load of the rest would leave the experts unfilled.
            if self.keeps_codes:
                advice.append("{dequantize=True} decodes codes to values")
                advice.append("{rules=[]} keeps codes and scales as stored")
            elif not (self.failed or self.incomplete or self.lacks_all_experts or holds_some_experts):
                advice.append("{strict=False} loads what fits, as transformers does")
            raise NameProblems(
                Message("\n".join([f"checkpoint and model do not fit together: {where}", *sections]), advice),
                missing=self.missing,
                unexpected=self.unexpected,
                mismatched=self.mismatched,
                duplicated=self.duplicated,
                incomplete=self.incomplete,
            )

    def _numbers_of_experts(self) -> tuple[int, int] | None:
        """Return the numbers of experts of the model and of the checkpoint if that is where they disagree, else None.

        Both the experts and a router must differ, and each of them by the same two numbers.
        """
        experts, others = set(), set()
        for name, found, expected in self.mismatched:
            if found and expected and found[0] != expected[0] and found[1:] == expected[1:]:
                (experts if ".experts." in f".{name}" else others).add((expected[0], found[0]))
        return next(iter(experts)) if len(experts) == 1 and experts <= others else None


def _is_part_of_experts(name: str, stored: Sequence[int], own: Sequence[int]) -> bool:
    """Return whether a model has fewer of the grouped experts than a checkpoint, and otherwise the same shape."""
    same_otherwise = len(own) > 0 and tuple(own[1:]) == tuple(stored[1:])
    return holds_grouped_experts(name) and same_otherwise and 0 < own[0] < stored[0]


def _named(name: str, parts: Sequence[str]) -> str:
    shown = ", ".join(parts[:4]) + (f", ... {len(parts) - 4} more" if len(parts) > 4 else "")
    return f"{name}: {shown}"
