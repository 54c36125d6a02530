"""A stand-in for vLLM 0.33: only what a load format uses of it, by the same names."""

__version__ = "0.33.0"
