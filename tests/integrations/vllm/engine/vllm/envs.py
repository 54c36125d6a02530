import os

VLLM_CACHE_ROOT = "cache-of-vllm"


def compile_factors():
    return {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
