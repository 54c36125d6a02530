"""Tests of the seconds that threads wait for answers: each thread counts its own, also if the wait ends in an error."""

import threading
import time

import pytest

from automodel_conv.files.waits import seconds_waited, waiting


def test_time_of_a_block_is_counted():
    before = seconds_waited()
    with waiting():
        time.sleep(0.02)
    after = seconds_waited()
    assert 0.02 <= after - before < 10
    time.sleep(0.02)
    assert seconds_waited() == after


def test_wait_that_ends_in_an_error_is_counted():
    def fail():
        with waiting():
            time.sleep(0.02)
            raise OSError("reset")

    before = seconds_waited()
    with pytest.raises(OSError, match="reset"):
        fail()
    assert seconds_waited() - before >= 0.02


def test_each_thread_counts_its_own():
    before, seen = seconds_waited(), []

    def wait():
        with waiting():
            time.sleep(0.02)
        seen.append(seconds_waited())

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(0.02 <= seconds < 10 for seconds in seen)
    assert seconds_waited() == before
