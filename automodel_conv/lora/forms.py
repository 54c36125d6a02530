"""The forms of an adapter for experts."""

from __future__ import annotations

import difflib

from automodel_conv.errors import UnsupportedError, message

PER_EXPERT = "per_expert"
"""Two matrices for each published tensor, such as ``experts.3.gate_proj``."""
TRANSFORMERS = "transformers"
"""Two matrices for each parameter of transformers' model, as PEFT writes them with ``target_parameters``."""
VLLM = "vllm"
"""The stacks of ``TRANSFORMERS``, with published names, for vLLM's ``is_3d_lora_weight``."""

FORMS = (PER_EXPERT, TRANSFORMERS, VLLM)


# Names by which vLLM looks up rank and alpha of the inner and of the outer stack of a module with two.
# Source: vLLM 0.33.0, ``get_rank_and_scaling`` in ``lora/peft_helper.py``.
_NAMES_IN_VLLM = ("down_proj", "gate_up_proj")


def stated_in_vllm(path: str, parameter: str, depth: int, wrappers: int) -> str:
    """Return the name by which the config of vLLM's form states rank and alpha of a stack.

    Args:
        path: path of the module with the stack, as published.
        parameter: name of the parameter in the model.
        depth: number of wrappers around that of the stack.
        wrappers: number of stacks of the module that an adapter belongs to.
    """
    return f"{path}.{_NAMES_IN_VLLM[depth] if wrappers == len(_NAMES_IN_VLLM) else parameter}"


def checked_form(name: str) -> str:
    """Return the name of a form.

    Raises:
        UnsupportedError: there is no such form.
    """
    if name in FORMS:
        return name
    similar = difflib.get_close_matches(str(name).lower().replace("-", "_"), FORMS, 1)
    do = f"write {similar[0]!r}" if similar else None
    raise UnsupportedError(message(f"unknown form of an adapter {name!r}", expected=f"one of {list(FORMS)}", do=do))
