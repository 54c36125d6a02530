"""Benchmarks: ``python -m benchmarks.planning``, ``.loading``, ``.dequant``, ``.gpu``, ``.demo``.

``bench_verbs.py`` is pytest's.
"""
