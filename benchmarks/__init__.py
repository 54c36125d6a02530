"""Benchmarks: ``python -m benchmarks.planning``, ``.loading``, ``.gpu``, ``.demo``; ``bench_verbs.py`` is pytest's."""
