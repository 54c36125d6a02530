"""Slabs of output files whose bytes come from the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod

from automodel_conv.execution.adding import Additions
from automodel_conv.execution.reading import OpenFiles
from automodel_conv.execution.writing import ScratchSplit, SlabGroup, SlabProducer, SourceFileProducer, jobs_by_slab
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode, Target
from automodel_conv.schedule.writes import slab_schedule


class FileSlabs:
    """The slabs that fill the targets of output files from the tensors of a checkpoint.

    Args:
        checkpoint: the checkpoint to read.
        targets: the targets to write. Their sources are the checkpoint's rows.
        places: output file and offset of each target; see ``slab_schedule``.
        decodes: how to decode the quantized tensors of the checkpoint, by row.
        share: the scratch of each thread.
        additions: deltas that are added to the targets, if any.

    Attributes:
        by_file: the slabs by the number of their output file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Sequence[Target],
        places: Sequence[tuple[int, int]],
        decodes: Mapping[int, Decode],
        share: ScratchSplit,
        additions: Additions | None = None,
    ):
        pairs = [pair for pair in zip(targets, places, strict=True) if prod(pair[0].shape)]
        targets, places = [target for target, _ in pairs], [place for _, place in pairs]
        copies = [target.copies for target in targets]
        schedule = slab_schedule(targets, copies, checkpoint, places, decodes, most_bytes=share.slab_bytes)
        self.by_file = schedule.by_file()
        self._checkpoint, self._decodes, self._share = checkpoint, decodes, share
        self._additions = additions
        self._dtypes = schedule.dtypes

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slabs in self.by_file.values() for slab in slabs)

    @contextmanager
    def opened(self, file: int) -> Iterator[SlabGroup]:
        """Yield the slabs of one output file.

        The files of the checkpoint are closed at the end of the ``with`` block.
        """
        slabs, share = self.by_file.get(file, []), self._share
        jobs = jobs_by_slab(slabs, self._checkpoint, self._decodes, share.input_bytes)
        files = OpenFiles(self._checkpoint, chain.from_iterable(jobs.values()))

        def start() -> SlabProducer:
            return SourceFileProducer(self._checkpoint, files, jobs, self._dtypes, share.slab_bytes, share.input_bytes)

        try:
            producers = start if self._additions is None else self._additions.added(start)
            yield SlabGroup(slabs, producers, files.abort)
        finally:
            files.close()
