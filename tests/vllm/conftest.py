"""Tests of vLLM's own models, which `make test-vllm` runs; without vLLM nothing is collected here."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["*"]
