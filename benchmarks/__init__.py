"""Benchmarks: ``python -m benchmarks.planning``, ``.loading``, ``.demo``."""
