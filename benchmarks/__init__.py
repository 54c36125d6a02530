"""Benchmarks: ``python -m benchmarks.planning``, ``.peers``, ``.dequant``, ``.gpu``, ``.demo``, and others."""
