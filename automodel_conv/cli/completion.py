"""The words that shells complete: values of options, known without torch.

typer writes the scripts of bash, zsh and fish, and keeps the words that begin with what was typed.
"""

from __future__ import annotations

from pathlib import Path

from automodel_conv.lora.forms import FORMS
from automodel_conv.planning.layouts import LAYOUTS, PER_EXPERT
from automodel_conv.recipes import RECIPES

DTYPES = ("bfloat16", "float16", "float32", "float64", "auto")
"""The dtypes that tensors can be cast to, by torch's names, and "auto"."""


def layouts() -> list[str]:
    """Return the layouts of grouped experts."""
    return list(LAYOUTS)


def new_layouts() -> list[str]:
    """Return the layouts that a file can have: those of grouped experts, and the published form."""
    return [*LAYOUTS, PER_EXPERT]


def forms() -> list[str]:
    """Return the forms of an adapter."""
    return list(FORMS)


def recipes() -> list[str]:
    """Return the names of the recipes."""
    return sorted(RECIPES)


def dtypes() -> list[str]:
    """Return the dtypes that tensors can be cast to."""
    return list(DTYPES)


def devices() -> list[str]:
    """Return the CPU and the GPUs of this machine.

    Source: the NVIDIA driver names its GPUs ``/dev/nvidia0`` and so on (README.txt of the driver, chapter 8).
    """
    numbers = [name for path in Path("/dev").glob("nvidia*") if (name := path.name.removeprefix("nvidia")).isdecimal()]
    return ["cpu", *(f"cuda:{number}" for number in sorted(numbers, key=int))]
