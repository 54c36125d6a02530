"""All measurements on one GPU: ``python -m benchmarks.gpu``.

They need only torch, triton, transformers, safetensors, numpy, pytest and hypothesis, and no network.
"""
