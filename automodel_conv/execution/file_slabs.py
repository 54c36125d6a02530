"""From the files of a checkpoint to slabs: what is written to new files, or compared with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod

from automodel_conv.execution.reading import OpenFiles
from automodel_conv.execution.writing import ScratchSplit, SlabProducer, SourceFileProducer, jobs_by_slab
from automodel_conv.files.checkpoint import Checkpoint
from automodel_conv.planning.copies import Decode, Target
from automodel_conv.schedule.writes import Slab, slab_schedule


class FileSlabs:
    """Slabs that make targets of the tensors of a checkpoint, by the number of the output file.

    Args:
        places: of each target, see ``slab_schedule``.
        decodes: of the checkpoint's tensors that are quantized, by row.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Sequence[Target],
        places: Sequence[tuple[int, int]],
        decodes: Mapping[int, Decode],
        share: ScratchSplit,
    ):
        pairs = [pair for pair in zip(targets, places, strict=True) if prod(pair[0].shape)]
        targets, places = [target for target, _ in pairs], [place for _, place in pairs]
        copies = [target.copies for target in targets]
        made = slab_schedule(targets, copies, checkpoint, places, decodes, most_bytes=share.slab_bytes)
        self.by_file = made.by_file()
        self._checkpoint, self._decodes, self._share = checkpoint, decodes, share
        self._dtypes = made.dtypes

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slabs in self.by_file.values() for slab in slabs)

    @contextmanager
    def opened(self, file: int) -> Iterator[tuple[Sequence[Slab], Callable[[], SlabProducer]]]:
        """The slabs of an output file, and what starts their maker in a thread; the block's end closes the sources."""
        slabs, share = self.by_file.get(file, []), self._share
        jobs = jobs_by_slab(slabs, self._checkpoint, self._decodes, share.input_bytes)
        files = OpenFiles(self._checkpoint, (job.reads for job in chain.from_iterable(jobs.values())))

        def start() -> SlabProducer:
            return SourceFileProducer(self._checkpoint, files, jobs, self._dtypes, share.slab_bytes, share.input_bytes)

        try:
            yield slabs, start
        finally:
            files.close()
