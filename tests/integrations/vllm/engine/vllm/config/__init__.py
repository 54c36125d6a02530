from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class LoadConfig:
    load_format: str = "auto"
    model_loader_extra_config: object = field(default_factory=dict)
    use_tqdm_on_load: bool = False
    download_dir: str | None = None


@dataclass
class ModelConfig:
    model: str
    revision: str | None = None
    quantization: str | None = None
    tokenizer: str = ""
    model_weights: str = ""
    hf_token: bool | str | None = None


@dataclass
class VllmConfig:
    model_config: ModelConfig
    load_config: LoadConfig
    settings: str = ""


_current = []


@contextmanager
def set_current_vllm_config(config):
    _current.append(config)
    yield
    _current.pop()


def get_current_vllm_config_or_none():
    return _current[-1] if _current else None
