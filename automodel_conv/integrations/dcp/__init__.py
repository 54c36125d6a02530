"""A reader and a writer for torch.distributed.checkpoint, between per-expert files and grouped, sharded models.

    dcp.load(state_dict, storage_reader=HuggingFaceReader(path))
    dcp.save(state_dict, storage_writer=HuggingFaceWriter(directory, model))

They replace ``dcp.HuggingFaceStorageReader`` and ``HuggingFaceStorageWriter`` in existing code. Each rank reads and
writes only the bytes of its own shards. Source of the protocol: torch 2.13.0,
``torch/distributed/checkpoint/storage.py``.
"""

from automodel_conv.integrations.dcp.reader import HuggingFaceReader
from automodel_conv.integrations.dcp.writer import HuggingFaceWriter

__all__ = ["HuggingFaceReader", "HuggingFaceWriter"]
