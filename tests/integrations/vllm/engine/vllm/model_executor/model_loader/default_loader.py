import os
from dataclasses import dataclass
from glob import glob

import torch
from safetensors.torch import load_file

from vllm.model_executor.model_loader.base_loader import BaseModelLoader


class DefaultModelLoader(BaseModelLoader):
    @dataclass
    class Source:
        model_or_path: str
        revision: str | None
        subfolder: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list[str] | None = None

    def __init__(self, load_config):
        super().__init__(load_config)
        assert load_config.load_format == "auto"
        self.enable_weights_track = load_config.model_loader_extra_config.get("enable_weights_track")
        self.loads = 0

    def _prepare_weights(self, model_or_path, subfolder, revision, fall_back_to_pt, patterns):
        folder = os.path.join(model_or_path, subfolder or "")
        paths = [path for pattern in patterns or ["*.safetensors"] for path in glob(os.path.join(folder, pattern))]
        return folder, paths or glob(os.path.join(folder, "*.bin")), bool(paths), ""

    def download_model(self, model_config):
        self._prepare_weights(model_config.model, None, None, True, None)

    def get_all_weights(self, model_config, model):
        sources = [self.Source(model_config.model, None), *getattr(model, "secondary_weights", ())]
        for one in sources:
            _, paths, is_safetensors, _ = self._prepare_weights(one.model_or_path, one.subfolder, None, True, None)
            for path in sorted(paths):
                for name, tensor in (load_file(path) if is_safetensors else torch.load(path)).items():
                    yield one.prefix + name, tensor

    def load_weights(self, model, model_config):
        self.loads += 1
        model.load_weights(self.get_all_weights(model_config, model))

    def track_weights_loading(self, model, loaded_weights, quantized=False):
        missing = {name for name, _ in model.named_parameters()} - (loaded_weights or set())
        if missing:
            raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")
