"""Schedules: which bytes are read, copied and written together; pure functions of integers.

A schedule turns the copies of a plan into units of work for ``execution/``:

- ``host``: a load to host memory, as jobs.
- ``device``: a load to a GPU, as chunks to read and windows to empty.
- ``writes``: the writing of output files, as slabs.

``decoding`` is the part of ``host`` for quantized sources. ``code_windows``, ``code_slabs`` and ``code_rectangles`` are
that of ``device``. ``cutting`` cuts sources into ranges that fit into memory. ``jobs`` has the types that all share.
"""
