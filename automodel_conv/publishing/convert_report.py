"""``ConvertReport``, the outcome of a conversion from files to files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from automodel_conv.errors import count_of
from automodel_conv.execution.report_text import Report, Row, cost_rows, count_row, memory_row, phase_rows


@dataclass(frozen=True, repr=False)
class ConvertReport(Report):
    """The outcome of ``convert_checkpoint``; ``print`` shows it.

    Attributes:
        files: names of the weight files.
        bytes_written: bytes of the weight files that this call wrote, without those of files that an earlier call had
            finished.
        files_resumed: number of files that an earlier call had finished.
        carried: names of the tensors of the source that the model has no place for, written unchanged.
        left_out: names of source tensors that nothing uses: dropped, unindexed, or, if codes are decoded, activation
            scales.
        unindexed: name and file of each tensor that was not read because the index of the source does not map it to
            that file.
        files_copied: paths of the files next to the weights that were copied, sorted, with "/" between folders.
        seconds: duration of the call.
        phases: seconds of each phase: "plan" (with imports), "write", "verify", and "finish" (checksums, uploads that
            were waited for, other files). Together they are ``seconds``.
        peak_extra_bytes: bound of the memory used.
        was_complete: whether the destination was complete already: it was compared with the source, and nothing was
            written.
        kept_codes: names of the tensors that were written as codes, with their scales: ``dtype`` does not cast them,
            and ``dequantize`` decodes them.
        adapted: names of the tensors that an adapter changed, if ``merge_adapter`` returned the report.

    Example:
        >>> import torch
        >>> from automodel_conv import convert_checkpoint
        >>> from safetensors.torch import save_file
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as source, TemporaryDirectory() as destination:
        ...     save_file({"a": torch.ones(2, 3)}, f"{source}/model.safetensors")
        ...     first = convert_checkpoint(source, destination, rules=[])
        ...     second = convert_checkpoint(source, destination, rules=[])
        >>> first.files, first.was_complete, second.was_complete, second.bytes_written
        (('model.safetensors',), False, True, 0)
    """

    files: tuple[str, ...]
    bytes_written: int
    files_resumed: int
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    unindexed: tuple[tuple[str, str], ...]
    files_copied: tuple[str, ...]
    seconds: float
    peak_extra_bytes: int
    was_complete: bool = False
    kept_codes: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes written per second of the write phase."""
        return self.bytes_written / 1e9 / max(self.phases.get("write", self.seconds), 1e-9)

    def _rows(self) -> list[Row]:
        return converted_rows(self)


def converted_rows(report: ConvertReport) -> list[Row]:
    """Return the rows of the report of a conversion; those of rare cases only if they apply."""
    complete = Row("complete already", "compared with the source; nothing was written")
    kept_codes = count_row("kept as codes", report.kept_codes)
    unindexed = count_row("unindexed", [f"{name} of {file}" for name, file in report.unindexed])
    return [
        *([complete] if report.was_complete else []),
        Row("files", str(len(report.files))),
        Row("finished by an earlier call", str(report.files_resumed)),
        *cost_rows("written", report.bytes_written, report.gb_per_s),
        Row("seconds", f"{report.seconds:.3f}"),
        *phase_rows(report.phases),
        memory_row(report.peak_extra_bytes),
        *([count_row("changed by the adapter", report.adapted)] if report.adapted else []),
        count_row("carried as they are", report.carried),
        count_row("left out", report.left_out),
        *([unindexed] if unindexed.names else []),
        *([kept_codes] if kept_codes.names else []),
        Row("other files copied", count_of(len(report.files_copied), "file")),
    ]
