"""Models on the meta device, and the names of their checkpoints."""

import re

import pytest
import torch

try:
    import transformers
    from transformers import AutoConfig
    from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
except ModuleNotFoundError:
    transformers = None

DEPTHS = (
    "num_hidden_layers num_layers n_layers n_layer depth encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers vt_num_hidden_layers"
).split()

EXPERT_COUNTS = "num_experts num_local_experts n_routed_experts moe_num_experts".split()


def read_first_match(key, mapping):
    """Rename a key as the published consumers of a mapping do: the first match wins."""
    if mapping is None:
        return key
    if callable(mapping):
        return mapping(key)
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def shrink(config):
    """Shrink a config to two layers and four experts: fewer names of the same kinds."""
    for names, most in ((DEPTHS, 2), (EXPERT_COUNTS, 4)):
        for name in names:
            if isinstance(getattr(config, name, None), int) and getattr(config, name) > most:
                setattr(config, name, most)
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict"):
            shrink(value)
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[:2])
    return config


def meta_model(model_type, **kwargs):
    """Return a small model of the type on the meta device; errors of its classes are raised unchanged."""
    tables = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "PRETRAINING")
    for table in (*(f"MODEL_FOR_{table}_MAPPING_NAMES" for table in tables), "MODEL_MAPPING_NAMES"):
        entry = getattr(modeling_auto, table).get(model_type)
        if entry:
            break
    else:
        raise LookupError(f"no auto class builds {model_type}")
    cls = getattr(transformers, entry if isinstance(entry, str) else entry[0])
    config = shrink(AutoConfig.for_model(model_type, **kwargs))
    with torch.device("meta"):
        return cls(config)


def buildable_meta_model(model_type, **kwargs):
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    try:
        return meta_model(model_type, **kwargs)
    except ImportError as error:
        pytest.skip(f"{model_type} needs an optional package: {error}")


def checkpoint_names(model):
    """Return every original checkpoint name in loading order -> its model name, or None if converted."""
    state_dict = dict(model.state_dict())
    owner = {id(tensor): name for name, tensor in state_dict.items()}
    original = revert_weight_conversion(model, state_dict)
    return {name: owner.get(id(original[name])) for name in sorted(original, key=dot_natural_key)}
