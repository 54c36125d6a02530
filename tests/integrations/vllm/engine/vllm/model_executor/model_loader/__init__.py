from vllm.model_executor.model_loader.base_loader import BaseModelLoader as BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

LOADERS = {"auto": DefaultModelLoader}


def register_model_loader(load_format):
    def register(cls):
        LOADERS[load_format] = cls
        return cls

    return register


def get_model_loader(load_config):
    return LOADERS[load_config.load_format](load_config)
