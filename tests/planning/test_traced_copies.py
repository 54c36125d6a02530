"""Tests of traced copies: loading code that is traced and executed does what it does when it is run."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from automodel_conv.planning.boxes import Piece, contiguous_strides, run_of
from automodel_conv.planning.loader_trace import LoaderTrace
from automodel_conv.planning.loader_writes import Computed, Constant, View, Write
from automodel_conv.planning.origins import Read, Unknown, cast, constant, reinterpreted
from automodel_conv.planning.traced_copies import Composer, Filled
from tests.planning.random_loaders import COMPUTING, OVERLAPPING, STEPS, addressed, loaders, loaders_of, tensors_named
from tests.planning.simulated_writes import NBYTES, Storages, random_view, random_write

SEEDS = 150


def traced(load, sources, targets):
    """Trace loading code; return what fills each target and each tensor that it returns."""
    without_data = {name: torch.empty_like(tensor, device="meta") for name, tensor in sources.items()}
    before = {name: tensor.clone() for name, tensor in targets.items()}
    trace = LoaderTrace(targets.values())
    rows = {trace.keep(tensor).storage: (row, tensor.dtype) for row, tensor in enumerate(without_data.values())}
    with trace:
        made = load(without_data, targets)
    for name, tensor in targets.items():
        assert torch.equal(tensor, before[name]), "a target was changed"
    composer = Composer(trace.nbytes, rows)
    for write in trace.writes:
        composer.write(write)
    return {name: composer.filled(trace.keep(tensor)) for name, tensor in {**targets, **made}.items()}


def executed(filled: Filled, sources: list[Tensor], like: Tensor) -> Tensor:
    """Return what copies and constants write, one element at a time; every element must be written once."""
    result = torch.zeros(like.numel(), dtype=like.dtype)
    writes = torch.zeros(like.numel(), dtype=torch.int)
    for read, piece in filled.reads:
        stored = sources[read.row].contiguous().view(-1).view(torch.uint8)
        flat = stored[: len(stored) // read.stored.itemsize * read.stored.itemsize].view(read.stored)
        for index in itertools.product(*map(range, piece.box.shape)):
            at = piece.target_offset + sum(i * s for i, s in zip(index, piece.box.target_strides, strict=True))
            source = piece.source_offset + sum(i * s for i, s in zip(index, piece.box.source_strides, strict=True))
            result[at] = flat[source].to(read.value)
            writes[at] += 1
    for number, piece in filled.numbers:
        for index in itertools.product(*map(range, piece.box.shape)):
            at = piece.target_offset + sum(i * s for i, s in zip(index, piece.box.target_strides, strict=True))
            result[at] = number
            writes[at] += 1
    assert (writes == 1).all()
    return result.reshape(like.shape)


def zeros(number: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def bits(tensor: Tensor) -> list[int]:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


@given(
    load=loaders,
    sources=tensors_named("source ", addressed),
    targets=st.one_of(
        st.just({}), tensors_named("target ", lambda number, shape, dtype: torch.zeros(shape, dtype=dtype))
    ),
)
def test_traced_and_executed_equals_run(load, sources, targets):
    filled = traced(load, sources, targets)
    real = {name: tensor.clone() for name, tensor in targets.items()}
    real |= load({name: tensor.clone() for name, tensor in sources.items()}, real)
    assert filled.keys() == real.keys()
    for name, content in filled.items():
        if content.unknown is None and content.is_written:
            assert bits(executed(content, list(sources.values()), real[name])) == bits(real[name]), name
        elif content.unknown is None and name in targets:
            assert bits(real[name]) == bits(targets[name]), "a write is not seen"


INTO = {
    "cat": lambda a, b, out: torch.cat([a, b], 1, out=out.view(2, 6)),
    "stack": lambda a, b, out: torch.stack([a, b], 1, out=out.view(2, 2, 3)),
    "stack, with other strides": lambda a, b, out: torch.stack([a, b], out=out.view(3, 2, 2).permute(1, 2, 0)),
    "cat and stack, into views": lambda a, b, out: (
        torch.cat([a[0], b[0]], out=out[6:]),
        torch.stack([a[1], b[1]], out=out[:6].view(2, 3)),
    ),
    "index_select": lambda a, b, out: torch.index_select(a, 1, torch.tensor([2, 0, 1, 1, 0, 2]), out=out.view(2, 6)),
    "cat, of constants": lambda a, b, out: torch.cat([torch.zeros(2, 3), a], out=out.view(4, 3)),
}


@pytest.mark.parametrize("is_target", [True, False], ids=["target", "temporary"])
@pytest.mark.parametrize("name", INTO)
def test_what_an_operation_writes_to_out_is_moved(name, is_target):
    dtype = torch.float32 if name == "index_select" else torch.float64  # torch refuses a cast there

    def load(sources, targets):
        out = targets["out"] if is_target else torch.empty(12, dtype=dtype)
        INTO[name](*sources.values(), out)
        return {} if is_target else {"out": out}

    sources = {key: addressed(number, torch.Size((2, 3)), torch.float32) for number, key in enumerate("ab")}
    expected = torch.zeros(12, dtype=dtype)
    INTO[name](*sources.values(), expected)
    filled = traced(load, sources, {"out": torch.zeros(12, dtype=dtype)} if is_target else {})["out"]
    assert filled.unknown is None, filled.unknown
    assert bits(executed(filled, list(sources.values()), expected)) == bits(expected)


def test_a_constant_is_written_to_out():
    def load(sources, targets):
        torch.full((4, 3), 7, out=targets["out"])
        torch.stack([sources["a"], sources["a"]], out=targets["out"][1:3])
        return {}

    sources = {"a": addressed(0, torch.Size((3,)), torch.float32)}
    real = {"out": torch.zeros(4, 3)}
    load(sources, real)
    filled = traced(load, sources, {"out": torch.zeros(4, 3)})["out"]
    assert bits(executed(filled, list(sources.values()), real["out"])) == bits(real["out"])


def composed(load, **shapes):
    """Trace loading code that fills tensors; return the composer, and a view of each tensor by name."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    trace = LoaderTrace(tensors.values())
    rows = {trace.keep(tensor).storage: (row, tensor.dtype) for row, tensor in enumerate([tensors["source"]])}
    with trace:
        load(**tensors)
    composer = Composer(trace.nbytes, rows)
    for write in trace.writes:
        composer.write(write)
    return composer, {name: trace.keep(tensor) for name, tensor in tensors.items()}


def test_elements_that_are_copied_twice_are_told():
    def load(source, once, twice, halves, apart):
        once.copy_(source)
        for _ in range(2):
            twice.copy_(source)
        halves[:2].copy_(source[:2])
        halves[2:].copy_(source[2:])
        apart[::2].copy_(source[::2])
        apart[1::2].copy_(source[1::2])

    composer, views = composed(load, source=(4, 3), once=(4, 3), twice=(4, 3), halves=(4, 3), apart=(4, 3))
    assert [name for name, view in views.items() if composer.is_rewritten(view)] == ["twice"]


def test_constants_may_be_written_over():
    def load(source, padded, zeroed):
        padded.zero_()
        padded[:4].copy_(source)
        zeroed.copy_(source)
        zeroed[1].zero_()

    composer, views = composed(load, source=(4, 3), padded=(6, 3), zeroed=(4, 3))
    assert [name for name, view in views.items() if composer.is_rewritten(view)] == ["zeroed"]


def test_of_tensors_in_one_storage_only_the_one_written_twice_is_told():
    def load(source, flat):
        for _ in range(2):
            flat[2:5].copy_(source)
        flat[5:8].copy_(source)

    composer, views = composed(load, source=(3,), flat=(9,))
    flat = views["flat"]
    parts = [flat._replace(offset=start, shape=(3,)) for start in (0, 2, 5)]
    assert [composer.is_rewritten(part) for part in parts] == [True, True, False]


def test_storages_behind_a_computation_are_found_through_temporaries():
    def load(source, scale, base, computed, other):
        base.copy_(source)
        computed.copy_((base.clone() * scale).to(torch.float32))
        other.copy_(source)

    composer, views = composed(load, source=(3,), scale=(3,), base=(3,), computed=(3,), other=(3,))
    behind = composer.storages_behind([views["computed"].storage])
    assert {name for name, view in views.items() if view.storage in behind} == {"source", "scale", "base", "computed"}


CONSTANTS = {
    "negative zero": lambda a: (a.new_zeros(2, 3), a.new_full((2, 3), -0.0)),
    "cast": lambda a: (torch.full((2, 3), 300.0), torch.full((2, 3), -1.5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_those_of_the_code(name, dtype):
    def load(sources, targets):
        made = {}
        for number, values in enumerate(CONSTANTS[name](sources["a"])):
            made[f"padded {number}"] = sources["a"].new_empty((3, 3), dtype=dtype)
            made[f"padded {number}"][:1].copy_(sources["a"])
            made[f"padded {number}"][1:].copy_(values)
            made[f"padded {number}"][2:].fill_(values[0, 0])
        return made

    sources = {"a": addressed(0, torch.Size((1, 3)), torch.float32)}
    filled = traced(load, sources, {})
    for made, real in load(sources, {}).items():
        if filled[made].unknown is None:
            assert bits(executed(filled[made], list(sources.values()), real)) == bits(real), made
        else:
            assert filled[made].unknown.reason.startswith("casts ")
            assert not dtype.is_floating_point


VIEWS = {
    "conjugate": lambda a: torch.view_as_complex(a).conj().resolve_conj(),
    "imaginary part of a conjugate": lambda a: torch.view_as_complex(a).conj().imag.clone(),
    "written to a negative view": lambda a: torch._neg_view(torch._neg_view(torch.zeros_like(a)).copy_(a)).clone(),
    "constant, written to a negative view": lambda a: torch._neg_view(torch._neg_view(a.clone()).fill_(2)).clone(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_negatives_and_conjugates_are_computed(name):
    sources = {"a": addressed(0, torch.Size((3, 2)), torch.float32)}
    filled = traced(lambda sources, targets: {"x": VIEWS[name](sources["a"])}, sources, {})["x"]
    assert filled.unknown is not None
    assert filled.unknown.rows == ({0} if "constant" not in name else set())


RAW = {dtype: (dtype,) for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32, torch.bfloat16)}
CAST = {
    dtype: (torch.bfloat16, torch.float16, torch.float32, torch.float64) for dtype in (torch.bfloat16, torch.float32)
}


def simulated(seed, dtypes):
    """Compose random writes; return a composer, storages with the same writes, and random views of them."""
    rng = random.Random(seed)
    storages = Storages(sources=2, others=3)
    stored = rng.choice([*dtypes]), rng.choice([*dtypes])
    composer = Composer(dict.fromkeys(storages.keys, NBYTES), dict(enumerate(enumerate(stored))))
    for _ in range(rng.randrange(1, 7)):
        write = random_write(rng, storages, dtypes)
        composer.write(write)
        storages.write(write)
    views = [random_view(rng, key, rng.choice([*dtypes]), repeats=True) for key in storages.keys for _ in range(2)]
    return composer, storages, views


APART = {"parts of elements are apart", "two dimensions walk the same stride #", "views a constant in parts"}
VIEWS_OF_CASTS = {"views #, cast from #, in parts", "views #, cast from #, as #"}


@pytest.mark.parametrize(
    ("dtypes", "reasons", "most"),
    [
        ({torch.float32: (torch.float32,)}, {"two dimensions walk the same stride #"}, 5),
        (RAW, APART, 30),
        (CAST, APART | VIEWS_OF_CASTS, 60),
        (RAW | CAST, APART | VIEWS_OF_CASTS, 60),
    ],
    ids=["moved", "reinterpreted", "cast", "both"],
)
def test_writes_compose_to_what_torch_writes(dtypes, reasons, most):
    given_up = []
    for seed in range(SEEDS):
        composer, storages, views = simulated(seed, dtypes)
        for view in views:
            filled = composer.filled(view)
            origins = [origin for element in storages.origins_of(view) for origin in element]
            if filled.unknown is not None:
                assert filled.unknown.rows >= storages.rows_of(view), (seed, view)
                if all(origin is not None and origin.is_moved for origin in origins):
                    given_up.append(kind_of(filled.unknown))
            elif filled.is_written:
                assert all(origin is not None and origin.is_moved for origin in origins), (seed, view)
                real = storages.tensor(view)
                assert bits(executed(filled, storages.bytes[:2], real)) == bits(real), (seed, view)
                assert {read.row for read, _ in filled.reads} == storages.rows_of(view) == composer.rows(view), seed
            else:
                assert origins == [None] * len(origins), (seed, view)
    assert set(given_up) <= reasons
    assert len(given_up) <= most


def kind_of(unknown: Unknown) -> str:
    """Return a reason without dtypes and numbers."""
    return re.sub(r"torch\.\w+|\d+", "#", unknown.reason)


@given(
    load=loaders_of({*STEPS} - COMPUTING - OVERLAPPING), sources=tensors_named("source ", addressed, [torch.float32])
)
def test_loaders_that_move_are_planned(load, sources):
    filled = traced(load, sources, {"target": torch.zeros(4, 3)})
    assert {kind_of(one.unknown) for one in filled.values() if one.unknown} <= {"writes only # of # elements"}


@given(
    load=loaders_of({*STEPS} - COMPUTING | {"cast", "reinterpreted"}),
    sources=tensors_named("source ", addressed),
)
def test_loaders_without_computations_have_few_reasons(load, sources):
    filled = traced(load, sources, {"target": torch.zeros(4, 3)})
    kinds = {kind_of(one.unknown) for one in filled.values() if one.unknown}
    assert kinds <= APART | VIEWS_OF_CASTS | {
        "casts # to #",
        "casts twice: #, #, #",
        "reads one tensor as two dtypes",
        "writes only # of # elements",
    }


FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ((torch.bfloat16, torch.float32, torch.bfloat16), Read(3, torch.bfloat16, torch.bfloat16)),
        ((torch.bfloat16, torch.float32, torch.float16), Read(3, torch.bfloat16, torch.float16)),
        ((torch.float16, torch.float32, torch.float64), Read(3, torch.float16, torch.float64)),
        ((torch.int16, torch.int32, torch.int16), Read(3, torch.int16, torch.int16)),
        ((torch.int8, torch.int32, torch.int8), Read(3, torch.int8, torch.int8)),
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), Read(3, torch.float8_e4m3fn, torch.float8_e4m3fn)),
        ((torch.float32, torch.bfloat16, torch.bfloat16), Read(3, torch.float32, torch.bfloat16)),
        ((torch.float32, torch.bfloat16, torch.float32), "casts twice: torch.float32, torch.bfloat16, torch.float32"),
        ((torch.bfloat16, torch.float16, torch.float32), "casts twice: torch.bfloat16, torch.float16, torch.float32"),
        ((torch.complex64, torch.complex128), "casts torch.complex64 to torch.complex128"),
        ((torch.complex128, torch.complex32), "casts torch.complex128 to torch.complex32"),
        ((torch.int32, torch.float64, torch.float32), "casts twice: torch.int32, torch.float64, torch.float32"),
        ((torch.uint8, torch.float32), "casts torch.uint8 to torch.float32"),
        ((torch.float8_e4m3fn, torch.float32), "casts torch.float8_e4m3fn to torch.float32"),
        ((torch.complex64, torch.float32), "casts torch.complex64 to torch.float32"),
    ],
)
def test_casts_are_one_cast_or_none(dtypes, result):
    origin = Read(3, dtypes[0], dtypes[0])
    for dtype in dtypes[1:]:
        origin = cast(origin, dtype)
    assert origin == (result if isinstance(result, Read) else Unknown(result, frozenset([3])))


@pytest.mark.parametrize("value", [0.1, 3, 300.7])
def test_constants_are_cast_and_viewed_as_torch_does(value):
    for first, second, viewed in itertools.product([*FLOATS, torch.int16, torch.bool], repeat=3):
        expected = torch.tensor(value, dtype=first).to(second)
        number = cast(constant(torch.tensor(value, dtype=first)), second)
        assert number == constant(expected)
        if second.itemsize == viewed.itemsize:
            same_bytes = expected.view(viewed)
            origin = Unknown("views a constant as NaN") if same_bytes.isnan() else constant(same_bytes)
            assert reinterpreted(number, viewed) == origin


def test_views_of_cast_elements_are_unknown():
    assert reinterpreted(Read(3, torch.int16, torch.int16), torch.bfloat16) == Read(3, torch.bfloat16, torch.bfloat16)
    assert reinterpreted(Read(3, torch.float32, torch.bfloat16), torch.int16) == Unknown(
        "views torch.bfloat16, cast from torch.float32, as torch.int16", frozenset([3])
    )


def tensor(storage, *shape, dtype=torch.float32, offset=0):
    return View(storage, dtype, offset, shape, contiguous_strides(shape))


def composer_of(*writes, old=None, nbytes=48):
    """Compose writes; storages 0 and 1 are sources."""
    composer = Composer(dict.fromkeys(range(6), nbytes), {0: (0, torch.float32), 1: (1, torch.float32)}, old)
    for write in writes:
        composer.write(Write(*write))
    return composer


def test_rows_of_unknown_values_are_those_of_all_their_elements():
    composer = composer_of(
        (tensor(2, 3), tensor(0, 3)),
        (tensor(2, 3, offset=3), tensor(1, 3)),
        (tensor(3, 6), Computed("an operation", (tensor(2, 6),))),
        (tensor(4, 6), Computed("nobody sees it", None)),
        (tensor(5, 2), Computed("an operation", (tensor(0, 2),))),
    )
    assert composer.filled(tensor(3, 6)).unknown == Unknown("an operation", frozenset([0, 1]))
    assert composer.filled(tensor(4, 2)).unknown == Unknown("nobody sees it", frozenset([0, 1]))
    assert composer.filled(tensor(5, 2)).unknown == Unknown("an operation", frozenset([0]))
    assert composer.filled_with(tensor(5, 2), Computed("an operation", (tensor(1, 2),))).unknown == Unknown(
        "an operation", frozenset([1])
    )


@pytest.mark.parametrize("known", [False, True])
def test_values_computed_of_what_nobody_wrote_need_all_sources(known):
    """What a target contains before anything is written to it comes from no source."""
    computed = Computed("an operation", (tensor(2, 4),))
    composer = composer_of(
        (tensor(2, 2), tensor(0, 2)), (tensor(3, 4), computed), old={2: Computed("old values")} if known else None
    )
    rows = frozenset([0] if known else [0, 1])
    assert composer.filled(tensor(3, 4)).unknown == Unknown("an operation", rows)


def test_elements_that_nobody_wrote_are_those_of_the_storage_that_is_copied():
    def reason(storage):
        composer = composer_of(
            (tensor(storage, 2), tensor(0, 2)),
            (tensor(4, 4), tensor(storage, 4)),
            old={2: Computed("old values of 2"), 3: None},
        )
        return composer.filled(tensor(4, 4)).unknown.reason

    assert reason(2) == "old values of 2"
    assert reason(3) == "writes only 2 of 4 elements"
    assert reason(5) == "the loading code copies elements that it has not written"


def test_elements_around_those_that_nobody_wrote_are_copied():
    composer = composer_of((tensor(2, 2), tensor(0, 2)), (tensor(3, 4), tensor(2, 4)))
    assert [read.row for read, _ in composer.filled(tensor(3, 2)).reads] == [0]
    assert composer.filled(tensor(3, 2, offset=2)).unknown is not None


def test_reads_of_one_source_as_two_dtypes_are_unknown():
    composer = composer_of(
        (tensor(2, 2, dtype=torch.int16), tensor(0, 2, dtype=torch.int16)),
        (tensor(2, 2, dtype=torch.int16, offset=2), tensor(0, 2, dtype=torch.bfloat16)._replace(dtype=torch.int16)),
        (tensor(3, 2), tensor(0, 2)),
        (tensor(3, 2, offset=2), tensor(0, 2, dtype=torch.bfloat16)),
    )
    assert composer.filled(tensor(2, 4, dtype=torch.int16)).unknown is None
    assert composer.filled(tensor(3, 4)).unknown == Unknown("reads one tensor as two dtypes", frozenset([0]))


@pytest.mark.parametrize(("repeats", "is_known"), [(4096, True), (4097, False)])
def test_elements_are_repeated_up_to_a_bound(repeats, is_known):
    composer = Composer({0: 8, 1: 8 * repeats}, {0: (0, torch.float32)})
    composer.write(Write(tensor(1, repeats, 2), View(0, torch.float32, 0, (repeats, 2), (0, 1))))
    filled = composer.filled(tensor(1, repeats, 2))
    assert len(filled.reads) == (repeats if is_known else 0)
    assert filled.unknown == (None if is_known else Unknown("repeats elements too often", frozenset([0])))


def test_empty_views_are_written():
    composer = composer_of((tensor(2, 0, 3), tensor(0, 0, 3)), (tensor(2, 0), Constant(1)))
    assert composer.filled(tensor(2, 0, 3)) == Filled()
    assert composer.filled(tensor(3, 2)) == Filled(is_written=False)
    assert composer.filled_with(tensor(3, 0, 2), Constant(1)) == Filled()
    assert composer.filled_with(tensor(3, 2, 3), Constant(1)).numbers[0][1].box.numel == 6
    assert Composer({0: 0}, {0: (0, torch.float32)}).filled(tensor(0, 0)) == Filled()


def test_constants_are_rounded_to_the_dtype_that_they_are_written_in():
    narrow, wide = tensor(2, 2, dtype=torch.bfloat16), tensor(3, 2)
    composer = composer_of((narrow, Constant(0.1)), (wide, narrow))
    assert composer.filled(narrow).numbers == composer.filled(wide).numbers
    [(number, _)] = composer.filled(wide).numbers
    assert number == torch.tensor(0.1, dtype=torch.bfloat16).item()


def test_strides_without_a_common_radix_leave_everything_unknown_but_its_rows():
    """A write at a stride that divides no other one takes all sources that are in the storage, and in the write."""
    composer = composer_of(
        (tensor(2, 6), tensor(0, 6)),
        (View(2, torch.float32, 6, (2, 2), (2, 2)), Constant(3)),
    )
    assert composer.filled(tensor(2, 3)).unknown is None
    composer = composer_of((tensor(2, 12), tensor(0, 12)), (View(2, torch.float32, 0, (2, 2), (2, 2)), tensor(1, 2, 2)))
    assert composer.filled(tensor(2, 3)).unknown.rows == {0, 1}
    assert composer.is_rewritten(tensor(2, 3))


def test_views_next_to_a_rewritten_one_are_not_rewritten():
    half = tensor(2, 4, dtype=torch.bfloat16, offset=4)
    composer = composer_of((half, Computed("an operation")), (half, Computed("an operation")))
    views = [tensor(2, 4, dtype=torch.bfloat16, offset=offset) for offset in (0, 1, 4, 7, 8)]
    assert [composer.is_rewritten(view) for view in views] == [False, True, True, True, False]
    assert not composer.is_rewritten(tensor(2, 2))
    assert composer.is_rewritten(tensor(2, 2, offset=2))


def test_storages_behind_are_found_through_every_write():
    composer = composer_of(
        (tensor(2, 2), tensor(0, 2)),
        (tensor(2, 2, offset=2), tensor(1, 2)),
        (tensor(3, 4), Computed("an operation", (tensor(2, 4),))),
        (tensor(4, 4), tensor(3, 4)),
        (tensor(4, 1), Constant(0)),
        (tensor(5, 0), tensor(1, 0)),
    )
    assert composer.storages_behind([5]) == {5}
    assert composer.storages_behind([4]) == {0, 1, 2, 3, 4}
    assert composer.storages_behind([2]) == {0, 1, 2}


def test_write_to_the_last_byte_of_an_element_is_overwritten_with_it():
    last = tensor(2, 1, dtype=torch.uint8, offset=3)
    composer = composer_of((last, tensor(0, 1, dtype=torch.uint8)), (tensor(2, 1), tensor(1, 1)))
    assert composer.filled(tensor(2, 4, dtype=torch.uint8)).reads == (
        (Read(1, torch.uint8, torch.uint8), Piece(0, run_of(4), 0, 0)),
    )


def test_constants_of_equal_bytes_are_constants_in_each_dtype():
    short, single = tensor(2, 4, dtype=torch.int16), tensor(3, 8, dtype=torch.uint8)
    composer = composer_of((short, Constant(257)), (single, Constant(1)))
    for view, dtype in itertools.product((short, single), (torch.uint8, torch.int16, torch.int32)):
        [(number, piece)] = composer.filled(tensor(view.storage, 8 // dtype.itemsize, dtype=dtype)).numbers
        assert number == torch.full((8,), 1, dtype=torch.uint8).view(dtype)[0].item()
        assert piece.box.numel == 8 // dtype.itemsize


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (View(2, torch.uint8, 1, (4,), (1,)), View(0, torch.uint8, 0, (4,), (1,))),
        (View(2, torch.uint8, 0, (4,), (1,)), View(0, torch.uint8, 1, (4,), (1,))),
        (View(2, torch.uint8, 0, (2, 4), (6, 1)), View(0, torch.uint8, 0, (2, 4), (4, 1))),
        (View(2, torch.uint8, 0, (2, 4), (4, 1)), View(0, torch.uint8, 0, (2, 4), (6, 1))),
        (View(2, torch.uint8, 0, (4,), (1,)), View(0, torch.uint8, 0, (4,), (2,))),
        (View(2, torch.uint8, 0, (4,), (2,)), View(0, torch.uint8, 0, (4,), (1,))),
        (View(2, torch.uint8, 0, (3,), (1,)), View(0, torch.uint8, 0, (3,), (1,))),
    ],
    ids=["target starts", "source starts", "target rows", "source rows", "source steps", "target steps", "odd count"],
)
def test_bytes_that_make_no_whole_elements_are_unknown_as_elements(target, source):
    composer = composer_of((target, source), (tensor(3, 3), tensor(2, 3)))
    assert composer.filled(tensor(3, 1)).unknown == Unknown("parts of elements are apart", frozenset([0]))


@pytest.mark.parametrize("offset", [4, 5])
def test_rows_of_views_that_are_not_affine_are_those_of_pieces_they_may_meet(offset):
    """A piece that ends before the view, or starts after it, is no part of it."""
    composer = composer_of(
        (tensor(2, offset), tensor(0, offset)),
        (tensor(2, 7, offset=offset), tensor(1, 7)),
        (tensor(3, 2), tensor(0, 2)),
    )
    view = View(2, torch.float32, offset, (2, 2), (2, 2))
    assert composer.filled(view).unknown.rows == {1}
    assert composer.filled(view._replace(offset=0, shape=(2,), strides=(2,))).unknown is None
    composer.write(Write(View(3, torch.float32, 4, (2, 2), (1, 1)), tensor(1, 2, 2)))
    assert {read.row for read, _ in composer.filled(tensor(3, 2)).reads} == {0}


def test_storage_that_becomes_unknown_keeps_the_rows_of_all_its_elements():
    composer = composer_of(
        (tensor(2, 4), tensor(0, 4)),
        (tensor(2, 8, offset=4), tensor(1, 8)),
        (View(2, torch.float32, 4, (2, 2), (2, 2)), tensor(1, 2, 2)),
    )
    assert composer.filled(tensor(2, 4)).unknown.rows == {0, 1}


def test_zeros_keep_their_sign():
    composer = composer_of((tensor(2, 2), Constant(0.0)), (tensor(3, 2), Constant(-0.0)))
    for storage, expected in ((2, torch.zeros(2)), (3, torch.full((2,), -0.0))):
        assert bits(executed(composer.filled(tensor(storage, 2)), [], expected)) == bits(expected)


def test_constants_viewed_as_nan_keep_their_bytes_or_are_unknown():
    composer = composer_of((tensor(2, 2, dtype=torch.int16), Constant(-1)))
    filled = composer.filled(tensor(2, 2, dtype=torch.bfloat16))
    expected = torch.full((2,), -1, dtype=torch.int16).view(torch.bfloat16)
    assert filled.unknown is not None or bits(executed(filled, [], expected)) == bits(expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_casts_through_dtypes_that_torch_does_not_promote_are_no_error(dtype):
    through = cast(Read(3, torch.int8, torch.int8), dtype)
    assert isinstance(cast(through, torch.int32), Unknown)
    assert cast(cast(Read(3, torch.uint8, torch.uint8), dtype), torch.uint8) in (
        Read(3, torch.uint8, torch.uint8),
        Unknown(f"casts twice: torch.uint8, {dtype}, torch.uint8", frozenset([3])),
    )
