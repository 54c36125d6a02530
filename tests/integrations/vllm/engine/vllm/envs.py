import os

VLLM_CACHE_ROOT = "cache-of-vllm"
VLLM_USE_MODELSCOPE = False


def compile_factors():
    return {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
