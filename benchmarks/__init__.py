"""Benchmarks: ``python -m benchmarks.planning``, ``.loading``, ``.dequant``, ``.gpu``, ``.demo``, and others."""
