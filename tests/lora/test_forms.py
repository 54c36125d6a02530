"""Tests of the names of forms."""

import pytest

from automodel_conv.errors import UnsupportedError
from automodel_conv.lora.forms import FORMS, checked_form


def test_names_of_forms_are_returned():
    assert [checked_form(form) for form in FORMS] == list(FORMS) == ["per_expert", "transformers", "vllm"]


@pytest.mark.parametrize(
    ("name", "similar"),
    [("per-expert", "per_expert"), ("Transformer", "transformers"), ("vLLM", "vllm"), ("perexpert", "per_expert")],
)
def test_similar_name_is_suggested(name, similar):
    with pytest.raises(UnsupportedError, match=f"{name}(.|\n)*per_expert.*transformers.*vllm(.|\n)*write '{similar}'"):
        checked_form(name)


@pytest.mark.parametrize("name", ["nemo", "", None, 3])
def test_other_names_are_refused_without_a_suggestion(name):
    with pytest.raises(UnsupportedError, match=r"unknown form") as caught:
        checked_form(name)
    assert "write" not in str(caught.value)
