"""Tests of matching codes to their parts by name; ``test_quantization.py`` has every way in which parts are wrong."""

from automodel_conv.planning.code_matcher import CodeMatcher
from automodel_conv.planning.copies import SourceTable
from automodel_conv.planning.methods.table import method_of

CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def matcher(**tensors):
    """Return the matcher of tensors after it has matched all of them, given dtypes and shapes by name."""
    dtypes, shapes = zip(*tensors.values(), strict=True) if tensors else ((), ())
    method = method_of(CONFIG)
    matched = CodeMatcher(SourceTable(list(tensors), dtypes, shapes), method, method.schemes(CONFIG), False)
    matched.match_all()
    return matched


def test_codes_and_their_scales_are_matched_in_any_order():
    matched = matcher(weight_scale_inv=("F32", (2, 1)), norm=("BF16", (4,)), weight=("F8_E4M3", (256, 128)))
    assert not matched.problems
    assert matched.decodes.keys() == {2}
    assert matched.decoded().hidden == {0}


def test_part_of_a_weight_with_a_problem_has_no_further_problem():
    matched = matcher(
        a=("F8_E4M3", (256, 128)), a_scale=("F32", (3, 3)), b=("F8_E4M3", (256, 128)), c_scale_inv=("F32", (1, 1))
    )
    assert matched.problems.texts() == [
        "a_scale of a [256, 128]: expected [2, 1], found [3, 3]",
        "b has no scale: no tensor is named b_scale_inv or b_scale",
        "c_scale_inv is a scale without codes: no tensor is named c",
    ]


def test_empty_table_and_empty_names_have_no_codes():
    assert matcher().decoded().decodes == {}
    matched = matcher(**{"": ("BF16", (4, 4)), "_scale": ("F32", ()), ".scale": ("F32", ())})
    assert matched.decoded().decodes == {}
