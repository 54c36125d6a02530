"""Run transformers' common tests of a model class without and under the hook; the last line is the outcome as JSON.

python -m tests.packaging.upstream_common, with ``upstream.test_modeling_common`` importable.
"""

from __future__ import annotations

import json
import unittest

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

import automodel_conv as amc
from tests.model_zoo import small_config

# All tests that load and are quick; those that a release does not have are left out.
TESTS = """save_load load_contiguous_weights can_init_all_missing_weights correct_missing_keys tied_weights_keys
base_model_prefix_loads_base_weights load_save_without_tied_weights model_weights_reload_no_missing_tied_weights
load_with_mismatched_shapes can_load_ignoring_mismatched_shapes can_load_with_device_context_manager
can_load_with_global_device_set cannot_load_with_meta_device_context_manager reverse_loading_mapping
can_load_from_already_mapped_keys disk_offload_bin disk_offload_safetensors cpu_offload""".split()


class Inputs:
    """The inputs of transformers' model tests: a small config and arguments."""

    is_training, batch_size, seq_length = True, 2, 7

    def __init__(self, config_class):
        self.config_class = config_class

    def prepare_config_and_inputs_for_common(self):
        tokens = torch.arange(self.batch_size * self.seq_length).reshape(self.batch_size, self.seq_length)
        return small_config(self.config_class), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def cases(model_type: str) -> type[unittest.TestCase]:
    from upstream.test_modeling_common import ModelTesterMixin  # from the source distribution

    config_class = CONFIG_MAPPING[model_type]

    class Case(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (MODEL_MAPPING[config_class], MODEL_FOR_CAUSAL_LM_MAPPING[config_class])
        all_generative_model_classes = ()

        def setUp(self):
            self.model_tester = Inputs(config_class)

    return Case


def outcome(case: unittest.TestCase) -> str:
    result = unittest.TestResult()
    case.run(result)
    wrong = [text for _, text in (*result.failures, *result.errors)]
    return wrong[0] if wrong else "skipped" if result.skipped else "passed"


def main() -> None:
    outcomes = {}
    for model_type in ("mixtral", "qwen3_moe"):
        case = cases(model_type)
        for name in TESTS:
            if hasattr(case, f"test_{name}"):
                stock = outcome(case(f"test_{name}"))
                with amc.accelerate_transformers() as acceleration:
                    hooked = outcome(case(f"test_{name}"))
                lowered = sum(len(load.lowered) for load in acceleration.loads)
                left = sum(len(load.left) for load in acceleration.loads)
                outcomes[f"{model_type} {name}"] = {"stock": stock, "hooked": hooked, "lowered": lowered, "left": left}
    print()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
