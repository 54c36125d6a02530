"""The whole of the measurements on one GPU: ``python -m benchmarks.gpu``.

Needs torch, triton, transformers, safetensors, numpy, pytest and hypothesis; nothing else, and no network.
"""
