"""Faults that are planted in the package are found by the tests beside this file."""

from __future__ import annotations

import inspect

import pytest

from automodel_conv import converting
from automodel_conv.errors import ConversionError
from automodel_conv.execution import writing
from automodel_conv.files import final_files, resuming, staging
from tests.crash_safety.support import (
    INDEX,
    planted,
    use,
)
from tests.crash_safety.test_changed_sources import test_a_source_that_changes_during_the_run_is_refused_at_its_end
from tests.crash_safety.test_refused import test_a_disk_that_is_full_from_some_call_on
from tests.crash_safety.test_what_lies_there import (
    test_a_directory_with_a_checkpoint_is_refused_and_left_alone,
    test_a_finished_file_that_was_damaged_is_written_again_whatever_happens_then,
    test_a_second_conversion_of_the_same_process_is_refused,
    test_an_unfinished_work_of_another_kind_is_refused_and_can_still_be_finished,
    test_what_makes_it_a_checkpoint_is_taken_back_first,
)

FOUND_BY = {
    "nobody takes the lock": (
        staging,
        "            if not system.lock(fd):",
        "            if False:",
        test_a_second_conversion_of_the_same_process_is_refused,
        {},
    ),
    "an error is swallowed": (
        writing,
        "            system.reserve(fd, shard.nbytes)\n",
        "            try: system.reserve(fd, shard.nbytes)\n            except OSError: pass\n",
        test_a_disk_that_is_full_from_some_call_on,
        {"name": "reserve"},
    ),
    "a file that is written anew counts as finished": (
        resuming,
        '{"again": name}',
        '{"finished": name}',
        test_a_finished_file_that_was_damaged_is_written_again_whatever_happens_then,
        {"damage": "truncated"},
    ),
    "another work is taken for this one": (
        resuming,
        "        if earlier.work != work:",
        "        if False:",
        test_an_unfinished_work_of_another_kind_is_refused_and_can_still_be_finished,
        {"call": 40},
    ),
    "a source may change": (
        converting,
        "        if now != state:",
        "        if False:",
        test_a_source_that_changes_during_the_run_is_refused_at_its_end,
        {"gone": False},
    ),
    "a checkpoint is overwritten": (
        resuming,
        "    if present:",
        "    if False:",
        test_a_directory_with_a_checkpoint_is_refused_and_left_alone,
        {"name": INDEX},
    ),
    "what makes it a checkpoint is taken back last": (
        final_files,
        "reversed(list(placed))",
        "list(placed)",
        test_what_makes_it_a_checkpoint_is_taken_back_first,
        {},
    ),
}


@pytest.mark.parametrize("mutant", FOUND_BY)
def test_a_test_finds_each_fault_that_is_planted(forked, model, source, wanted, tmp_path, monkeypatch, mutant):
    module, text, replacement, test, arguments = FOUND_BY[mutant]
    use(monkeypatch, module, planted(module, text, replacement))
    given = {"forked": forked, "model": model, "source": source, "wanted": wanted, "tmp_path": tmp_path}
    given |= {"monkeypatch": monkeypatch, **arguments}
    with pytest.raises((AssertionError, ConversionError, pytest.fail.Exception)):
        test(**{name: given[name] for name in inspect.signature(test).parameters})
